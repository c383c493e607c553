# config -> cells: what there is to run, known before anything runs.
import hashlib
import json
import sys
from pathlib import Path

from scspec.cells import expand, manifest_names, plan, qualities
from scspec.config import REPLAY, load_experiment

# The interpreter that runs Snakemake has scspec; `python` on PATH may not. A global and no `params` of the rules:
# Snakemake compares params, and the same results folder may be used from another environment.
PYTHON = sys.executable
EXPERIMENT = load_experiment(config)
_cells, INVALID = expand(EXPERIMENT)
CELLS = {cell.id: cell for cell in _cells}
_predictions = [cell.predictions() for cell in _cells if cell.method == REPLAY]
PREDICTIONS = {predictions.id: predictions for predictions in _predictions}
TRAJECTORIES = {
    predictions.trajectory.id: predictions.trajectory for predictions in _predictions
}
MODELS = manifest_names(_cells)
PLAN = (
    json.dumps(plan(EXPERIMENT, _cells, INVALID, _quality), indent=1, sort_keys=True)
    + "\n"
)

# Once, and not again in every job that is a Snakemake of its own.
if workflow.is_main_process:
    for combination in INVALID:
        print(f"invalid combination, not run: {combination}", file=sys.stderr)


rule plan:
    output:
        "results/plan.json",
    localrule: True
    params:
        sha256=hashlib.sha256(PLAN.encode()).hexdigest(),
    run:
        Path(output[0]).write_text(PLAN, encoding="utf-8")
