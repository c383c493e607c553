"""The three places where submitit runs jobs, behind one interface."""

import contextlib
import os
import pickle
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.core.utils import JobPaths
from submitit.local.debug import DebugExecutor
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from snakemake_executor_plugin_submitit.attempts import Attempt, Command


@dataclass(frozen=True)
class Options:
    """What a job asks for. named: parameters of submitit's SlurmExecutor; extra: other options of sbatch."""

    name: str
    minutes: int
    mem_mb: int | None
    cpus: int
    named: tuple[tuple[str, str], ...]
    extra: tuple[tuple[str, str | bool], ...]
    setup: tuple[str, ...]
    warning_s: int
    requeues: int
    array_size: int


class Cluster(ABC):
    def __init__(self, run: str):
        """run: a name that no other run of Snakemake has."""
        self.run = run

    @abstractmethod
    def submit(self, folder: Path, commands: list[Command], options: Options) -> list[str]:
        """Return the id of each command's job; all ask for the same."""

    @abstractmethod
    def alive(self, folders: Iterable[Path]) -> set[str] | None:
        """Return the ids of jobs submitted from these folders that have not ended; None if nobody can say now."""

    @abstractmethod
    def fate(self, external_id: str) -> str:
        """Return what the cluster knows of how a job ended that did not succeed."""

    @abstractmethod
    def cancel(self, attempts: Iterable[Attempt]) -> None:
        """End these jobs, and what of this run nobody knows of yet."""


class Slurm(Cluster):
    """Arrays of jobs. One `squeue` tells of all; accounting is not needed."""

    def submit(self, folder: Path, commands: list[Command], options: Options) -> list[str]:
        executor = SlurmExecutor(folder, max_num_timeout=options.requeues)
        executor.update_parameters(
            job_name=options.name,
            comment=self.run,
            time=options.minutes,
            mem=None if options.mem_mb is None else f"{options.mem_mb}MB",
            cpus_per_task=options.cpus,
            ntasks_per_node=1,
            signal_delay_s=options.warning_s,
            array_parallelism=options.array_size,
            setup=list(options.setup) or None,
            srun_args=[f"--cpus-per-task={options.cpus}"],  # from Slurm 22.05 on not taken over from sbatch
            additional_parameters={"requeue": True, **dict(options.extra)},  # some clusters forbid it by default
            **dict(options.named),
        )
        with _outside_of_jobs():
            return [job.job_id for job in executor.submit_array(commands)]

    def alive(self, folders: Iterable[Path]) -> set[str] | None:
        queue = self._queue()
        return None if queue is None else set(queue)

    def fate(self, external_id: str) -> str:
        shown = _output(["scontrol", "show", "job", "--oneliner", external_id])
        if shown:
            known = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
            return f"Slurm says {known['JobState']}, exit code {known['ExitCode']}, reason {known['Reason']}"
        told = _output(["sacct", "-X", "-n", "-P", "-j", external_id, "-o", "State,ExitCode"])
        if told and told.strip():
            state, code = told.splitlines()[0].split("|")
            return f"Slurm says {state}, exit code {code}"
        return "neither scontrol nor sacct knows of it any more"

    def cancel(self, attempts: Iterable[Attempt]) -> None:
        ids = {attempt.id for attempt in attempts}
        ids |= {each for each, run in (self._queue() or {}).items() if run == self.run}
        ids = sorted(ids)
        for first in range(0, len(ids), 500):
            subprocess.run(["scancel", *ids[first : first + 500]], check=False)

    def _queue(self) -> dict[str, str] | None:
        """Return {id: the run it belongs to} of this user's jobs that have not ended, suspended ones too."""
        told = _output(["squeue", "--user", str(os.getuid()), "--array", "--noheader", "--format", "%i %k"])
        return None if told is None else dict(line.partition(" ")[::2] for line in told.splitlines())


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """What is submitted within the block does not inherit the job that Snakemake itself may run in.

    Its variables reach a new job, where srun and submitit would take them for the new job's.
    """
    inherited = {}
    if "SLURM_JOB_ID" in os.environ:
        inherited = {name: os.environ.pop(name) for name in list(os.environ) if _is_of_a_job(name)}
    try:
        yield
    finally:
        os.environ.update(inherited)


def _is_of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SRUN_")) and name not in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


class Local(Cluster):
    """A process group for each job. All of a machine's GPUs are visible to all."""

    def __init__(self, run: str):
        super().__init__(run)
        self._processes = []

    def submit(self, folder: Path, commands: list[Command], options: Options) -> list[str]:
        executor = LocalExecutor(folder, max_num_timeout=options.requeues)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        line = "unset CUDA_VISIBLE_DEVICES" if visible is None else f"export CUDA_VISIBLE_DEVICES={visible}"
        commands = [replace(command, shell=f"{line}\n{command.shell}") for command in commands]
        executor.update_parameters(
            timeout_min=options.minutes, signal_delay_s=options.warning_s, setup=list(options.setup)
        )
        with _heard_interrupts():
            jobs = executor.submit_array(commands)
        self._processes += [job._process for job in jobs]
        return [job.job_id for job in jobs]

    def alive(self, folders: Iterable[Path]) -> set[str]:
        self._processes = [process for process in self._processes if process.poll() is None]  # none stays a zombie
        names = {os.fsencode(folder) for folder in folders}
        return {pid for pid in os.listdir("/proc") if pid.isdecimal() and names & set(_arguments(pid))}

    def fate(self, external_id: str) -> str:
        return "its process has ended"

    def cancel(self, attempts: Iterable[Attempt]) -> None:
        for attempt in attempts:
            if attempt.id in self.alive([attempt.folder]):
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(int(attempt.id), signal.SIGINT)


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
    """What starts within the block hears SIGINT, by which submitit cancels, also where a shell has us ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _arguments(pid: str) -> list[bytes]:
    try:
        arguments = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return []
    return arguments if b"submitit.local._local" in arguments else []


class Debug(Cluster):
    """Each job in turn, in this process, while it is submitted."""

    def __init__(self, run: str):
        super().__init__(run)
        self._jobs = []  # kept: a job's id is the address of its submission, which another could get

    def submit(self, folder: Path, commands: list[Command], options: Options) -> list[str]:
        return [self._run(folder, command) for command in commands]

    def _run(self, folder: Path, command: Command) -> str:
        job = DebugExecutor(folder).submit(command)
        self._jobs.append(job)
        JobPaths(folder, job.job_id).result_pickle.write_bytes(pickle.dumps(("success", job.result())))
        return job.job_id

    def alive(self, folders: Iterable[Path]) -> set[str]:
        return set()

    def fate(self, external_id: str) -> str:
        return "it ran in this process"

    def cancel(self, attempts: Iterable[Attempt]) -> None:
        """Do nothing: a job has ended when it is submitted."""


CLUSTERS = {"slurm": Slurm, "local": Local, "debug": Debug}


def _output(command: list[str]) -> str | None:
    """Return what a command prints; None if it fails or takes more than a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None
    return done.stdout if done.returncode == 0 else None
