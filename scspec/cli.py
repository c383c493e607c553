"""The command line, thin: what Snakemake's rules call, and a look at the plan.

A mistake of the user (`ValueError`, `FileNotFoundError`) is one line and exit code 2; anything else keeps its
traceback. Heavy modules are imported by the command that needs them.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

USER_ERROR = 2  # as argparse's own


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of a command line (without the program's name; None for the process's own)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, FileNotFoundError) as error:
        if arguments.command is _run_cell:  # its stderr is the cell's log: where it happened belongs there
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

    run_cell = commands.add_parser("run-cell", help="run one cell and write its Parquet file")
    run_cell.add_argument("cell", metavar="JSON", help="the cell's JSON line")
    run_cell.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    run_cell.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    run_cell.add_argument("--prompts-per-batch", type=int, default=1, help="prompts decoded side by side (default 1)")
    run_cell.add_argument("--gpus", type=int, default=1, help="GPUs that the models are spread over (default 1)")
    run_cell.add_argument("--cells-per-gpu", type=int, default=1, help="cells that may share a GPU (default 1)")
    run_cell.set_defaults(command=_run_cell)

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
    return parser


def _run_cell(arguments: argparse.Namespace) -> None:
    from scspec.cells import Cell
    from scspec.gpus import claim_gpus

    counts = {name: getattr(arguments, name) for name in ("threads", "prompts_per_batch", "gpus", "cells_per_gpu")}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not allowed; allowed: at least 1")
    cell, cells_per_gpu = Cell.from_json(arguments.cell), counts.pop("cells_per_gpu")
    if cell.device == "cuda":
        claim_gpus(counts["gpus"], cells_per_gpu)
    from scspec.run import run_cell  # imports torch, which is to see the claimed GPUs alone

    run_cell(cell, arguments.output, **counts)


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
