"""Parts of the executor plugin `submitit`: what it makes of resources and settings, its ledger, its looks."""

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import subprocess
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import snakemake_executor_plugin_submitit as plugin
from snakemake_executor_plugin_submitit import Executor, ExecutorSettings, _check, options_of
from snakemake_executor_plugin_submitit.attempts import Attempt, Command, Ledger
from snakemake_executor_plugin_submitit.clusters import Debug, Local, Slurm
from snakemake_interface_common.exceptions import WorkflowError
from submitit.local.debug import DebugExecutor


def job_asking(**resources: object) -> SimpleNamespace:
    return SimpleNamespace(name="cell", resources={"_cores": 2, "runtime": 7, **resources})


def test_what_a_job_asks_for() -> None:
    settings = ExecutorSettings(partition="gpu", sbatch=["exclude=n1", "exclusive"])
    asked = options_of(job_asking(mem_mb=500, gpus=2, gpu_model="a100", qos="high"), settings)
    assert (asked.minutes, asked.mem_mb, asked.cpus, asked.extra) == (
        7,
        500,
        2,
        (("exclude", "n1"), ("exclusive", True)),
    )
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
    ("setting", "value"),
    [("array_size", 0), ("poll_interval", 0), ("warning", 0), ("requeues", -1), ("gres", "gpu:{count}"), ("gres", "{")],
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
    (folder / "7_0_0_result.pkl").write_bytes(pickle.dumps(("success", 0)))
    assert ledger.outcomes(attempts) == {attempts[0]: None}
    (folder / "7_1_0_result.pkl").write_bytes(pickle.dumps(("success", 3)))
    assert ledger.outcomes(attempts)[attempts[1]] == "failed with exit status 3"
    (folder / "7_1_0_result.pkl").unlink()
    assert list(ledger.attempts({"7_1", "8"})) == [attempts[1]]
    ledger.forget(attempts[0])
    assert {path.name for path in folder.iterdir()} == {"7_1_submitted.pkl", "7_1_0_log.err", "7_submission.sh"}
    ledger.forget(attempts[1])
    assert ledger.folders() == []
    assert ledger.outcomes(attempts) == {}  # also where somebody has deleted the folder


def test_a_look_at_no_jobs_asks_nobody() -> None:
    """Snakemake looks for the first time while the executor is being made."""

    async def looks() -> list:
        return [info async for info in Executor.check_active_jobs(SimpleNamespace(), [])]

    coroutine = looks()
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value == []


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function: Slurm's command of this name prints a text, and puts its environment and arguments into a file."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def add(name: str, output: str = "") -> Path:
        program, seen = tmp_path / "bin" / name, tmp_path / f"{name}.seen"
        program.write_text(f"#!/bin/sh\nenv > {seen}\necho \"$@\" >> {seen}\nprintf '%s' '{output}'\n")
        program.chmod(0o755)
        return seen

    return add


