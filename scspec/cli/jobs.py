"""The jobs of Snakemake's rules (workflow/rules/cells.smk). Their stderr is a log: errors come with a traceback."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from scspec.cli.plain import PLAIN

app = typer.Typer(**PLAIN)

Line = Annotated[str, typer.Argument(metavar="JSON", help="The job's JSON line.", show_default=False)]
Output = Annotated[Path, typer.Option(help="The Parquet file to write.", show_default=False)]
TrajectoryFile = Annotated[Path, typer.Option(help="The Parquet file of its trajectory.", show_default=False)]
PredictionsFile = Annotated[Path, typer.Option(help="The Parquet file of its predictions.", show_default=False)]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
PromptsPerBatch = Annotated[int, typer.Option(min=1, help="Prompts decoded side by side.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs that each model is spread over.")]
CellsPerGpu = Annotated[int, typer.Option(min=1, help="Jobs that may share a GPU.")]


def _run_job(context: typer.Context, kind: str, function: str, line: str, *paths: Path, **counts: int) -> None:
    """Do a job of `kind` by `function` of scspec, from the files of the jobs it needs, into the last of `paths`."""
    from scspec import jobs
    from scspec.gpus import claim_gpus

    context.obj["traceback"] = True
    job, cells_per_gpu = getattr(jobs, kind).from_json(line), counts.pop("cells_per_gpu", None)
    if cells_per_gpu and job.device == "cuda":
        claim_gpus(counts["gpus"], cells_per_gpu)
    module, name = function.split(".")
    run = getattr(import_module(f"scspec.{module}"), name)  # imports torch, which is to see the claimed GPUs alone
    run(job, *paths, **counts)


def _add_decoding(command: str, kind: str, function: str, says: str) -> None:
    """Add a command whose job decodes prompts."""

    @app.command(command, help=says)
    def run(
        context: typer.Context,
        line: Line,
        output: Output,
        threads: Threads = 1,
        gpus: Gpus = 1,
        cells_per_gpu: CellsPerGpu = 1,
        prompts_per_batch: PromptsPerBatch = 1,
    ) -> None:
        counts = {"threads": threads, "gpus": gpus, "cells_per_gpu": cells_per_gpu}
        _run_job(context, kind, function, line, output, **counts, prompts_per_batch=prompts_per_batch)


def _add_scoring(command: str, kind: str, function: str, says: str) -> None:
    """Add a command whose job scores a trajectory's texts."""

    @app.command(command, help=says)
    def run(
        context: typer.Context,
        line: Line,
        trajectory: TrajectoryFile,
        output: Output,
        threads: Threads = 1,
        gpus: Gpus = 1,
        cells_per_gpu: CellsPerGpu = 1,
    ) -> None:
        counts = {"threads": threads, "gpus": gpus, "cells_per_gpu": cells_per_gpu}
        _run_job(context, kind, function, line, trajectory, output, **counts)


_add_decoding("run-cell", "Cell", "run.run_cell", "Run one cell and write its Parquet file.")
_add_decoding("run-trajectory", "Trajectory", "replay.run_trajectory", "Decode a target's texts, which cells share.")
_add_scoring("run-predictions", "Predictions", "replay.run_predictions", "Run a draft over a target's texts.")
_add_scoring("run-quality", "Quality", "quality.run_quality", "Score a target beside itself in floating point.")


@app.command()
def replay(
    context: typer.Context, line: Line, trajectory: TrajectoryFile, predictions: PredictionsFile, output: Output
) -> None:
    """Derive one cell from texts and predictions: no model runs."""
    _run_job(context, "Cell", "replay.replay_cell", line, trajectory, predictions, output)
