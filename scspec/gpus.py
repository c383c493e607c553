"""Which GPUs this process may use, and a claim on some of them, so that cells share a GPU only where they are told to.

A claim is a lock of the operating system on one file per GPU and share, in a folder on the machine's own disk: it goes
with the process that holds it, however that ends.

Not covered: programs that claim nothing; cells of other users, who have a folder of their own; cells that do not share
a folder for temporary files (containers, another TMPDIR); cells that run at a time with different `cells_per_gpu`; a
GPU split into MIG instances of which `CUDA_VISIBLE_DEVICES` names none. Imports no torch.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

POLL_S = 1.0

#: The locks of this process. A lock that nothing refers to is released, and these are to stay until the process ends.
_HELD: list[FileLock] = []


def claim_gpus(count: int, cells_per_gpu: int) -> list[str]:
    """Return `count` GPUs that this process has until it ends, and show CUDA no others (`CUDA_VISIBLE_DEVICES`).

    At most `cells_per_gpu` processes have the same GPU; one with more shares free goes first. Waits while too few are
    free, and says so once on stderr. To be called before CUDA is initialised. Raises ValueError if `count` is above
    the number of visible GPUs.
    """
    gpus = visible_gpus()
    if count > len(gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "is not set" if visible is None else f"is {visible!r}"
        raise ValueError(
            f"gpus={count}: nvidia-smi lists {len(gpus)} that are visible here (CUDA_VISIBLE_DEVICES {shown}); "
            f"allowed with device 'cuda': 1..{len(gpus)}"
        )
    claimed = _try_to_claim(gpus, count, cells_per_gpu)
    if not claimed:
        shares = f"{len(gpus)} visible, cells_per_gpu={cells_per_gpu}"
        print(f"gpus={count}: waiting until other cells end; too few GPUs are free ({shares})", file=sys.stderr)
    while not claimed:
        time.sleep(POLL_S)
        claimed = _try_to_claim(gpus, count, cells_per_gpu)
    _HELD.extend(claimed.values())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(claimed)
    return list(claimed)


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use: none where nvidia-smi is absent or finds no driver.

    `CUDA_VISIBLE_DEVICES` restricts them as CUDA reads it: numbers (here nvidia-smi's), UUIDs or their beginnings, up
    to the first that is no GPU of this machine. A MIG instance stands for itself.
    """
    here = _machine_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(here.values())
    found = (_uuid(name.strip(), here) or "" for name in visible.split(","))
    return list(dict.fromkeys(takewhile(bool, found)))


def _machine_gpus() -> dict[str, str]:
    """Return {number: UUID}, in nvidia-smi's order."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        return {}
    if listed.returncode:  # a login node that has the program and no GPU, or a GPU at fault
        print(f"nvidia-smi: {' '.join(listed.stdout.split())}", file=sys.stderr)
    return dict(re.findall(r"^(\d+), (GPU-\S+)$", listed.stdout, re.MULTILINE))


def _uuid(name: str, here: dict[str, str]) -> str | None:
    """Return the UUID that an entry of `CUDA_VISIBLE_DEVICES` stands for, or None."""
    if name.startswith("MIG-"):
        return name
    if name in here:
        return here[name]
    meant = [uuid for uuid in here.values() if name.startswith("GPU-") and uuid.startswith(name)]
    return meant[0] if len(meant) == 1 else None


def _try_to_claim(gpus: list[str], count: int, shares: int) -> dict[str, FileLock]:
    """Return {GPU: held lock} of the `count` GPUs with the most shares free, or nothing if fewer have one."""
    folder = Path(tempfile.gettempdir()) / f"scspec-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "choice.lock"):  # all or nothing: two that each hold a part would wait for each other
        free = {gpu: _free_shares(folder, gpu, shares) for gpu in gpus}
        best = sorted((gpu for gpu in gpus if free[gpu]), key=lambda gpu: -len(free[gpu]))[:count]
        claimed = {gpu: free[gpu].pop() for gpu in best} if len(best) == count else {}
        for lock in (lock for locks in free.values() for lock in locks):
            lock.release()
    return claimed


def _free_shares(folder: Path, gpu: str, shares: int) -> list[FileLock]:
    """Return a held lock for each share of a GPU that nobody had."""
    locks = [FileLock(folder / f"{gpu.replace('/', '_')}.{share}.lock") for share in range(shares)]
    return [lock for lock in locks if _acquired(lock)]


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
