"""What `scspec doctor` finds: whether this machine has what scspec needs, a line per check. It fetches nothing.

Not covered: the hashes of models (`inventory.verify`, which reads gigabytes); what a cluster's nodes have, other than
where this runs.
"""

import importlib.util
import platform
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scspec.aliases import cache_folder
from scspec.gpus import visible_gpus
from scspec.inventory import models_here

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
INSTALL = "pip install -c constraints.txt -e ."
#: What is named in the line of packages that fit; the others only where they do not.
_NAMED = ("torch", "triton", "transformers", "numba", "snakemake")
MIN_FREE_GB = 1.0  # smollm2-135m and its download take 0.65
COMMAND_TIMEOUT_S = 10
#: File systems that several machines can see, as /proc/mounts names them.
_SHARED = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|cifs|smb|glusterfs|panfs|wekafs|afs|fuse\.|9p|virtiofs")


@dataclass(frozen=True)
class Finding:
    """`state`: OK, NOTE (nothing that is always needed) or BROKEN. `says`: what is, or what is wrong and what to do."""

    state: str
    topic: str
    says: str

    def __str__(self) -> str:
        return f"{self.state:7} {self.topic}: {' '.join(self.says.split())}"


def examine(results: Path) -> Iterator[Finding]:
    """Yield the findings, each as soon as it is known; `results` is the results folder, whether or not it is there.

    A check that cannot import what it needs is a finding too.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _packages),
        ("GPU", _gpus),
        ("backends", _backends),
        ("scmp_kernels", _published_kernels),
        ("Slurm", _slurm),
        ("models", _models),
        ("folders", lambda: _folders(results)),
    ]
    for topic, check in checks:
        try:
            yield from check()
        except ImportError as error:
            yield Finding(BROKEN, topic, f"not checked, an import failed: {error}; {INSTALL}")


def _packages() -> Iterator[Finding]:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    python = platform.python_version()
    fits = SpecifierSet(project["requires-python"]).contains(python)
    needs = f"{python}, needs {project['requires-python']}"
    yield Finding(
        OK if fits else BROKEN, "Python", needs if fits else f"{needs}: make the environment with another one"
    )
    needed = [Requirement(line) for line in project["dependencies"]]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate()]
    here = {each.name: _version(each.name) for each in needed}
    wrong = [each for each in needed if not ((version := here[each.name]) and each.specifier.contains(version, True))]
    for each in wrong:
        yield Finding(BROKEN, each.name, f"{here[each.name] or 'not installed'}, needs {each.specifier}; {INSTALL}")
    if not wrong:
        named = ", ".join(f"{name} {here[name]}" for name in _NAMED if name in here)
        yield Finding(OK, "packages", f"{len(needed)} in pyproject.toml's ranges, {named}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        driver = (_said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])[1] or "unknown").split()
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
            says = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, driver {driver[0]}"
            yield Finding(OK, f"GPU {index}", f"{says}, {free:.0f} of {total:.0f} GiB free")
    elif listed := visible_gpus():
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
        todo = "install a driver that is new enough for it, or a torch that is built for this driver"
        yield Finding(BROKEN, "GPU", f"nvidia-smi lists {len(listed)}, and {built} finds none: {todo}")
    else:
        yield Finding(NOTE, "GPU", "none here; device cpu runs, device cuda does not")


def _backends() -> Iterator[Finding]:
    import torch

    from scspec.sc.golden import TOLERANCE, worst_error
    from scspec.sc.matmul import BACKENDS, GPU_BACKENDS

    for backend in BACKENDS:
        topic, device = f"backend {backend}", "cuda" if backend in GPU_BACKENDS else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            yield Finding(NOTE, topic, "needs a GPU, not tested")
            continue
        try:
            error = worst_error(backend, device)
        except Exception as fault:  # whatever a compiler or driver raises is what is to be found here
            yield Finding(BROKEN, topic, f"fails: {type(fault).__name__}: {fault}")
        else:
            yield _compared(topic, error, TOLERANCE)


def _published_kernels() -> Iterator[Finding]:
    if importlib.util.find_spec("scmp_kernels") is None:
        return
    import torch

    from scspec.sc.golden import TOLERANCE, golden_cases, matmul_error

    if not torch.cuda.is_available():
        yield Finding(NOTE, "scmp_kernels", "installed; it needs a GPU, not compared")
        return
    try:
        from scmp_kernels.sc import sc_matmul

        error = max(matmul_error(case, sc_matmul, "cuda") for case in golden_cases())
    except Exception as fault:  # a package that is not ours
        yield Finding(NOTE, "scmp_kernels", f"not compared, it fails: {type(fault).__name__}: {fault}")
    else:
        yield _compared("scmp_kernels", error, TOLERANCE)


def _compared(topic: str, error: float, tolerance: float) -> Finding:
    if error <= tolerance:
        return Finding(OK, topic, f"meets the golden vectors (off by {error:.1e} at most)")
    return Finding(BROKEN, topic, f"off the golden vectors by {error:.1e}, allowed {tolerance:.0e}: do not use it here")


def _slurm() -> Iterator[Finding]:
    """None of it is needed to run on this machine alone."""
    if not any(map(shutil.which, ("sinfo", "sbatch"))):
        yield Finding(NOTE, "Slurm", "not here; snakemake --profile slurm needs it, snakemake --cores all does not")
        return
    for command in (["sinfo", "--noheader", "--format=%P %D %t"], ["sbatch", "--version"]):
        fault, said = _said(command)
        if fault:
            yield Finding(NOTE, "Slurm", f"{fault}; snakemake --profile slurm needs a login node on which it answers")
            return
        yield Finding(OK, command[0], _listed(said))
    fault, _ = _said(["sacct", "--noheader", "--allocations", "--starttime=now"])
    says = f"{fault}; not needed, only how a job ended is known for a shorter time" if fault else "answers"
    yield Finding(NOTE if fault else OK, "sacct", says)


def _listed(said: str) -> str:
    """Return lines as one: partitions with nodes and their state."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    return ", ".join(lines[:6]) + (f" and {len(lines) - 6} more" if len(lines) > 6 else "")


