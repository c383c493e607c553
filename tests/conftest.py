"""Fixtures that tests share (the real model, loaded once), and what becomes of GPU tests where there is no GPU."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported and when kernels are defined

from interpreter import DEVICE, correct_interpreter
from slurm_box import SlurmBox, skip, what_is_missing

from scspec.models import load_model, load_tokenizer
from scspec.sc import triton

MODEL = "smollm2-135m"
ON_SLURM = ("tests/test_slurm", "tests/test_executor")
correct_interpreter()
# A machine that is busy with other tests takes longer than hypothesis likes, which is no fault of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_xdist_make_scheduler(config, log):
    """With `pytest -n`, a file is one process's, and all that run on the Slurm that tests share are one's."""

    class FilesAndOneSlurm(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "slurm" if file.startswith(ON_SLURM) else file

    return FilesAndOneSlurm(config, log)


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With a GPU, a test marked gpu that skips has failed, unless it needs two and there is one."""
    report = yield
    excused = torch.cuda.device_count() == 1 and "needs 2 GPUs" in str(report.longrepr)
    if report.skipped and "gpu" in item.keywords and DEVICE.type != "cpu" and not excused:
        report.outcome, report.longrepr = "failed", f"skipped on a GPU: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter):
    """Say how many GPU tests were skipped; .ci/run compares the number with the one it knows."""
    if DEVICE.type == "cpu":
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
        terminalreporter.write_line(f"GPU tests skipped: {len(skipped)} (no GPU)")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread unless a test asks for more: two that share a busy core wait for each other."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


@pytest.fixture
def wide_steps(monkeypatch):
    """In the interpreter, which pays for each operation: more dimensions a step, fewer chunks ahead; the same bits."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton, "_DIMS", 128)
        monkeypatch.setattr(triton, "_AHEAD", 1)
        monkeypatch.setattr(triton, "_FINISHED", 128)


@pytest.fixture(scope="session")
def target():
    """SmolLM2-135M with default knobs: not to be changed."""
    return load_model(MODEL)


@pytest.fixture(scope="session")
def twin():
    """A second, separately loaded instance with the same knobs."""
    return load_model(MODEL)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def threads():
    """A function that sets torch's and numba's thread count; both are put back afterwards."""
    before = torch.get_num_threads(), numba.get_num_threads()

    def set_threads(count: int) -> None:
        torch.set_num_threads(count)
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))

    yield set_threads
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmBox]:
    """A Slurm of one node; Slurm's commands talk to it. Where it cannot be, tests skip; with CI=true they fail."""
    if reason := what_is_missing():
        skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # not pytest's: sockets have short names
    box = SlurmBox(folder)
    try:
        box.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", box.environment["SLURM_CONF"])
            yield box
    finally:
        box.stop()
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on Slurm no job is left, and its node is in service."""
    box = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if box:
        box.clear()
