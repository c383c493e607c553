"""The executor plugin `submitit`: on this machine, on a real Slurm, and what it makes of resources and settings."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from slurm_box import SlurmBox, wait
from snakemake_executor_plugin_submitit import Executor, ExecutorSettings, _check, options_of
from snakemake_executor_plugin_submitit.attempts import Attempt, Command, Ledger
from snakemake_interface_common.exceptions import WorkflowError

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
        " sleep {params.seconds}; echo {params.text} > {output}"
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
    run = start(3, seconds=8)
    all_started(folder, 3)
    run.process.kill()
    run.wait()
    subprocess.run(["snakemake", "--unlock", "--config", "cells=3"], cwd=folder, check=True, capture_output=True)
    again = start(3, seconds=8)
    assert again.wait() == 0
    assert again.messages().count("is already on its way as") == 3
    assert started(folder) == list("012")
    assert texts(folder) == dict.fromkeys("012", "done")


def test_a_job_left_behind_that_does_something_else_is_not_waited_for(start, folder: Path) -> None:
    run = start(1, seconds=8)
    all_started(folder, 1)
    run.process.kill()
    run.wait()
    unlock = ["snakemake", "--unlock", "--config", "cells=1"]
    subprocess.run(unlock, cwd=folder, check=True, capture_output=True)
    again = start(1, seconds=8, text="other")
    wait(lambda: len(started(folder)) == 2, 40)
    assert "already on its way" not in again.messages()
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


def job_asking(**resources: object) -> SimpleNamespace:
    return SimpleNamespace(name="cell", resources={"_cores": 2, "runtime": 7, **resources})


def test_what_a_job_asks_for() -> None:
    settings = ExecutorSettings(partition="gpu", sbatch=["exclude=n1"])
    asked = options_of(job_asking(mem_mb=500, gpus=2, gpu_model="a100", qos="high"), settings)
    assert (asked.minutes, asked.mem_mb, asked.cpus, asked.extra) == (7, 500, 2, (("exclude", "n1"),))
    assert dict(asked.named) == {"partition": "gpu", "qos": "high", "gpus_per_node": "a100:2"}
    assert dict(options_of(job_asking(slurm_partition="big"), settings).named) == {"partition": "big"}
    by_gres = options_of(job_asking(gpus=2), ExecutorSettings(gres="gpu:h100:{gpus}"))
    assert dict(by_gres.named) == {"gres": "gpu:h100:2"}


def test_a_job_without_a_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cell: no resource runtime; needed are the minutes it may run$"):
        options_of(SimpleNamespace(name="cell", resources={"_cores": 1}), ExecutorSettings())


def test_a_job_that_would_be_warned_when_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cell: runtime=1 minutes; must be more than the 60 s of warning$"):
        options_of(job_asking(runtime=1), ExecutorSettings(warning=60))


@pytest.mark.parametrize(
    ("setting", "value"), [("array_size", 0), ("poll_interval", 0), ("warning", 0), ("requeues", -1), ("sbatch", ["x"])]
)
def test_settings_that_mean_nothing_are_refused(setting: str, value: object) -> None:
    with pytest.raises(WorkflowError, match=f"submitit: {setting}="):
        _check(ExecutorSettings(**{setting: value}))


def test_a_command_ends_with_all_its_processes(tmp_path: Path) -> None:
    command = Command(f"sleep 1000 & echo $! > {tmp_path}/pid; exit 4", "", tmp_path / "folder")
    assert command() == 4
    assert (tmp_path / "folder").is_dir()  # where its result will be written, also if somebody has deleted it
    (child,) = map(int, (tmp_path / "pid").read_text().split())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_ledger_forgets_a_success_and_keeps_a_failure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    folder = ledger.new_folder()
    for name in ("7_0_submitted.pkl", "7_0_0_result.pkl", "7_1_submitted.pkl", "7_1_0_log.err", "7_submission.sh"):
        (folder / name).touch()
    attempts = [Attempt("7_0", folder), Attempt("7_1", folder)]
    assert ledger.ended(attempts) == {"7_0"}
    assert list(ledger.attempts({"7_1", "8"})) == [attempts[1]]
    ledger.forget(attempts[0])
    assert {path.name for path in folder.iterdir()} == {"7_1_submitted.pkl", "7_1_0_log.err", "7_submission.sh"}
    ledger.forget(attempts[1])
    assert ledger.folders() == []
    assert ledger.ended(attempts) == set()  # also where somebody has deleted the folder


def test_a_look_at_no_jobs_asks_nobody() -> None:
    """Snakemake looks for the first time while the executor is being made."""

    async def looks() -> list:
        return [info async for info in Executor.check_active_jobs(SimpleNamespace(), [])]

    coroutine = looks()
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value == []
