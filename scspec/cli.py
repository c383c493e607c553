"""The command line, thin: what Snakemake's rules call, and a look at the plan.

A mistake of the user (`ValueError`, `FileNotFoundError`) is one line and exit code 2; anything else keeps its
traceback. Heavy modules are imported by the command that needs them.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

USER_ERROR = 2  # as argparse's own


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of a command line (without the program's name; None for the process's own)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, FileNotFoundError) as error:
        if arguments.logged:  # its stderr is the job's log: where it happened belongs there
            traceback.print_exc()
        print(f"scspec: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scspec",
        description="Speculative decoding with stochastic computing. Runs: snakemake --cores all",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    parser.set_defaults(logged=False)
    batched = (*_ON_MODELS, "prompts_per_batch")
    _add_job(commands, "run-cell", "Cell", "run.run_cell", "run one cell and write its Parquet file", batched)
    says = "decode a target's own texts, which replayed cells share"
    _add_job(commands, "run-trajectory", "Trajectory", "replay.run_trajectory", says, batched)
    says = "run a draft over a target's texts"
    _add_job(commands, "run-predictions", "Predictions", "replay.run_predictions", says, _ON_MODELS, "trajectory")
    says = "score a target on a fixed text, beside itself in floating point"
    _add_job(commands, "run-quality", "Quality", "quality.run_quality", says, _ON_MODELS, "trajectory")
    says = "derive one cell from texts and predictions: no model runs"
    _add_job(commands, "replay", "Cell", "replay.replay_cell", says, (), "trajectory", "predictions")

    fetch = commands.add_parser("fetch", help="fetch a model's files, check and convert them")
    fetch.add_argument("name", metavar="NAME", help="a Hugging Face id, a local folder, or a built-in alias")
    fetch.add_argument("--manifest", type=Path, help="where to write what was fetched, as JSON (else: print it)")
    fetch.set_defaults(command=_fetch)

    plan = commands.add_parser("plan", help="list the cells of an experiment and what cannot exist")
    plan.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="default: config.yaml")
    plan.set_defaults(command=_plan)

    report = commands.add_parser(
        "report", help="write the report of the cells of a plan that exist, and its table beside it"
    )
    report.add_argument("--plan", type=Path, required=True, help="results/plan.json, written by Snakemake")
    report.add_argument("--output", type=Path, required=True, help="the HTML file to write")
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="print how two cells or two grids differ, b minus a")
    for side in ("a", "b"):
        compare.add_argument(side, metavar=side.upper(), type=Path, help="a cell's Parquet file, or a folder of them")
    compare.set_defaults(command=_compare)
    return parser


_COUNTS = {
    "threads": "CPU threads",
    "prompts_per_batch": "prompts decoded side by side",
    "gpus": "GPUs that each model is spread over",
    "cells_per_gpu": "jobs that may share a GPU",
}
_ON_MODELS = ("threads", "gpus", "cells_per_gpu")


def _add_job(
    commands: Any, name: str, kind: str, function: str, says: str, counts: tuple[str, ...], *inputs: str
) -> None:
    """Add a job's command: `function` of scspec does a job of `kind`, from the files of the jobs it needs."""
    job = commands.add_parser(name, help=says)
    job.add_argument("line", metavar="JSON", help="the job's JSON line")
    for each in inputs:
        job.add_argument(f"--{each}", type=Path, required=True, help=f"the Parquet file of its {each}")
    job.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    for count in counts:
        job.add_argument(f"--{count.replace('_', '-')}", type=int, default=1, help=f"{_COUNTS[count]} (default 1)")
    job.set_defaults(command=_run_job, kind=kind, function=function, inputs=inputs, counts=counts, logged=True)


def _run_job(arguments: argparse.Namespace) -> None:
    from scspec import jobs
    from scspec.gpus import claim_gpus

    counts = {name: getattr(arguments, name) for name in arguments.counts}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not allowed; allowed: at least 1")
    job, cells_per_gpu = getattr(jobs, arguments.kind).from_json(arguments.line), counts.pop("cells_per_gpu", None)
    if cells_per_gpu and job.device == "cuda":
        claim_gpus(counts["gpus"], cells_per_gpu)
    module, function = arguments.function.split(".")
    run = getattr(import_module(f"scspec.{module}"), function)  # imports torch, which is to see the claimed GPUs alone
    run(job, *(getattr(arguments, name) for name in arguments.inputs), arguments.output, **counts)


def _fetch(arguments: argparse.Namespace) -> None:
    from scspec.models import fetch_model
    from scspec.results import atomic_file

    text = json.dumps(fetch_model(arguments.name), indent=2, sort_keys=True) + "\n"
    if arguments.manifest is None:
        print(text, end="")
        return
    with atomic_file(arguments.manifest) as file:
        file.write(text.encode())


def _plan(arguments: argparse.Namespace) -> None:
    from scspec.cells import expand
    from scspec.config import load_experiment, read_config

    cells, invalid = expand(load_experiment(read_config(arguments.configfile)))
    for cell in cells:
        print(cell.id)
    for combination in invalid:
        print(f"invalid, not run: {combination}")
    print(f"{len(cells)} cells, {len(invalid)} invalid combinations")


def _report(arguments: argparse.Namespace) -> None:
    from scspec.report import build_report

    plan = json.loads(arguments.plan.read_text(encoding="utf-8"))
    paths = [path for path in (Path(cell["path"]) for cell in plan["cells"]) if path.exists()]
    if not paths:
        raise ValueError(f"--plan: none of the {len(plan['cells'])} cells of {arguments.plan} has been run yet")
    build_report(paths, plan, arguments.output)


def _compare(arguments: argparse.Namespace) -> None:
    from scspec.compare import compare, plain_tables, read_side

    print(plain_tables(compare(read_side(arguments.a), read_side(arguments.b))))