def test_what_is_submitted_to_slurm(commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All CPUs for the step, put back in the queue where that is not the default, nothing of a job we may be in."""
    commands("srun")
    seen = commands("sbatch", "Submitted batch job 7")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_CPU_BIND", "SLURM_CONF"):
        monkeypatch.setenv(name, "of Snakemake")
    folder = tmp_path / "folder"
    options = options_of(job_asking(), ExecutorSettings(sbatch=["exclusive", "exclude=n1"]))
    assert Slurm("run").submit(folder, [Command("true", "", folder)], options) == ["7"]
    script = (folder / "7_submission.sh").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --exclusive", "#SBATCH --exclude=n1"} <= set(script)
    (step,) = [line for line in script if line.startswith("srun ")]
    assert "--cpus-per-task=2" in step.split()
    assert [line for line in seen.read_text().splitlines() if line.endswith("of Snakemake")] == [
        "SLURM_CONF=of Snakemake"
    ]
    assert os.environ["SLURM_JOB_ID"] == "of Snakemake"


def test_a_queue_may_hold_jobs_with_any_comment(commands) -> None:
    commands("squeue", "7_0 run\n8 \n9\n10 two words\n11 (null)\n")
    assert Slurm("run").alive([]) == {"7_0", "8", "9", "10", "11"}
    seen = commands("scancel")
    Slurm("run").cancel([])
    assert seen.read_text().splitlines()[-1] == "7_0"


class Looks:
    """An executor that follows one attempt, of which a test says whether it is in the queue."""

    def __init__(self, folder: Path, latency_wait: float = 0) -> None:
        self.attempt = Attempt("7", folder)
        self.executor = executor = object.__new__(Executor)
        executor._ledger, executor._attempts = Ledger(folder.parent), {"7": self.attempt}
        executor._missing_since, executor._unreachable = {}, False
        executor.status_rate_limiter = contextlib.AsyncExitStack()
        executor.workflow = SimpleNamespace(execution_settings=SimpleNamespace(latency_wait=latency_wait))
        executor.logger = SimpleNamespace(info=lambda text: self.said.append(text))
        executor.report_job_success = lambda info: self.said.append("success")
        executor.report_job_error = lambda info, msg, aux_logs: self.said.append(msg.splitlines()[0])
        self.said: list[str] = []

    def look(self, *, alive: bool) -> bool:
        """Return whether the job is still followed after a look."""
        self.executor._cluster = SimpleNamespace(alive=lambda _: {"7"} if alive else set(), fate=lambda _: "fate")
        info = SimpleNamespace(aux={"attempt": self.attempt}, job=SimpleNamespace(is_group=lambda: False))

        async def looked() -> list:
            return [each async for each in self.executor.check_active_jobs([info])]

        return bool(asyncio.run(looked()))


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The file of a result, in a folder of one attempt."""
    folder = Ledger(tmp_path).new_folder()
    (folder / "7_submitted.pkl").touch()
    return folder / "7_0_result.pkl"


def test_a_file_that_cannot_be_deleted_fails_no_job(result: Path) -> None:
    """NFS keeps what is still open under another name: it is there until it is closed."""
    result.write_bytes(pickle.dumps(("success", 0)))
    (result.parent / ".nfs0001").mkdir()
    looks = Looks(result.parent)
    assert not looks.look(alive=True)
    assert looks.said[0].startswith("submitit: files of 7 stay: ")
    assert looks.said[1:] == ["success"]


def test_a_result_that_is_being_replaced_is_read_at_the_next_look(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(result.parent)
    with monkeypatch.context() as patched:
        patched.setattr("snakemake_executor_plugin_submitit.attempts._listed", lambda folder: [result.name])
        assert looks.look(alive=True)
    result.write_bytes(pickle.dumps(("success", 0)))
    assert not looks.look(alive=True)
    assert looks.said == ["success"]


def test_a_job_that_was_missing_and_came_back_has_its_patience_again(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(plugin, "time", SimpleNamespace(monotonic=lambda: now[0]))
    looks = Looks(result.parent, latency_wait=60)
    for now[0], alive in ((0, False), (10, True), (100, False), (159, False)):
        assert looks.look(alive=alive)
    now[0] = 160
    assert not looks.look(alive=False)
    assert looks.said == ["7 left no result; fate"]


def test_a_cluster_that_is_away_is_asked_whether_it_is_back_and_not_sent_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, submissions = [None, None, None, set()], []

    def submit(folder: Path, commands: list, options: object) -> list[str]:
        submissions.append(folder)
        if answers:
            raise OSError("away")
        return ["7"]

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    executor = object.__new__(Executor)
    executor._cluster = SimpleNamespace(submit=submit, alive=lambda _: answers.pop(0))
    executor._ledger, executor._next_seconds_between_status_checks = Ledger(tmp_path), 1
    executor.logger = SimpleNamespace(info=lambda text: None)
    assert executor._submitted(None, []) == [Attempt("7", submissions[1])]
    assert len(submissions) == 2


def test_a_job_that_ends_while_others_are_cancelled_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that looks, or between the question whether its process lives and the signal."""
    executor = object.__new__(Executor)
    executor._attempts = {each: Attempt(each, tmp_path) for each in ("1", "2")}
    executor._cluster = SimpleNamespace(cancel=lambda attempts: [executor._attempts.pop(each.id) for each in attempts])
    executor.cancel_jobs([])
    assert not executor._attempts
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where a shell has the tests ignore it
    with subprocess.Popen(["sleep", "60"], preexec_fn=hears) as running, subprocess.Popen(["true"]) as ended:
        ended.wait()
        attempts = [Attempt(str(process.pid), tmp_path) for process in (ended, running)]
        monkeypatch.setattr(Local, "alive", lambda self, folders: {attempt.id for attempt in attempts})
        Local("run").cancel(attempts)
        assert running.wait(10) == -signal.SIGINT


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # submitit leaves its logs open
def test_jobs_in_this_process_keep_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit names such a job by the address of its submission, which a later one may have if the first is freed."""
    submit, submissions = DebugExecutor.submit, []

    def recorded(executor: DebugExecutor, command: Command):
        job = submit(executor, command)
        submissions.append(weakref.ref(job.submission()))
        return job

    monkeypatch.setattr(DebugExecutor, "submit", recorded)
    cluster, options = Debug("run"), options_of(job_asking(), ExecutorSettings())
    ids = cluster.submit(tmp_path, [Command("true", str(number), tmp_path) for number in range(3)], options)
    gc.collect()
    assert len(set(ids)) == 3
    assert all(submission() for submission in submissions)
