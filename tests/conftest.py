"""Fixtures that tests share: the real model, loaded once."""

import os

import numba
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported and when kernels are defined

from interpreter import correct_bfloat16

from scspec.models import load_model, load_tokenizer

MODEL = "smollm2-135m"
correct_bfloat16()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread unless a test asks for more: two that share a busy core wait for each other."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


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
