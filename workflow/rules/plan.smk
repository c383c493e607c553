# config -> cells: what there is to run, known before anything runs.
import hashlib
import json
import sys
from pathlib import Path

from scspec.cells import expand, manifest_names, plan, qualities
from scspec.config import REPLAY, load_experiment
from scspec.locks import hold_folder

# The interpreter that runs Snakemake has scspec; `python` on PATH may not. A global and no `params` of the rules:
# Snakemake compares params, and the same results folder may be used from another environment.
PYTHON = sys.executable
EXPERIMENT = load_experiment(config)
_cells, INVALID = expand(EXPERIMENT)
CELLS = {cell.id: cell for cell in _cells}
_predictions = [cell.predictions() for cell in _cells if cell.method == REPLAY]
_quality = qualities(EXPERIMENT, _cells)
PREDICTIONS = {its.id: its for its in _predictions}
QUALITY = {its.id: its for its in _quality.values()}
TRAJECTORIES = {
    its.trajectory.id: its.trajectory for its in (*_predictions, *QUALITY.values())
}
MODELS = manifest_names(_cells)
NOT_RUN = "".join(f"invalid combination, not run: {its}\n" for its in INVALID)
PLAN = (
    json.dumps(plan(EXPERIMENT, _cells, INVALID, _quality), indent=1, sort_keys=True)
    + "\n"
)

# Once, and not again in every job that is a Snakemake of its own.
if workflow.is_main_process:

    onstart:
        hold_folder(Path("results"))

    print(NOT_RUN, end="", file=sys.stderr)


rule plan:
    output:
        "results/plan.json",
    log:
        "results/logs/plan.log",
    localrule: True
    params:
        sha256=hashlib.sha256(PLAN.encode()).hexdigest(),
    run:
        Path(output[0]).write_text(PLAN, encoding="utf-8")
        Path(log[0]).write_text(NOT_RUN, encoding="utf-8")
