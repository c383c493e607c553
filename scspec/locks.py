"""A lock on a results folder that several working directories share.

Snakemake locks its working directory, and deletes a target before it makes it and when that fails: two of them in two
clones with one results folder would delete what the other has just finished. Imports no torch.
"""

import errno
import getpass
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from scspec.provenance import host

#: How a file system says that it has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)
#: The locks of this process. A lock that nothing refers to is released, and these are to stay until the process ends.
_HELD: list[FileLock] = []


def hold_folder(folder: Path) -> None:
    """Have a folder for this process until it ends, however that comes.

    Raises ValueError, one line that names the process that has it, and OSError if the lock's file cannot be written.
    Where the file system has no locks, says so on stderr and goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".lock.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise ValueError(f"{folder}: in use by {said}; allowed: one Snakemake at a time on a results folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{folder}: cannot be locked ({error}): let no other Snakemake use it meanwhile", file=sys.stderr)
        return
    _HELD.append(lock)
    holder.write_text(f"{getpass.getuser()} on {host()}, process {os.getpid()} in {Path.cwd()}", encoding="utf-8")
