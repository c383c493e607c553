"""What runs on a node, and the files by which it is found again."""

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths

LAST_LINES = 12  # of a job's stderr, in the message of its failure
PATIENCE_S = 600  # between a cluster's TERM and what it announces
_WARNING = JobEnvironment.USR_SIG  # reaches all processes of a job; submitit's answers for all


@dataclass(frozen=True)
class Command:
    """A shell command as a function for submitit, which may stop it and start it again later.

    identity: whose job it is; folder: where submitit will write its result.
    """

    shell: str
    identity: str
    folder: Path

    def __call__(self) -> int:
        """Run it and return its exit status.

        A cluster that sends TERM is about to kill the job or to put it back in the queue. That the command dies of it
        first is no result: nothing is returned until the cluster has acted.
        """
        terminated = []
        before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
        process = subprocess.Popen(["bash", "-c", f"trap '' {_WARNING}\n{self.shell}"], process_group=0)
        try:
            status = process.wait()
            if status and terminated:
                time.sleep(PATIENCE_S)
            return status
        finally:
            _end(process)
            signal.signal(signal.SIGTERM, before)
            self.folder.mkdir(parents=True, exist_ok=True)  # else a finished job is lost where somebody has tidied up

    def checkpoint(self) -> DelayedSubmission:
        """Return what submitit puts back in the queue; the exception that ends this attempt ends the command too."""
        return DelayedSubmission(self)


def _end(process: subprocess.Popen) -> None:
    """End what is left of a command and its children."""
    for number, patience_s in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(process.pid, number)
            until = time.monotonic() + patience_s
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def identity(job) -> str:
    """Return a digest of what a Snakemake job does: another Snakemake has the same for the same job."""
    members = [job] if not job.is_group() else sorted(job.jobs, key=lambda each: list(map(str, each.output)))
    told = [[each.rule.name, list(map(str, each.output)), each.shellcmd, str(each.params)] for each in members]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class Attempt:
    """One submission of a job. id: the cluster's; folder: where submitit keeps its files."""

    id: str
    folder: Path

    @property
    def _paths(self) -> JobPaths:
        return JobPaths(self.folder, self.id)

    @property
    def stderr(self) -> Path:
        return self._paths.stderr

    def identity(self) -> str | None:
        """Return the identity of its job; None if the files are gone."""
        try:
            return DelayedSubmission.load(self._paths.submitted_pickle).function.identity
        except FileNotFoundError:
            return None

    def error(self) -> str | None:
        """Return what an ended attempt failed of, in a line; None for one that succeeded."""
        outcome, what = pickle.loads(self._paths.result_pickle.read_bytes())
        if outcome == "success":
            return f"failed with exit status {what}" if what else None
        return f"failed: {what.strip().splitlines()[-1]}"

    def last_lines(self) -> list[str]:
        try:
            with open(self.stderr, encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, LAST_LINES)]
        except FileNotFoundError:
            return []

    def files(self) -> Iterator[Path]:
        paths = self._paths
        yield from (paths.submitted_pickle, paths.result_pickle, paths.stdout, paths.stderr)


class Ledger:
    """The folder of all submissions, each in a folder of its own. The files in it are what is known of an attempt."""

    def __init__(self, folder: Path):
        self._folder = folder.expanduser().absolute()

    def new_folder(self) -> Path:
        """Return a folder that no attempt has used."""
        folder = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        return folder

    def folders(self) -> list[Path]:
        return sorted(self._folder.iterdir()) if self._folder.is_dir() else []

    def attempts(self, ids: set[str]) -> Iterator[Attempt]:
        """Yield the attempts that have these ids."""
        for folder in self.folders():
            for path in folder.glob("*_submitted.pkl"):
                if (found := path.name.removesuffix("_submitted.pkl")) in ids:
                    yield Attempt(found, folder)

    def outcomes(self, attempts: Iterable[Attempt]) -> dict[Attempt, str | None]:
        """Return the error, or None, of each attempt that has a result. Listing a folder also refreshes it."""
        names = {folder: set(_listed(folder)) for folder in {attempt.folder for attempt in attempts}}
        found = {}
        for each in attempts:
            if f"{each.id}_0_result.pkl" in names[each.folder]:
                with contextlib.suppress(FileNotFoundError):  # submitit deletes an older result before a new one
                    found[each] = each.error()
        return found

    def forget(self, attempt: Attempt) -> None:
        """Delete the files of an attempt that succeeded, and its folder after the last one.

        Raises OSError for what cannot be deleted, such as a file that a job on NFS still has open.
        """
        for path in attempt.files():
            path.unlink(missing_ok=True)
        left = _listed(attempt.folder)
        if not any(name.endswith(("_submitted.pkl", ".err")) for name in left):
            for name in left:
                (attempt.folder / name).unlink(missing_ok=True)
            attempt.folder.rmdir()


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
