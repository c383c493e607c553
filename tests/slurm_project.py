"""A small grid of real cells in a folder of its own, run by `snakemake --profile slurm` as users type it.

The models are tiny, everything else is the workflow of this repository. A cell can be held at a prompt, so that faults
strike where a test wants them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import yaml
from tiny import save_tiny_model

from scspec.results import check_identities, read_cell

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPTS = ("Hello there", "What is this?", "And that?")
CELL = "results/cells/tiny/sc_sc/L64_d32_p8_g2_s0_n0.parquet"
OTHER = CELL.replace("_g2_", "_g4_")
#: A profile that needs no Slurm: one cell at a time, in a process of this machine.
HERE = "profiles/default"
#: What a cell asks for, unless a test says otherwise: enough, and no longer than a test may take.
RESOURCES = ("cell:mem_mb=2000", "cell:runtime=5")
#: A cell writes to disk once when it begins, once after each prompt, and once for its Parquet file. While the file
#: `hold` says the number of the write that was last, it waits.
HOLD = """
import itertools, os, sys, time

def held(file, fsync=os.fsync, writes=itertools.count(1)):
    fsync(file)
    number = next(writes)
    while told() == str(number):
        time.sleep(0.05)

def told():
    try:
        with open("hold") as file:
            return file.read()
    except FileNotFoundError:
        return None

if "run-cell" in sys.orig_argv:
    os.fsync = held
"""


def make_project(folder: Path) -> "Project":
    """Return a new project in `folder`, whose models are fetched."""
    for name in ("workflow", "profiles", "slurm"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HOLD)
    lines = [json.dumps({"id": str(number), "prompt": text}) for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    model = {"model": str(save_tiny_model(folder / "model"))}
    config = {
        "pairs": {"tiny": {"target": model, "draft": {**model, "stoc_len": {"ratio": 0.5}, "skip_layers": [1]}}},
        "stoc_len": [64],
        "gamma": [2, 4],
        "prompt_file": "prompts.jsonl",
        "max_new_tokens": 8,
        "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "controls": {"enabled": False},
        "quality": {"enabled": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return Project(folder)


def built_project(folder: Path, *cells: str) -> "Project":
    """Return a new project in `folder` whose `cells` were built undisturbed, without Slurm."""
    project = make_project(folder)
    with project.running(profile=HERE, targets=cells) as running:
        running.messages(timeout=300)  # the first cell may have to compile all that is compiled
    return project


def rows_of(path: Path) -> pd.DataFrame:
    """Return the rows of a cell's Parquet file without times: two undisturbed runs have the same."""
    blocks, _ = read_cell(path)
    check_identities(blocks)
    return blocks.drop(columns=["draft_time_s", "verify_time_s"])


class Project:
    """The grid in `folder`: two cells of three prompts each; `cell` is the file of the first, `CELL`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cell = folder / CELL

    def copy(self, folder: Path) -> "Project":
        """Return the same project in another folder, times included, but without the cells that were built."""
        shutil.copytree(self.folder, folder)
        shutil.rmtree(folder / "results" / "cells")
        return Project(folder)

    def hold(self, *, prompts: int) -> None:
        """Make cells wait when they have kept so many prompts; 4: all three, and the Parquet file has no name yet."""
        (self.folder / "hold").write_text(str(prompts + 1))

    def release(self) -> None:
        (self.folder / "hold").unlink()

    def kept(self) -> int:
        """Return how many prompts unfinished cells have kept beside their outputs."""
        files = self.cell.parent.glob(".*.partial")
        return sum(len(file.read_bytes().splitlines()) - 1 for file in files)

    def start(
        self,
        *arguments: str,
        profile: str = "slurm",
        targets: tuple[str, ...] = (CELL,),
        resources: tuple[str, ...] = RESOURCES,
        **environment: str,
    ) -> "Running":
        """Start Snakemake for cells; with profile slurm: quick polls, no retries, `resources` instead of its own."""
        output = self.folder / f"snakemake-{time.monotonic_ns()}.log"
        quick = ("--submitit-poll-interval=1", "--latency-wait=3", "--retries=0", "--set-resources", *resources)
        how = quick if profile == "slurm" else ("--cores", "1")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *targets, "--profile", profile, *how, *arguments],
                cwd=self.folder,
                env={**clean, "PYTHONPATH": str(self.folder / "site"), **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, output)

    @contextmanager
    def running(self, *arguments: str, **options) -> Iterator["Running"]:
        """As `start`; what still runs at the end of the block is killed."""
        running = self.start(*arguments, **options)
        try:
            yield running
        finally:
            running.kill()

    def run(self, *arguments: str, status: int = 0, **options) -> str:
        """Return the messages of a Snakemake that ends by itself, with this exit status."""
        with self.running(*arguments, **options) as running:
            return running.messages(status)


class Running:
    """A Snakemake in a process group of its own."""

    def __init__(self, process: subprocess.Popen, output: Path) -> None:
        self.process, self._output = process, output

    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def messages(self, status: int = 0, timeout: float = 120) -> str:
        """Return all it has said when it has ended; AssertionError if its exit status is another."""
        try:
            found = self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"Snakemake still runs after {timeout} s:\n{self.said()}") from error
        assert found == status, self.said()
        return self.said()

    def kill(self) -> None:
        """Kill it and its children, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
