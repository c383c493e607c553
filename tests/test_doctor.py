"""What the doctor finds, in a machine that is faked where it has to be; it never fetches."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_gpus import fake_nvidia_smi
from test_inventory import FakeModel

from scspec import aliases, doctor, sc_matmul
from scspec.cli import main
from scspec.doctor import BROKEN, NOTE, OK, examine
from scspec.sc import golden
from scspec.sc.golden import GoldenCase


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One without Slurm, GPU or models; its folder of programs. Two golden cases stand for all."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = golden.golden_cases()
    monkeypatch.setattr(golden, "golden_cases", lambda: [cases[30], cases[48]])
    monkeypatch.setattr(golden, "LINEAR_CASES", 1)
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def program(machine: Path, name: str, script: str) -> None:
    (machine / name).write_text(f"#!/bin/sh\n{script}\n")
    (machine / name).chmod(0o755)


def found(results: Path = Path("results")) -> dict[str, tuple[str, str]]:
    """Return {topic: (state, what it says)}; of several findings on a topic, the last."""
    return {finding.topic: (finding.state, finding.says) for finding in examine(results)}


def test_a_machine_with_all_that_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--results", str(tmp_path / "results")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith(BROKEN)]
    starts = ("Python", "packages", "backend reference", "backend cpu", "results", "model cache")
    assert all(any(line.startswith(f"{OK:7} {topic}: ") for line in lines) for topic in starts)
    topics = ("GPU", "backend triton", "backend cuda", "Slurm", "model smollm2-135m", "model smollm2-distilled")
    assert all(any(line.startswith(f"{NOTE:7} {topic}: ") for line in lines) for topic in topics)
    assert "scspec models fetch smollm2-135m" in "\n".join(lines)
    assert not (tmp_path / "cache").exists()


def test_packages_that_are_missing_or_out_of_range_are_each_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    versions = {"numpy": "1.0", "typer": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{BROKEN:7} numpy: 1.0, needs >=1.26; {doctor.INSTALL}" in lines
    assert f"{BROKEN:7} typer: not installed, needs <1,>=0.29; {doctor.INSTALL}" in lines
    assert not any(": 26 in" in line for line in lines)


def test_another_python_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    state, says = found()["Python"]
    assert (state, says.split(":")[0]) == (BROKEN, "3.9.1, needs >=3.11")


def test_a_package_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_gpus", broken)
    state, says = found()["GPU"]
    assert state == BROKEN
    assert "libtorch.so" in says


def test_a_backend_that_counts_wrongly_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GoldenCase.error
    monkeypatch.setattr(GoldenCase, "error", lambda case, out: plain(case, out * 1.0001))
    assert found()["backend cpu"][0] == BROKEN
    assert "off the golden vectors by 1.0e-04, allowed 1e-05" in found()["backend reference"][1]


def test_a_backend_that_gives_nan_or_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GoldenCase.error
    monkeypatch.setattr(GoldenCase, "error", lambda case, out: plain(case, out * float("nan")))
    assert found()["backend cpu"][0] == BROKEN

    def failing(backend: str, device: str) -> float:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(golden, "worst_error", failing)
    assert found()["backend cpu"] == (BROKEN, "fails: RuntimeError: no kernel image is available")


def test_the_packed_layers_are_tested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What models run on, which sc_matmul does not use."""
    monkeypatch.setattr(golden, "linear_error", lambda *_: 0.5)
    assert found()["backend cpu"][0] == BROKEN
    assert found()["backend reference"][0] == OK


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "mem_get_info": (60 * 2**30, 80 * 2**30),
        "get_device_name": "A card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(golden, "worst_error", lambda backend, device: {"cpu": 0.0, "cuda": 1e-7}[device])


def test_a_gpu_is_named_with_driver_capability_and_memory(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    program(machine, "nvidia-smi", "echo 580.1")
    with_gpu(monkeypatch)
    says = "A card, compute capability 9.0, driver 580.1, 60 of 80 GiB free"
    assert found()["GPU 0"] == (OK, says)
    assert found()["backend cuda"] == (OK, "meets the golden vectors (off by 1.0e-07 at most)")


def test_a_gpu_that_torch_does_not_find_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "smi", 2)["PATH"] + ":/usr/bin:/bin")
    state, says = found()["GPU"]
    assert state == BROKEN
    assert says.startswith("nvidia-smi lists 2, and torch ")


