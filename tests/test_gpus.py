"""Claims on GPUs: processes that claim at once, wait and are killed; what CUDA_VISIBLE_DEVICES leaves of a machine."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_gpus import UUIDS, fake_nvidia_smi

from scspec.cli import main
from scspec.gpus import claim_gpus, visible_gpus

CLAIM = """
import os, sys
from scspec.gpus import claim_gpus
print("ready", flush=True)
sys.stdin.readline()
claimed = claim_gpus(int(sys.argv[1]), int(sys.argv[2]))
assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(claimed)
print(*claimed, flush=True)
sys.stdin.readline()
"""


class Claimer:
    """A process that claims when it is told to, and has what it claimed until it is ended."""

    def __init__(self, environment: dict[str, str], count: int, cells_per_gpu: int) -> None:
        command = [sys.executable, "-c", CLAIM, str(count), str(cells_per_gpu)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.watchdog = threading.Timer(60, self.process.kill)  # then what a test waits for is an empty line
        self.watchdog.start()

    def go(self) -> None:
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def claimed(self) -> list[str]:
        """Return what was claimed; waits for it."""
        return self.process.stdout.readline().split()

    def end(self, by: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(by)
        self.process.communicate()
        self.watchdog.cancel()


@pytest.fixture
def claimers(tmp_path: Path) -> Iterator[Callable[..., list[Claimer]]]:
    """A function that has so many processes claim at once, on a machine of so many GPUs."""
    started = []

    def start(number: int, *, gpus: int, count: int = 1, cells_per_gpu: int = 1, **environment: str) -> list[Claimer]:
        here = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        here |= fake_nvidia_smi(tmp_path, gpus) | environment
        new = [Claimer(here, count, cells_per_gpu) for _ in range(number)]
        started.extend(new)
        for claimer in new:
            claimer.go()
        return new

    yield start
    for claimer in started:
        claimer.end()


@pytest.mark.parametrize(
    ("number", "count", "cells_per_gpu", "gpus"), [(3, 1, 1, 3), (2, 2, 1, 4), (6, 1, 2, 3), (3, 2, 2, 3)]
)
def test_a_gpu_has_as_many_cells_as_may_share_it(
    claimers: Callable, number: int, count: int, cells_per_gpu: int, gpus: int
) -> None:
    claims = [c.claimed() for c in claimers(number, gpus=gpus, count=count, cells_per_gpu=cells_per_gpu)]
    assert all(len(set(claim)) == count for claim in claims)
    assert Counter(gpu for claim in claims for gpu in claim) == dict.fromkeys(UUIDS[:gpus], cells_per_gpu)


def test_a_gpu_that_nobody_has_goes_before_one_that_would_be_shared(claimers: Callable) -> None:
    claims = [claimers(1, gpus=3, cells_per_gpu=2)[0].claimed() for _ in range(4)]
    assert {gpu for (gpu,) in claims[:3]} == set(UUIDS[:3])


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_who_comes_late_waits_and_has_what_an_ended_process_leaves(claimers: Callable, by: signal.Signals) -> None:
    early = claimers(2, gpus=2)
    claims = [claimer.claimed() for claimer in early]
    (late,) = claimers(1, gpus=2)
    waits = "gpus=1: waiting until other cells end; too few GPUs are free (2 visible, cells_per_gpu=1)\n"
    assert late.process.stderr.readline() == waits
    early[1].end(by)
    assert late.claimed() == claims[1]


def test_a_claim_of_several_takes_all_or_none(claimers: Callable) -> None:
    """One that held the free GPU while it waits for another would keep it from those whom one is enough for."""
    first = claimers(1, gpus=2)[0].claimed()
    (pair,) = claimers(1, gpus=2, count=2)
    assert "waiting" in pair.process.stderr.readline()
    assert {*first, *claimers(1, gpus=2)[0].claimed()} == set(UUIDS[:2])


def test_claims_stay_within_what_the_process_may_see(claimers: Callable) -> None:
    claims = [c.claimed() for c in claimers(2, gpus=4, CUDA_VISIBLE_DEVICES=f"3,{UUIDS[1]}")]
    assert {gpu for (gpu,) in claims} == {UUIDS[1], UUIDS[3]}


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, on a machine that has three GPUs."""
    for key, value in fake_nvidia_smi(tmp_path, 3).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, UUIDS[:3]),
        ("1", [UUIDS[1]]),
        ("2,0", [UUIDS[2], UUIDS[0]]),
        ("2, 0", [UUIDS[2], UUIDS[0]]),
        (UUIDS[1], [UUIDS[1]]),
        ("GPU-bbbb,2", UUIDS[1:3]),
        ("0,0", [UUIDS[0]]),
        ("0,7,1", [UUIDS[0]]),  # CUDA stops at the first that is not there
        ("GPU-", []),  # could be any
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),  # Slurm, for a job without GPUs
        ("MIG-9a6d3a5f-0000-1111-2222-333344445555", ["MIG-9a6d3a5f-0000-1111-2222-333344445555"]),
        (f"MIG-{UUIDS[0]}/1/0,1", [f"MIG-{UUIDS[0]}/1/0", UUIDS[1]]),
    ],
)
def test_what_cuda_visible_devices_leaves(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected


def test_a_mig_instance_is_claimed_like_a_gpu(claimers: Callable) -> None:
    old_name = f"MIG-{UUIDS[0]}/1/0"
    (first,) = claimers(1, gpus=1, CUDA_VISIBLE_DEVICES=old_name)
    assert first.claimed() == [old_name]
    (second,) = claimers(1, gpus=1, CUDA_VISIBLE_DEVICES=old_name)
    assert "waiting" in second.process.stderr.readline()


def test_no_nvidia_smi_is_no_gpu_and_one_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path, 0)["PATH"])
    assert visible_gpus() == []
    assert capsys.readouterr().err == "nvidia-smi: No devices were found\n"


def test_a_gpu_that_nvidia_smi_cannot_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path, 2)["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(program.read_text().replace(UUIDS[0], "[Unknown Error]"))
    assert visible_gpus() == [UUIDS[1]]


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(("visible", "shown", "room"), [(None, "is not set", 3), ("0,2", "is '0,2'", 2)])
def test_more_than_are_visible_is_one_line(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, shown: str, room: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    message = rf"^gpus=4: nvidia-smi lists {room} .*CUDA_VISIBLE_DEVICES {shown}\); allowed .*: 1\.\.{room}$"
    with pytest.raises(ValueError, match=message):
        claim_gpus(4, 1)


def test_the_command_line_refuses_no_cells_per_gpu(capsys: pytest.CaptureFixture) -> None:
    assert main(["run-cell", "{}", "--output", "cell.parquet", "--cells-per-gpu", "0"]) == 2
    assert "Invalid value for '--cells-per-gpu'" in capsys.readouterr().err