def _said(command: list[str]) -> tuple[str, str]:
    """Return (what went wrong, or nothing; what the command printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        return f"{command[0]} is not here", ""
    except subprocess.TimeoutExpired:
        return f"{command[0]} has not answered for {COMMAND_TIMEOUT_S} s", ""
    if done.returncode:
        return f"{command[0]} says: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}", ""
    return "", done.stdout.strip()


def _models() -> Iterator[Finding]:
    for model in models_here():
        if model.folder:
            yield Finding(OK, f"model {model.name}", f"{model.size_bytes / 1e9:.2f} GB in {model.folder}")
        else:
            yield Finding(NOTE, f"model {model.name}", f"not here yet; fetch it: scspec models fetch {model.name}")


def _folders(results: Path) -> Iterator[Finding]:
    on_cluster = bool(shutil.which("sbatch")) and not _said(["sbatch", "--version"])[0]
    for topic, folder in (("results", results.absolute()), ("model cache", cache_folder().absolute())):
        here = next(path for path in (folder, *folder.parents) if path.exists())
        kind = _file_system(here)
        try:
            tempfile.TemporaryFile(dir=here).close()
            free_gb = shutil.disk_usage(here).free / 1e9
        except OSError as error:
            todo = "choose another folder, or have it opened to you"
            yield Finding(BROKEN, topic, f"{here} cannot be written: {error.strerror}; {todo}")
            continue
        enough = free_gb >= MIN_FREE_GB
        says = f"{folder} on {kind}, {free_gb:.1f} GB free"
        yield Finding(OK if enough else BROKEN, topic, says if enough else f"{says}, needs {MIN_FREE_GB:g}: make room")
        if on_cluster and not _SHARED.search(kind):
            hint = f"{kind} is likely this machine's own disk; nodes must see the same folder under the same path"
            todo = " (SCSPEC_CACHE, HF_HOME)" if topic == "model cache" else ""
            yield Finding(NOTE, topic, f"{folder}: {hint}{todo}")


def _file_system(path: Path) -> str:
    """Return the type of the file system that `path` lies on, as /proc/mounts has it, else "unknown"."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []
    found = [line.split()[1:3] for line in lines]
    holding = [(len(point), kind) for point, kind in found if path.is_relative_to(point.replace("\\040", " "))]
    return max(holding)[1] if holding else "unknown"
