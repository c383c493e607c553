"""What `sc_matmul` and `resolve_streams` refuse: each message names the argument, its value and what is allowed."""

import math
from types import MappingProxyType

import numpy as np
import pytest
import torch

from scspec import sc_matmul
from scspec.sc.matmul import resolve_backend
from scspec.sc.streams import resolve_streams

NONE = MappingProxyType({})


def filled(value, *shape):
    x = torch.ones(*shape)
    x.view(-1)[-1] = value
    return x


def meta(*shape):
    return torch.empty(*shape, device="meta")


def product_of_ones(**arguments):
    return sc_matmul(torch.ones(2, 3), torch.ones(2, 3), **arguments)


#: stream arguments -> what the message must hold: name, value, allowed values
STREAMS = {
    "stoc_len 0": ({"stoc_len": 0}, ["stoc_len=0", "1 to 256"]),
    "stoc_len negative": ({"stoc_len": -3}, ["stoc_len=-3", "1 to 256"]),
    "stoc_len above 2**8": ({"stoc_len": 257}, ["stoc_len=257", "1 to 256", "2**sc_prec"]),
    "stoc_len above 2**5": ({"stoc_len": 33, "sc_prec": 5}, ["stoc_len=33", "1 to 32"]),
    "stoc_len bool": ({"stoc_len": True}, ["stoc_len=True", "int from 1 to 256"]),
    "stoc_len float": ({"stoc_len": 128.0}, ["stoc_len=128.0", "int from 1 to 256"]),
    "stoc_len nan": ({"stoc_len": math.nan}, ["stoc_len=nan", "int from 1 to 256"]),
    "stoc_len str": ({"stoc_len": "128"}, ["stoc_len='128'", "int from 1 to 256"]),
    "stoc_len list": ({"stoc_len": [128]}, ["stoc_len=[128]", "int from 1 to 256"]),
    "sc_prec 1": ({"sc_prec": 1}, ["sc_prec=1", "2 to 8"]),
    "sc_prec 9": ({"sc_prec": 9}, ["sc_prec=9", "2 to 8"]),
    "sc_prec float": ({"sc_prec": 8.0}, ["sc_prec=8.0", "2 to 8"]),
    "sc_prec None": ({"sc_prec": None}, ["sc_prec=None", "2 to 8"]),
    "rng_levels 3": ({"rng_levels": 3}, ["rng_levels=3", "power of two", "2 to 256"]),
    "rng_levels 1": ({"rng_levels": 1}, ["rng_levels=1", "power of two", "2 to 256"]),
    "rng_levels 512": ({"rng_levels": 512}, ["rng_levels=512", "power of two", "2 to 256"]),
    "rng_levels float": ({"rng_levels": 4.0}, ["rng_levels=4.0", "power of two", "2 to 256"]),
    "mode": ({"mode": "ternary"}, ["mode='ternary'", "'bipolar'", "'unipolar'"]),
    "mode None": ({"mode": None}, ["mode=None", "'bipolar'", "'unipolar'"]),
}


