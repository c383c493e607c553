"""A real Slurm of one node for tests: its own folder, ports and processes, beside any other Slurm of the machine.

Needs root and the Debian packages of `PACKAGES`; no systemd, no cgroups. Its GPUs are counted, there are none. Nothing
outside its folder is written, and its processes end with it, also when the tests are killed.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import NoReturn

import pytest

PACKAGES = "slurm-wlm slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin mariadb-server munge"
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "setpriv")
TEMPLATES = Path(__file__).parent / "slurmbox"
DATABASE = "CREATE DATABASE slurm_acct_db; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1' IDENTIFIED BY 'slurm';"
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
IN_SERVICE = ("idle", "mixed", "allocated", "completing", "planned")  # planned: kept free for a job that waits
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def what_is_missing() -> str | None:
    """Return in one line why there can be no Slurm here; None if there can."""
    path = f"{os.environ['PATH']}:{SBIN}"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"Slurm's programs {', '.join(absent)} are not installed: apt-get install {PACKAGES}"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


def skip(reason: str) -> NoReturn:
    """Skip a test that cannot run here; with CI=true it fails instead."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def wait(predicate: Callable[[], object], timeout: float = 30) -> object:
    """Return the first true value of `predicate()`, asked five times a second; TimeoutError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {value!r} after {timeout} s")
        time.sleep(0.2)
    return value


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


class SlurmBox:
    """One controller, one node, one accounting database, in `folder` (short: a socket's path has 107 characters).

    Partitions: `gpu` (default), `low` (its jobs are requeued for those of) `high`. `environment` makes Slurm's commands
    talk to this one.
    """

    def __init__(self, folder: Path, *, cpus: int = 8, gpus: int = 8, memory_mb: int = 16000) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        ports = ("controller_port", "node_port", "accounting_port", "database_port")
        self._values = dict(zip(ports, _free_ports(len(ports)), strict=True))
        self._values |= {"folder": folder, "host": socket.gethostname().split(".")[0]}
        self._values |= {"cpus": cpus, "memory_mb": memory_mb, "gpus": gpus, "last_gpu": gpus - 1}

    # --- The box ---

    def start(self) -> None:
        """Start everything, which takes about 3 s; RuntimeError with its log if a part does not answer."""
        self.folder.chmod(0o755)
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        for gpu in range(self._values["gpus"]):
            os.mknod(self.folder / f"gpu{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        self._configure(accounting=True)
        self._start_munge()
        self._start_database()
        self._start_accounting()
        self._start_controller()
        self._start_node()

    def stop(self) -> None:
        """End all jobs and daemons; no process of the box is left."""
        if "slurmctld" in self._daemons:
            self.clear()
        for name in ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        wait(lambda: not self.processes())

    def processes(self) -> list[int]:
        """Return the ids of all processes that were started with this box's configuration."""
        wanted, found = os.fsencode(f"SLURM_CONF={self.environment['SLURM_CONF']}"), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def _configure(self, *, accounting: bool) -> None:
        storage = ACCOUNTING.format_map(self._values) if accounting else NO_ACCOUNTING
        for name in ("slurm.conf", "gres.conf", "slurmdbd.conf"):
            text = Template((TEMPLATES / name).read_text()).substitute(self._values, accounting=storage)
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)

    def _start(self, name: str, *arguments: str) -> None:
        """Start a daemon in a session of its own, which hears no Ctrl-C of ours, but ends when we do."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", name, *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, name: str, answers: Callable[[], object]) -> None:
        """Wait for a daemon's answer; RuntimeError with its log if there is none."""
        try:
            wait(answers)
        except TimeoutError as error:
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            raise RuntimeError(f"{name} does not answer; its log:\n{log}") from error

    def _end(self, name: str) -> None:
        if daemon := self._daemons.pop(name, None):
            daemon.terminate()
            daemon.wait(30)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self._environment(), capture_output=True, timeout=30).returncode == 0

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self._start("munged", "--foreground", *(f"--{option}={munge / name}" for option, name in files.items()))
        self._wait_for("munged", lambda: self._answers("munge", "--no-input", f"--socket={munge / 'socket'}"))

    def _start_database(self) -> None:
        where = ["--no-defaults", f"--socket={self.folder / 'mysql'}"]
        files = ["--no-defaults", "--user=root", f"--datadir={self.folder / 'mysql.d'}"]
        install = ["mariadb-install-db", *files, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        network = [f"--port={self._values['database_port']}", "--bind-address=127.0.0.1"]
        speed = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        self._start("mariadbd", *files, *where[1:], f"--pid-file={self.folder / 'mysql.pid'}", *network, *speed)
        self._wait_for("mariadbd", lambda: self._answers("mariadb-admin", *where, "ping"))
        self.run("mariadb", *where, "-e", DATABASE)

    def _start_accounting(self) -> None:
        self._start("slurmdbd", "-D")
        self._wait_for("slurmdbd", lambda: self._answers("sacctmgr", "-n", "show", "cluster"))

    def _start_controller(self) -> None:
        self._start("slurmctld", "-D")
        self._wait_for("slurmctld", lambda: self._answers("scontrol", "ping"))

    def _start_node(self) -> None:
        self._start("slurmd", "-D")
        self._wait_for("slurmd", lambda: self.node_state().startswith(IN_SERVICE))

    # --- What Slurm is asked and told ---

    def run(self, *command: str) -> str:
        """Return what a command prints; RuntimeError with its stderr if it fails."""
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """Return the id of a new batch job: one core, 100 MB, 5 minutes, unless `options` (of sbatch) say otherwise."""
        default = ["--parsable", "--mem=100M", "--time=5", f"--output={self.folder / 'job-%j.out'}"]
        return self.run("sbatch", *default, *options, f"--wrap={script}").strip()

    def jobs(self) -> dict[str, str]:
        """Return the state of each job, by id, that is not over: "PENDING", "RUNNING" and so on."""
        return dict(line.split() for line in self.run("squeue", "--noheader", "--array", "-o", "%i %T").splitlines())

    def state(self, job: str) -> str:
        """Return how a job stands, also one that is over: as the controller remembers it, for five minutes."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "-o", "%T").strip()

    def accounted(self, job: str) -> str:
        """Return a job's state as the accounting database has it, a second or two late; "" if it does not know it."""
        return self.run("sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=State%40").strip()

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def suspend(self, job: str) -> None:
        self.run("scontrol", "suspend", job)

    def resume(self, job: str) -> None:
        self.run("scontrol", "resume", job)

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    def node(self, state: str) -> None:
        """Set the node's state: "drain", "down" or "resume"."""
        self.run("scontrol", "update", "NodeName=node1", f"State={state}", "Reason=test")

    def node_state(self) -> str:
        return self.run("sinfo", "--noheader", "-p", "gpu", "-o", "%T").strip()

    def preempt(self) -> str:
        """Return the id of a job of one second that needs all cores: jobs of partition `low` are requeued for it."""
        return self.submit("sleep 1", "--partition=high", f"--cpus-per-task={self._values['cpus']}")

    def clear(self) -> None:
        """End all jobs and take the node back into service."""
        self.run("scancel", "--user=root")
        if not self.node_state().startswith(IN_SERVICE):
            self.node("resume")
        wait(lambda: not self.jobs(), 90)  # what ended while the controller was away is told it up to a minute later

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Within the block Slurm's commands fail; jobs run on."""
        self._end("slurmctld")
        try:
            yield
        finally:
            self._start_controller()

    def restart_controller(self) -> None:
        """End the controller and start it again: it remembers its jobs."""
        with self.without_controller():
            pass

    @contextlib.contextmanager
    def without_accounting(self) -> Iterator[None]:
        """Within the block Slurm keeps no accounts and `sacct` fails. No job may run when it begins or ends."""
        self._reconfigure(accounting=False)
        try:
            yield
        finally:
            self.clear()
            self._reconfigure(accounting=True)

    def _reconfigure(self, *, accounting: bool) -> None:
        for name in ("slurmd", "slurmctld"):
            self._end(name)
        self._configure(accounting=accounting)
        self._start_controller()
        self._start_node()
