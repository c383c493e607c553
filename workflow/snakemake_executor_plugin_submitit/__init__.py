"""Snakemake executor plugin `submitit`: jobs go out through submitit, as Slurm job arrays, or to this machine.

    snakemake --executor submitit --jobs 500 [--submitit-partition gpu ...]

A job is a Snakemake of its own on the node, as with every remote executor. What Snakemake's resources mean here:
`options_of`. Works for any workflow whose folder the nodes share. Jobs that a killed Snakemake left behind are found
again by what they do (`attempts.Ledger`), so that nothing runs twice.
"""

import asyncio
import secrets
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase
from submitit.core.utils import FailedJobError, FailedSubmissionError

from snakemake_executor_plugin_submitit.attempts import Attempt, Command, Ledger, identity
from snakemake_executor_plugin_submitit.clusters import CLUSTERS, Options

common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    pass_envvar_declarations_to_cmd=True,
    auto_deploy_default_storage_provider=False,
    pass_group_args=True,
)

_REFUSED = (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError)


def _told(text: str, **more) -> dict:
    return {"help": text, **more}


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    cluster: str = field(
        default="slurm",
        metadata=_told(
            "Where jobs run: slurm; local: processes of this machine; debug: one after the other in this process.",
            choices=sorted(CLUSTERS),
        ),
    )
    folder: Path = field(
        default=Path(".snakemake/submitit"),
        metadata=_told("Where submissions and their logs are kept; the nodes must see it."),
    )
    partition: str | None = field(default=None, metadata=_told("Slurm partition, if a rule names none.", type=str))
    account: str | None = field(default=None, metadata=_told("Slurm account, if a rule names none.", type=str))
    qos: str | None = field(default=None, metadata=_told("Slurm quality of service, if a rule names none.", type=str))
    constraint: str | None = field(
        default=None, metadata=_told("Features a node must have, if a rule names none.", type=str)
    )
    gres: str | None = field(
        default=None,
        metadata=_told("What a rule with gpus asks for where --gpus-per-node is not known: gpu:a100:{gpus}.", type=str),
    )
    setup: list | None = field(
        default=None, metadata=_told("Shell lines that run first in each job: 'module load cuda'.", nargs="+", type=str)
    )
    sbatch: list | None = field(
        default=None, metadata=_told("Further options of sbatch: exclude=n13 exclusive.", nargs="+", type=str)
    )
    array_size: int = field(default=1000, metadata=_told("Most jobs of one array; Slurm's MaxArraySize is often 1001."))
    poll_interval: int = field(default=10, metadata=_told("Seconds between two looks at the jobs, at all at once."))
    warning: int = field(
        default=90, metadata=_told("Seconds before its time limit at which a job is told, and put back in the queue.")
    )
    requeues: int = field(
        default=3, metadata=_told("How often a job that reached its time limit is put back in the queue by itself.")
    )


