"""What a result came from: commit, versions, device, host and job, hashes."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

PACKAGES = (
    "scspec",
    "torch",
    "triton",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",  # it compiles backend cuda
    "transformers",
    "numpy",
    "numba",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "snakemake",
)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of every package that can change a result; None for one that is not here."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool | None]:
    """Return (commit hash, whether the tree has changes); (None, None) where the package is not in a git checkout."""
    root = _PACKAGE.parent
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True).stdout.strip()


def sources_sha256() -> str:
    """Return the SHA-256 of the package's sources, Python and CUDA: their names and contents, hexadecimal."""
    sources = hashlib.sha256()
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.cu")]):
        sources.update(f"{path.relative_to(_PACKAGE)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sources.hexdigest()


def host() -> str:
    """Return the name of this machine, as the system reports it."""
    return platform.node()


def slurm_job() -> str | None:
    """Return the id of the Slurm job that this process belongs to, `JOB` or `ARRAY_TASK`; None outside of Slurm."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def device_name(device: str) -> str:
    """Return the name of the processor behind a torch device string, as the system reports it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    if device != "cpu":
        raise ValueError(f"device={device!r}: allowed are 'cpu' and 'cuda'")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits. Raises `FileNotFoundError` if it is missing."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_setting(path: str, setting: str) -> str:
    """Return the SHA-256 of the file that a setting names.

    Raises `FileNotFoundError` with one line, which says what setting it is, if the file cannot be read.
    """
    try:
        return sha256_of(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        allowed = "the path of a file that can be read"
        raise FileNotFoundError(f"{setting}: {path!r} cannot be read ({reason}); allowed: {allowed}") from None
