"""The executor plugin `submitit` on this machine and on a real Slurm. Its parts alone: test_executor_parts.py."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from slurm_box import SlurmBox, wait

WORKFLOW = """
rule all:
    default_target: True
    input:
        [f"out/{i}" for i in range(int(config["cells"]))],
rule cell:
    output:
        "out/{i}",
    resources:
        runtime=5,
        mem_mb=500,
    params:
        text=config.get("text", "done"),
        seconds=config.get("seconds", 0),
    shell:
        "echo {wildcards.i} >> started; test ! -e break{wildcards.i} || (echo broken >&2; exit 3);"
        " sleep {params.seconds}; while test -e hold; do sleep 0.1; done; echo {params.text} > {output}"
"""
PROFILE = "executor: submitit\njobs: 1000\nkeep-going: true\nrerun-incomplete: true\nlatency-wait: 2\n"


class Run:
    """Snakemake as a process of its own, in a session of its own, its messages in a file.

    interrupt: what it does at first on SIGINT; a shell has what it starts in the background ignore it.
    """

    def __init__(self, folder: Path, *arguments: str, interrupt: signal.Handlers = signal.SIG_DFL) -> None:
        self._log = folder / "messages"
        with open(self._log, "ab") as log:
            command = ["snakemake", *arguments]
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
            )

    def wait(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)

    def messages(self) -> str:
        return self._log.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/config.yaml").write_text(PROFILE)
    return tmp_path


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def start(request: pytest.FixtureRequest, folder: Path) -> Iterator[SimpleNamespace]:
    """Start a run of the workflow on one of the clusters; at the end no process of one is left."""
    if request.param == "slurm":
        request.getfixturevalue("slurm")
    runs = []

    def begin(cells: int, *arguments: str, **config: object) -> Run:
        settings = [f"--submitit-cluster={request.param}", "--submitit-poll-interval=1", *arguments]
        options = [f"{name}={value}" for name, value in {"cells": cells, **config}.items()]
        runs.append(Run(folder, "--profile", "slurm", *settings, "--config", *options))
        return runs[-1]

    yield begin
    (folder / "hold").unlink(missing_ok=True)
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.wait()
    wait(lambda: not processes_in(folder))


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder, defunct ones aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def started(folder: Path) -> list[str]:
    return sorted((folder / "started").read_text().split()) if (folder / "started").exists() else []


def unlock(folder: Path, cells: int) -> None:
    command = ["snakemake", "--unlock", "--config", f"cells={cells}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in (folder / "out").glob("*")}


def all_started(folder: Path, cells: int) -> None:
    wait(lambda: started(folder) == sorted(map(str, range(cells))), 40)


def test_a_grid_finishes_and_a_failed_cell_runs_again_alone(start, folder: Path) -> None:
    (folder / "break2").touch()
    first = start(5)
    assert first.wait() == 1
    assert texts(folder) == dict.fromkeys("0134", "done")
    assert "failed with exit status 1" in first.messages()
    log = next((folder / ".snakemake/submitit").glob("*/*.err"))
    assert first.messages().count(f"Last lines of {log}:") == 1
    assert len(list((folder / ".snakemake/submitit").glob("*/*_submitted.pkl"))) == 1  # of the others nothing is kept
    (folder / "break2").unlink()
    assert start(5).wait() == 0
    assert texts(folder) == dict.fromkeys("01234", "done")
    assert started(folder) == sorted("012342")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_job_behind(start, folder: Path, number: signal.Signals) -> None:
    run = start(3, seconds=100)
    all_started(folder, 3)
    run.process.send_signal(number)
    assert run.wait(10) == 1
    wait(lambda: not processes_in(folder), 20)
    assert texts(folder) == {}


def test_a_snakemake_in_the_background_leaves_no_job_behind_either(folder: Path) -> None:
    arguments = ["--profile", "slurm", "--submitit-cluster", "local", "--config", "cells=1", "seconds=100"]
    run = Run(folder, *arguments, interrupt=signal.SIG_IGN)
    all_started(folder, 1)
    run.process.terminate()
    assert run.wait(10) == 1
    wait(lambda: not processes_in(folder), 20)


def test_a_killed_snakemake_finds_its_jobs_again(start, folder: Path) -> None:
    (folder / "hold").touch()
    run = start(3)
    all_started(folder, 3)
    run.process.kill()
    run.wait()
    unlock(folder, 3)
    again = start(3)
    wait(lambda: again.messages().count("is already on its way as") == 3)
    (folder / "hold").unlink()
    assert again.wait() == 0
    assert started(folder) == list("012")
    assert texts(folder) == dict.fromkeys("012", "done")


def test_a_job_left_behind_that_does_something_else_is_not_waited_for(start, folder: Path) -> None:
    (folder / "hold").touch()
    run = start(1)
    all_started(folder, 1)
    run.process.kill()
    run.wait()
    unlock(folder, 1)
    again = start(1, text="other")
    wait(lambda: len(started(folder)) == 2, 40)
    assert "already on its way" not in again.messages()
    (folder / "hold").unlink()
    assert again.wait() == 0


def test_jobs_of_a_group_are_one_submission(start, folder: Path) -> None:
    run = start(4, "--groups", "cell=several", "--group-components", "several=2")
    assert run.wait() == 0
    assert texts(folder) == dict.fromkeys("0123", "done")
    assert run.messages().count("Group job several") == 2


def test_a_failed_group_says_why(start, folder: Path) -> None:
    (folder / "break1").touch()
    run = start(2, "--groups", "cell=several", "--group-components", "several=2")
    assert run.wait() == 1
    assert "failed with exit status 1" in run.messages()
    assert "Last lines of" in run.messages()


@pytest.mark.slurm
def test_jobs_go_out_as_arrays_of_bounded_size(slurm: SlurmBox, folder: Path) -> None:
    run = Run(folder, "--profile", "slurm", "--submitit-array-size=4", "--config", "cells=10", "seconds=30")
    jobs = wait(lambda: len(found := slurm.jobs()) == 10 and found)
    arrays = [job.split("_")[0] for job in jobs]
    assert sorted(arrays.count(array) for array in set(arrays)) == [2, 4, 4]
    run.process.send_signal(signal.SIGINT)
    run.wait()
    wait(lambda: not slurm.jobs())


def test_debug_runs_in_this_process(folder: Path) -> None:
    arguments = ["--profile", "slurm", "--submitit-cluster", "debug", "--submitit-poll-interval=1"]
    (folder / "break1").touch()
    run = Run(folder, *arguments, "--config", "cells=2")
    assert run.wait() == 1
    assert texts(folder) == {"0": "done"}
    assert "failed with exit status 1" in run.messages()
