"""A results folder that one process has: who is refused, and what a file system without locks is told."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from scspec import locks

HOLDS = "import sys; from pathlib import Path; from scspec.locks import hold_folder; hold_folder(Path(sys.argv[1]))"


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test holds goes with it."""
    monkeypatch.setattr(locks, "_HELD", [])


def hold_elsewhere(folder: Path, then: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", f"{HOLDS}; {then}", str(folder)], stderr=subprocess.PIPE, text=True)


def test_another_process_is_told_who_has_the_folder_until_that_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    with hold_elsewhere(folder, "import time; time.sleep(60)") as holder:
        try:
            deadline = time.monotonic() + 30
            while not (folder / ".lock.holder").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            said = rf"^{folder}: in use by \S+ on \S+, process {holder.pid} in {Path.cwd()}; allowed: one Snakemake"
            with pytest.raises(ValueError, match=said):
                locks.hold_folder(folder)
        finally:
            holder.kill()
    locks.hold_folder(folder)
    with hold_elsewhere(folder, "pass") as late:
        assert f"in use by {(folder / '.lock.holder').read_text()};" in late.communicate()[1]
        assert late.returncode != 0


def fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def acquire(self: FileLock, timeout: float) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", acquire)


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fails(monkeypatch, errno.ENOLCK)
    locks.hold_folder(tmp_path)
    assert f"{tmp_path}: cannot be locked ([Errno {errno.ENOLCK}]" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_lock_that_cannot_be_written_is_no_folder_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fails(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        locks.hold_folder(tmp_path)