@pytest.mark.parametrize(
    ("matmul", "state", "says"),
    [
        (sc_matmul, OK, "meets the golden vectors"),
        (lambda a, b, **knobs: sc_matmul(a, b, **knobs) * 1.01, BROKEN, "off the golden vectors by 1.0e-02"),
        (lambda a, b, **knobs: 1 / 0, NOTE, "not compared, it fails: ZeroDivisionError"),
    ],
)
def test_the_published_kernels_are_compared_where_they_are(monkeypatch, matmul, state, says) -> None:
    package, module = ModuleType("scmp_kernels"), ModuleType("scmp_kernels.sc")
    package.__spec__ = module.__spec__ = SimpleNamespace(name="scmp_kernels")
    module.sc_matmul = matmul
    assert "scmp_kernels" not in found()
    monkeypatch.setitem(sys.modules, "scmp_kernels", package)
    monkeypatch.setitem(sys.modules, "scmp_kernels.sc", module)
    assert found()["scmp_kernels"][0] == NOTE  # no GPU
    with_gpu(monkeypatch)
    plain = golden.matmul_error
    monkeypatch.setattr(golden, "matmul_error", lambda case, matmul, _: plain(case, matmul, "cpu"))
    assert found()["scmp_kernels"][0] == state
    assert found()["scmp_kernels"][1].startswith(says)


def test_slurm_that_answers_and_slurm_that_does_not(machine: Path, tmp_path: Path) -> None:
    program(machine, "sinfo", 'echo "gpu* 4 idle"; echo "cpu 2 down"')
    program(machine, "sbatch", "echo slurm 22.05")
    program(machine, "sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    here = found(tmp_path / "results")
    assert here["sinfo"] == (OK, "gpu* 4 idle, cpu 2 down")
    assert here["sbatch"] == (OK, "slurm 22.05")
    assert here["sacct"][0] == NOTE
    assert here["sacct"][1].startswith("sacct says: Slurm accounting storage is disabled; not needed")
    program(machine, "sinfo", "echo first >&2; echo sinfo: fatal: no configuration >&2; exit 1")
    here = found()
    assert here["Slurm"][0] == NOTE
    assert here["Slurm"][1].startswith("sinfo says: sinfo: fatal: no configuration; ")
    assert "sbatch" not in here


def test_a_command_that_hangs_is_given_up(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "sinfo", "exec /bin/sleep 60")
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.2)
    assert found()["Slurm"][1].startswith("sinfo has not answered for 0.2 s")


def test_models_that_are_here_are_listed_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "ALIASES", {"fake": FakeModel()})
    monkeypatch.setattr("scspec.inventory.ALIASES", aliases.ALIASES)
    folder = aliases.fetch_alias("fake")
    assert found()["model fake"] == (OK, f"0.00 GB in {folder}")


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    state, says = found(Path("/proc/results"))["results"]  # not even root can write there
    assert state == BROKEN
    assert says.startswith("/proc cannot be written: ")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0.4e9))
    assert found()["results"][1].endswith("0.4 GB free, needs 1: make room")


@pytest.mark.parametrize(("kind", "hinted"), [("ext4", True), ("nfs4", False), ("lustre", False), ("fuse.gpfs", False)])
def test_on_a_cluster_a_folder_of_this_machine_alone_is_pointed_out(machine, monkeypatch, kind, hinted) -> None:
    monkeypatch.setattr(doctor, "_file_system", lambda _: kind)
    assert not any("nodes must see" in finding.says for finding in examine(Path("results")))
    program(machine, "sbatch", "echo slurm 22.05")
    assert any("nodes must see" in finding.says for finding in examine(Path("results"))) == hinted


def test_the_file_system_is_that_of_the_longest_mount() -> None:
    assert doctor._file_system(Path("/proc/self")) == "proc"