class Executor(RemoteExecutor):
    def __post_init__(self) -> None:
        settings = self.workflow.executor_settings
        _check(settings)
        self._run = f"snakemake-{secrets.token_hex(6)}"
        self._cluster = CLUSTERS[settings.cluster](self._run)
        self._ledger = Ledger(settings.folder)
        self._left_behind: dict[str | None, Attempt] | None = None  # by a Snakemake before this one; looked up once
        self._attempts: dict[str, Attempt] = {}  # all that have not ended, by id
        self._missing_since: dict[str, float] = {}
        self._unreachable = False
        self.next_seconds_between_status_checks = settings.poll_interval

    def run_job(self, job) -> None:
        self._submit([job])

    def run_jobs(self, jobs: list) -> None:
        """Submit all jobs that are ready, those that ask for the same as one array."""
        signal.signal(signal.SIGTERM, _interrupt)  # Snakemake's own handler would wait for the jobs to end
        for job in jobs:
            self.run_job_pre(job)
        self._submit(jobs)

    def _submit(self, jobs: list) -> None:
        settings, arrays = self.workflow.executor_settings, {}
        for job in jobs:
            if attempt := self._attempt_of(identity(job)):
                self.logger.info(f"Job {job.jobid} is already on its way as {attempt.id}; waiting for that one.")
                self._follow(job, attempt)
                continue
            try:
                arrays.setdefault(options_of(job, settings), []).append(job)
            except ValueError as error:
                self.report_job_error(SubmittedJobInfo(job), msg=f"{error}\n")
        for options, alike in arrays.items():
            for first in range(0, len(alike), settings.array_size):
                self._submit_array(options, alike[first : first + settings.array_size])

    def _submit_array(self, options: Options, jobs: list) -> None:
        try:
            attempts = self._submitted(options, jobs)
        except _REFUSED as error:
            for job in jobs:
                self.report_job_error(SubmittedJobInfo(job), msg=f"Not submitted: {_reason(error)}\n")
            return
        for job, attempt in zip(jobs, attempts, strict=True):
            self.logger.info(f"Job {job.jobid} is submitted as {attempt.id}, its log: {attempt.stderr}")
            self._follow(job, attempt)

    def _submitted(self, options: Options, jobs: list) -> list[Attempt]:
        """Return the attempts at all jobs, submitted as soon as the cluster answers; raises what it refuses with."""
        while True:
            try:
                folder = self._ledger.new_folder()
                commands = [Command(self.format_job_exec(job), identity(job), folder) for job in jobs]
                return [Attempt(each, folder) for each in self._cluster.submit(folder, commands, options)]
            except _REFUSED as error:
                if self._cluster.alive([]) is not None:
                    raise
                self.logger.info(f"submitit: the cluster does not answer, submitting again: {_reason(error)}")
                while self._cluster.alive([]) is None:
                    time.sleep(self.next_seconds_between_status_checks)

    def _follow(self, job, attempt: Attempt) -> None:
        self._attempts[attempt.id] = attempt
        info = SubmittedJobInfo(job, external_jobid=attempt.id, aux={"attempt": attempt})
        self.report_job_submission(info)

    def _attempt_of(self, wanted: str) -> Attempt | None:
        """Return the attempt at this very job that a Snakemake before this one left behind."""
        if self._left_behind is None:
            alive = self._cluster.alive(self._ledger.folders())
            if alive is None:
                raise WorkflowError("submitit: the cluster does not answer; jobs left behind cannot be looked for")
            self._left_behind = {attempt.identity(): attempt for attempt in self._ledger.attempts(alive)}
        return self._left_behind.pop(wanted, None)

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncIterator[SubmittedJobInfo]:
        """Report the jobs that have ended and yield the others.

        A success is one at once. A failure counts when the job has left the queue: one that was put back runs again.
        """
        if not active_jobs:  # also asked before __post_init__ has run
            return
        attempts = [info.aux["attempt"] for info in active_jobs]
        async with self.status_rate_limiter:
            alive = self._cluster.alive({attempt.folder for attempt in attempts})
        self._say_if_unreachable(alive is None)
        outcomes = self._ledger.outcomes(attempts)
        for info, attempt in zip(active_jobs, attempts, strict=True):
            has_result, gone = attempt in outcomes, alive is not None and attempt.id not in alive
            if has_result and (outcomes[attempt] is None or gone):
                self._conclude(info, attempt, outcomes[attempt])
            elif not has_result and gone and self._stays_missing(attempt.id):
                self._conclude(info, attempt, f"left no result; {self._cluster.fate(attempt.id)}")
            else:
                if not gone:
                    self._missing_since.pop(attempt.id, None)
                yield info

    def _stays_missing(self, external_id: str) -> bool:
        """Return whether an attempt has been gone for longer than a file server may take to show its result."""
        since = self._missing_since.setdefault(external_id, time.monotonic())
        return time.monotonic() - since >= self.workflow.execution_settings.latency_wait

    def _conclude(self, info: SubmittedJobInfo, attempt: Attempt, error: str | None) -> None:
        del self._attempts[attempt.id]
        if error is None:
            try:
                self._ledger.forget(attempt)
            except OSError as reason:  # the result is there: a left file is no reason to fail
                self.logger.info(f"submitit: files of {attempt.id} stay: {reason}")
            self.report_job_success(info)
            return
        lines = attempt.last_lines()
        quoted = "".join(f"    {line}\n" for line in lines)
        said = f"Last lines of {attempt.stderr}:\n{quoted}" if lines else f"Nothing was written to {attempt.stderr}.\n"
        message = f"{attempt.id} {error}\n{said}"
        if info.job.is_group():  # Snakemake prints no message of ours for a group
            self.logger.error(message)
        self.report_job_error(info, msg=message, aux_logs=[str(attempt.stderr)])

    def _say_if_unreachable(self, unreachable: bool) -> None:
        if unreachable != self._unreachable:
            self._unreachable = unreachable
            state = "does not answer; jobs count as running until it does" if unreachable else "answers again"
            self.logger.info(f"submitit: the cluster {state}.")

    async def sleep(self) -> None:
        """Wait for the next look, or for the end: what is left to do then should not take a poll's time."""
        until = time.monotonic() + self.next_seconds_between_status_checks
        while self.wait and time.monotonic() < until:
            await asyncio.sleep(0.2)

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Cancel every job that has not ended, also one that `active_jobs` lacks because it is being looked at."""
        self._cluster.cancel(list(self._attempts.values()))  # a copy: the look at them goes on in its thread


def options_of(job, settings: ExecutorSettings) -> Options:
    """Return what a job asks a cluster for: its resources, else the settings.

    mem_mb: MB; runtime: minutes, needed; gpus: a number; gpu_model: their type; slurm_partition, slurm_account, qos,
    constraint; threads: CPUs. Raises ValueError for a job without a runtime, or one that would be warned at once.
    """
    ask = job.resources.get
    runtime, gpus = ask("runtime"), ask("gpus") or 0
    if not runtime:
        raise ValueError(f"{job.name}: no resource runtime; needed are the minutes it may run")
    if runtime * 60 <= settings.warning:
        raise ValueError(
            f"{job.name}: runtime={runtime} minutes; must be more than the {settings.warning} s of warning"
        )
    named = {
        "partition": ask("slurm_partition") or settings.partition,
        "account": ask("slurm_account") or settings.account,
        "qos": ask("qos") or settings.qos,
        "constraint": ask("constraint") or settings.constraint,
    }
    if gpus and settings.gres:
        named["gres"] = settings.gres.format(gpus=gpus)
    elif gpus:
        named["gpus_per_node"] = f"{ask('gpu_model')}:{gpus}" if ask("gpu_model") else str(gpus)
    return Options(
        name=job.name,
        minutes=int(runtime),
        mem_mb=ask("mem_mb"),
        cpus=ask("_cores") or 1,
        named=tuple((name, value) for name, value in named.items() if value),
        extra=tuple(_option(entry) for entry in settings.sbatch or ()),
        setup=tuple(settings.setup or ()),
        warning_s=settings.warning,
        requeues=settings.requeues,
        array_size=settings.array_size,
    )


def _check(settings: ExecutorSettings) -> None:
    """Raise WorkflowError for settings that mean nothing."""
    for name, lowest in (("array_size", 1), ("poll_interval", 1), ("warning", 1), ("requeues", 0)):
        if (found := getattr(settings, name)) < lowest:
            raise WorkflowError(f"submitit: {name}={found}: must be {lowest} or more")
    try:
        (settings.gres or "").format(gpus=1)
    except (LookupError, ValueError) as error:
        raise WorkflowError(f"submitit: gres={settings.gres!r}: allowed in braces is {{gpus}} alone") from error


def _option(entry: str) -> tuple[str, str | bool]:
    """Return (name, value) of an option of sbatch; True for one without a value, such as exclusive."""
    name, separator, value = entry.partition("=")
    return name, value if separator else True


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "stderr", None) or error).split())


def _interrupt(*_) -> None:
    raise KeyboardInterrupt