@pytest.mark.parametrize(("arguments", "named"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("function", [resolve_streams, product_of_ones])
def test_streams_are_refused(function, arguments, named):
    assert_names(named, function, **arguments)


@pytest.mark.parametrize(("value", "named"), [(-1, "-1"), (2**31, "2147483648"), (True, "True"), (0.5, "0.5")])
def test_sc_seed_is_refused(value, named):
    assert_names([f"sc_seed={named}", f"0 to {2**31 - 1}"], resolve_streams, sc_seed=value)


def test_numpy_integers_are_taken():
    assert resolve_streams(sc_prec=np.int64(8), stoc_len=np.int32(96)).stoc_len == 96


#: (a, b, arguments) -> what the message must hold
OPERANDS = {
    "1-D": (torch.ones(3), torch.ones(2, 3), NONE, ["a:", "(3,)", "(rows, D) or (H, rows, D)"]),
    "4-D": (torch.ones(2, 3), torch.ones(1, 1, 2, 3), NONE, ["b:", "(1, 1, 2, 3)", "(rows, D) or (H, rows, D)"]),
    "no rows": (torch.ones(0, 3), torch.ones(2, 3), NONE, ["a:", "(0, 3)", "none of them 0"]),
    "no depth": (torch.ones(2, 0), torch.ones(2, 0), NONE, ["a:", "(2, 0)", "none of them 0"]),
    "other depth": (torch.ones(2, 3), torch.ones(2, 4), NONE, ["b:", "(2, 4)", "(2, 3)", "must be equal"]),
    "other heads": (torch.ones(2, 2, 3), torch.ones(3, 2, 3), NONE, ["b:", "(3, 2, 3)", "(2, 2, 3)", "must be equal"]),
    "2-D with 3-D": (torch.ones(2, 3), torch.ones(1, 2, 3), NONE, ["b:", "(1, 2, 3)", "(2, 3)"]),
    "float64": (torch.ones(2, 3).double(), torch.ones(2, 3), NONE, ["a:", "torch.float64", "torch.float32"]),
    "float16": (torch.ones(2, 3), torch.ones(2, 3).half(), NONE, ["b:", "torch.float16", "torch.float32"]),
    "integers": (torch.ones(2, 3).int(), torch.ones(2, 3), NONE, ["a:", "torch.int32", "torch.float32"]),
    "numpy": (np.ones((2, 3), np.float32), torch.ones(2, 3), NONE, ["a:", "ndarray", "torch.float32"]),
    "NaN in a": (filled(math.nan, 2, 3), torch.ones(2, 3), NONE, ["a:", "NaN or Inf", "finite"]),
    "NaN in b": (torch.ones(2, 3), filled(math.nan, 2, 3), NONE, ["b:", "NaN or Inf", "finite"]),
    "Inf": (filled(math.inf, 2, 3), torch.ones(2, 3), NONE, ["a:", "NaN or Inf", "finite"]),
    "-Inf": (torch.ones(1, 2, 3), filled(-math.inf, 1, 2, 3), NONE, ["b:", "NaN or Inf", "finite"]),
    "two devices": (torch.ones(2, 3), meta(2, 3), NONE, ["b:", "meta", "a's device, cpu"]),
    "no default backend": (meta(2, 3), meta(2, 3), NONE, ["backend=None", "meta", "reference", "cpu"]),
    "cpu elsewhere": (meta(2, 3), meta(2, 3), {"backend": "cpu"}, ["backend='cpu'", "meta", "on the CPU"]),
}

TWO, THREE = (4, 6), (2, 4, 6)  # operands' shapes
#: (shape, arguments) -> what the message must hold
SCOPES = {
    "granularity": (TWO, {"granularity": "per_column"}, ["granularity='per_column'", "'per_row'", "'causal'"]),
    "granularity None": (TWO, {"granularity": None}, ["granularity=None", "'per_row'"]),
    "causal unipolar": (
        TWO,
        {"granularity": "causal", "mode": "unipolar"},
        ["mode='unipolar'", "'causal'", "'bipolar'"],
    ),
    "per_head unipolar": (
        THREE,
        {"granularity": "per_head", "mode": "unipolar"},
        ["mode='unipolar'", "'per_head'", "'bipolar'"],
    ),
    "per_head 2-D": (TWO, {"granularity": "per_head"}, ["granularity='per_head'", "(4, 6)", "(H, N, D)"]),
    "chunk_d negative": (TWO, {"chunk_d": -1}, ["chunk_d=-1", "0 (off) or more"]),
    "chunk_d float": (TWO, {"chunk_d": 2.0}, ["chunk_d=2.0", "int"]),
    "chunk_d bool": (TWO, {"chunk_d": True}, ["chunk_d=True", "int"]),
    "chunk_d None": (TWO, {"chunk_d": None}, ["chunk_d=None", "int"]),
    "chunk_d 3-D": (THREE, {"chunk_d": 2}, ["chunk_d=2", "2-D", "3-D"]),
    "chunk_d per_head": (THREE, {"chunk_d": 2, "granularity": "per_head"}, ["chunk_d=2", "'per_row'", "'per_head'"]),
    "chunk_d causal": (TWO, {"chunk_d": 2, "granularity": "causal"}, ["chunk_d=2", "'per_row'", "'causal'"]),
    "group_a": (TWO, {"group_a": 3}, ["group_a=3", "divides the 4 rows"]),
    "group_b": (TWO, {"group_b": 8}, ["group_b=8", "divides the 4 rows"]),
    "group_a 0": (TWO, {"group_a": 0}, ["group_a=0", "from 1"]),
    "group_b negative": (TWO, {"group_b": -2}, ["group_b=-2", "from 1"]),
    "group_a float": (TWO, {"group_a": 2.0}, ["group_a=2.0", "int"]),
    "group_a bool": (TWO, {"group_a": True}, ["group_a=True", "int"]),
    "group_a per_tensor": (
        TWO,
        {"group_a": 2, "granularity": "per_tensor"},
        ["group_a=2", "'per_row'", "'per_tensor'"],
    ),
    "group_b per_head": (THREE, {"group_b": 2, "granularity": "per_head"}, ["group_b=2", "'per_row'", "'per_head'"]),
    "group_b causal": (TWO, {"group_b": 2, "granularity": "causal"}, ["group_b=2", "'per_row'", "'causal'"]),
    "smooth shape": (TWO, {"smooth_scales": torch.ones(5)}, ["smooth_scales", "(5,)", "(6,)"]),
    "smooth 2-D": (TWO, {"smooth_scales": torch.ones(1, 6)}, ["smooth_scales", "(1, 6)", "(6,)"]),
    "smooth zero": (TWO, {"smooth_scales": filled(0.0, 6)}, ["smooth_scales", "finite and positive"]),
    "smooth negative": (TWO, {"smooth_scales": filled(-1.0, 6)}, ["smooth_scales", "finite and positive"]),
    "smooth NaN": (TWO, {"smooth_scales": filled(math.nan, 6)}, ["smooth_scales", "finite and positive"]),
    "smooth Inf": (TWO, {"smooth_scales": filled(math.inf, 6)}, ["smooth_scales", "finite and positive"]),
    "smooth float64": (TWO, {"smooth_scales": torch.ones(6).double()}, ["smooth_scales", "torch.float32", "(6,)"]),
    "smooth list": (TWO, {"smooth_scales": [1.0] * 6}, ["smooth_scales", "torch.float32", "(6,)"]),
    "smooth device": (TWO, {"smooth_scales": meta(6)}, ["smooth_scales", "meta", "cpu"]),
    "backend": (TWO, {"backend": "fpga"}, ["backend='fpga'", "reference", "cpu", "triton", "cuda"]),
    "backend empty": (TWO, {"backend": ""}, ["backend=''", "reference", "cpu"]),
}


@pytest.mark.parametrize(("a", "b", "arguments", "named"), OPERANDS.values(), ids=OPERANDS)
def test_operands_are_refused(a, b, arguments, named):
    assert_names(named, sc_matmul, a, b, **arguments)


@pytest.mark.parametrize(("shape", "arguments", "named"), SCOPES.values(), ids=SCOPES)
def test_scopes_are_refused(shape, arguments, named):
    assert_names(named, sc_matmul, torch.ones(shape), torch.ones(shape), **arguments)


def test_no_backend_is_chosen_for_an_unknown_device():
    assert_names(["backend=None", "meta", "reference", "triton"], resolve_backend, None, torch.device("meta"))


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_the_cpu_backend_stays_on_the_cpu(device):
    assert_names(["backend='cpu'", device, "CPU"], resolve_backend, "cpu", torch.device(device))
    assert resolve_backend("reference", torch.device(device)) == "reference"


def test_a_gpu_has_a_backend():
    assert resolve_backend(None, torch.device("cuda")) == "cuda"
    assert resolve_backend("triton", torch.device("cuda", 1)) == "triton"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gpu_backends_stay_on_a_gpu(backend, device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    named = [f"backend='{backend}'", "CUDA device", device]
    assert_names(named, resolve_backend, backend, torch.device(device))
    assert_names(named, sc_matmul, *(torch.ones(2, 3, device=device) for _ in range(2)), backend=backend)


def test_only_triton_has_an_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", torch.device("cpu")) == "triton"
    assert_names(["backend='cuda'", "CUDA device", "cpu"], resolve_backend, "cuda", torch.device("cpu"))


def test_group_sizes_may_differ():
    out = sc_matmul(torch.ones(4, 6), torch.ones(6, 6), group_a=2, group_b=3)
    assert out.shape == (4, 6)


def assert_names(named, function, *args, **kwargs):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the loop below says what to match
        function(*args, **kwargs)
    for part in named:
        assert part in str(error.value)
