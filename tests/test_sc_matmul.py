"""`sc_matmul` against the published kernels' golden vectors and against a loop over single bits (`brute_force`)."""

import brute_force
import numpy as np
import pytest
import torch
from interpreter import DEVICE

from scspec import sc_matmul
from scspec.sc.encoding import encode, encode_causal
from scspec.sc.golden import PATH, TOLERANCE, golden_cases
from scspec.sc.matmul import GPU_BACKENDS, backend_module, chunk_slices
from scspec.sc.streams import resolve_streams

GOLDEN_CASES = 54
RANDOM_CASES = 200
BACKENDS = ("reference", "cpu", "triton")

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def multiply(a, b, granularity="per_row", *, backend, **knobs):
    """Return sc_matmul of CPU tensors, computed where the backend works, as a CPU tensor."""
    device = device_of(backend)
    knobs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in knobs.items()}
    return sc_matmul(a.to(device), b.to(device), granularity, backend=backend, **knobs).cpu()


def counts(a_codes, b_codes, spec, backend):
    """Return the backend's counts of CPU tensors, as a CPU tensor."""
    device = device_of(backend)
    return backend_module(backend).counts(a_codes.to(device), b_codes.to(device), spec).cpu()


def device_of(backend):
    return DEVICE if backend in GPU_BACKENDS else torch.device("cpu")


def test_golden_cases_are_complete():
    with np.load(PATH) as file:
        assert set(file.files) == {"cases", *(f"{name}{i}" for name in "aby" for i in range(GOLDEN_CASES))}
    assert len(golden_cases()) == GOLDEN_CASES


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", golden_cases(), ids=range(GOLDEN_CASES))
def test_golden_case(case, backend):
    out = multiply(case.a, case.b, backend=backend, **case.knobs)
    assert out.dtype == torch.float32
    assert case.error(out) <= TOLERANCE


# ---------------------------------------------------------------------------------------------- random cases

KINDS = (
    "per_row",
    "grouped",
    "chunked",
    "unipolar",
    "per_tensor",
    "per_head",
    "causal",
    "batched",
    "long",
    "smoothed",
)


def random_case(seed):
    """Return (kind, a, b, knobs) as numpy float32 arrays and sc_matmul's keyword arguments."""
    rng = np.random.default_rng(seed)
    kind, sc_prec = KINDS[seed % len(KINDS)], 2 + seed // len(KINDS) % 7
    base = 2**sc_prec
    knobs = {"sc_prec": sc_prec, "stoc_len": [1, base, int(rng.integers(1, base + 1))][int(rng.integers(3) + 1) % 3]}
    if rng.random() < 0.2:
        del knobs["stoc_len"]
    if rng.random() < 0.4:
        knobs["rng_levels"] = 2 ** int(rng.integers(1, sc_prec + 1))
    knobs["halve_bipolar_stoc_len"] = bool(rng.random() < 0.5)
    rows, columns, depth = (int(rng.integers(1, high)) for high in (8, 8, 40))
    heads = ()
    if kind == "grouped":
        knobs |= {"group_a": int(rng.integers(1, 4)), "group_b": int(rng.integers(1, 4))}
        rows, columns = knobs["group_a"] * int(rng.integers(1, 4)), knobs["group_b"] * int(rng.integers(1, 4))
    if kind in ("chunked", "smoothed"):
        depth = int(rng.integers(1, 200))
        knobs["chunk_d"] = int(rng.integers(1, depth + 20))
    if kind in ("unipolar", "per_tensor") or (kind in ("grouped", "chunked", "batched") and rng.random() < 0.3):
        knobs["mode"] = "unipolar" if kind == "unipolar" or rng.random() < 0.3 else "bipolar"
        knobs["chunk_d"] = int(rng.integers(0, depth + 5)) * int(kind != "batched")
    if kind in ("per_tensor", "per_head", "causal"):
        knobs["granularity"] = kind
    if kind == "unipolar":
        knobs["granularity"] = ["per_row", "per_tensor"][int(rng.integers(2))]
    if kind == "per_head" or kind == "batched" or (kind in ("per_tensor", "causal") and rng.random() < 0.4):
        heads = (int(rng.integers(1, 4)),)
        knobs.pop("chunk_d", None)
    if kind == "long":
        rows, columns, depth = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(257, 700))
    a, b = _values(rng, (*heads, rows, depth)), _values(rng, (*heads, columns, depth))
    if kind == "causal":
        a = np.abs(a) if rng.random() < 0.7 else a
        a[..., 0, :] *= rng.random() < 0.8  # an all-zero row now and then
    if kind == "smoothed":
        knobs["smooth_scales"] = rng.lognormal(0, 1, depth).astype(np.float32)
    return kind, a, b, knobs


def _values(rng, shape):
    """Return float32 values of one of several characters: smooth, heavy-tailed, on rounding ties, tiny, one-sided."""
    x = rng.standard_normal(shape)
    character = rng.integers(6)
    if character == 1:
        x = x**5
    elif character == 2:
        x = np.rint(4 * x) / 2
    elif character == 3:
        x = x * 10.0 ** rng.integers(-9, 3)
    elif character == 4:
        x = np.abs(x) + 0.5
    elif character == 5:
        x = x * (rng.random(shape) < 0.3)
    return x.astype(np.float32)


def test_random_cases_cover_the_space():
    cases = [random_case(seed) for seed in range(RANDOM_CASES)]
    knobs = [case[3] for case in cases]
    for kind in KINDS:
        assert {k["sc_prec"] for (name, *_), k in zip(cases, knobs, strict=True) if name == kind} >= {2, 5, 8}
    assert {k.get("mode", "bipolar") for k in knobs} == {"bipolar", "unipolar"}
    assert {k.get("granularity", "per_row") for k in knobs} == {"per_row", "per_tensor", "per_head", "causal"}
    lengths = [k["stoc_len"] / 2 ** k["sc_prec"] for k in knobs if "stoc_len" in k]
    assert lengths.count(1.0) >= 20
    assert sum(k.get("stoc_len") == 1 for k in knobs) >= 20
    assert sum("rng_levels" in k for k in knobs) >= 50
    assert any(k.get("chunk_d", 0) > a.shape[-1] for _, a, _, k in cases)
    assert any(k.get("chunk_d", 0) and a.shape[-1] % k["chunk_d"] for _, a, _, k in cases)
    assert sum(a.shape[-1] > 2 ** k["sc_prec"] for _, a, _, k in cases) >= 50
    assert any(k.get("mode") == "unipolar" and k.get("chunk_d") and k["sc_prec"] == 8 for k in knobs)


@pytest.mark.parametrize("seed", range(RANDOM_CASES))
def test_random_case_against_single_bits(seed):
    _, a, b, knobs = random_case(seed)
    expected = brute_force.matmul(a, b, **knobs)
    assert_counts_equal(a, b, knobs, expected)
    tensors = {"smooth_scales": torch.from_numpy(knobs["smooth_scales"])} if "smooth_scales" in knobs else {}
    outs = [
        multiply(torch.from_numpy(a), torch.from_numpy(b), backend=backend, **{**knobs, **tensors})
        for backend in BACKENDS
    ]
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    assert outs[0].shape == expected.value.shape
    assert (np.abs(outs[0].numpy() - expected.value) <= expected.tolerance).all()


def assert_counts_equal(a, b, knobs, expected):
    """Both the codes and each backend's integer sums of them are those of the single bits."""
    names = ("mode", "sc_prec", "stoc_len", "rng_levels", "halve_bipolar_stoc_len")
    spec = resolve_streams(**{name: knobs[name] for name in names if name in knobs})
    granularity = knobs.get("granularity", "per_row")
    if "smooth_scales" in knobs:
        a, b = a / knobs["smooth_scales"], b * knobs["smooth_scales"]
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    slices = chunk_slices(a.shape[-1], knobs.get("chunk_d", 0))
    heads = a.shape[0] if a.ndim == 3 else 1
    assert len(expected.parts) == len(slices) * heads
    for part in expected.parts:
        columns = slices[part.chunk]
        if granularity == "causal":
            pair = encode_causal(a[..., columns], b[..., columns], spec)
        else:
            groups = knobs.get("group_a", 1), knobs.get("group_b", 1)
            pair = [encode(x[..., columns], spec, granularity, g) for x, g in zip((a, b), groups, strict=True)]
        codes = [x.codes[part.head] if x.codes.ndim == 3 else x.codes for x in pair]
        for ours, theirs in zip(codes, (part.a_codes, part.b_codes), strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs)
        for backend in BACKENDS:
            sums = counts(*codes, spec, backend)
            assert sums.dtype == torch.int32
            np.testing.assert_array_equal(sums.numpy(), part.sums)


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize("sc_prec", [2, 3, 4])
def test_every_code_length_and_grid(sc_prec, mode):
    # of the interpreter, which needs 0.3 s a product, only the smallest precision is asked
    backends = [b for b in BACKENDS if b not in GPU_BACKENDS or DEVICE.type == "cuda" or sc_prec == 2]
    q = brute_force.largest(mode, sc_prec)
    codes = np.arange(-q if mode == "bipolar" else 0, q + 1)
    for depth in (1, 2**sc_prec + 1):  # the first stream alone; every stream, the first one twice
        operand = np.repeat(codes[:, None], depth, axis=1)
        for cycles in range(1, 2**sc_prec + 1):
            for grid in (2**i for i in range(1, sc_prec + 1)):
                spec = resolve_streams(mode, sc_prec, cycles, grid)
                expected = brute_force.count_ones(operand, operand, sc_prec, cycles, grid, q)
                tensor = torch.from_numpy(operand.astype(np.int16))
                for backend in backends:
                    np.testing.assert_array_equal(counts(tensor, tensor, spec, backend).numpy(), expected)


def test_gate_by_hand():
    """p = 2, L = 4, one dimension: both streams are 0, 2, 3, 1 (see test_sc_streams). Bipolar: q = 1, B = 4."""
    assert brute_force.count_ones(np.array([[1], [-1], [0]]), np.array([[1]]), 2, 4, 4, 1).tolist() == [[4], [-4], [0]]
    # Unipolar q = 3, B = 0, 1, 3, 4. a = 2 has the bits 1 1 0 1: three ones. They let the first three levels of b out:
    # 0, 2, 3, of which one is below 1 (b = 1), two are below 3 (b = 2) and three below 4 (b = 3).
    assert brute_force.count_ones(np.array([[2]]), np.array([[1], [2], [3]]), 2, 4, 4, 3).tolist() == [[1, 2, 3]]


# ---------------------------------------------------------------------------------------------- extreme operands

DEPTHS = (64, 128, 200, 576, 1536)


@each_backend
@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("depth", DEPTHS)
def test_saturated_codes_count_every_cycle(backend, stoc_len, depth):
    """128 overflows int8, 128 * 256 overflows int16, 64 * 256 just fits a packed field; four rows share a word."""
    signs = torch.tensor([1, -1, 1, -1, -1], dtype=torch.int16)[:, None]
    a, b = 127 * signs.expand(5, depth), 127 * signs[:2].expand(2, depth)
    spec = resolve_streams("bipolar", 8, stoc_len)
    expected = (signs * signs[:2].T).int() * depth * stoc_len
    assert torch.equal(counts(a, b, spec, backend), expected)
    ones = torch.full((2, depth), 255, dtype=torch.int16)
    spec = resolve_streams("unipolar", 8, stoc_len)
    assert torch.equal(counts(ones, ones, spec, backend), torch.full((2, 2), depth * stoc_len).int())


@each_backend
@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("chunk_d", [0, 128])
@pytest.mark.parametrize("depth", DEPTHS)
def test_saturated_operands_multiply_exactly(backend, stoc_len, chunk_d, depth):
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])[:, None]
    out = multiply(
        signs.expand(5, depth), signs[:2].expand(2, depth), stoc_len=stoc_len, chunk_d=chunk_d, backend=backend
    )
    exact = signs * signs[:2].T * depth
    # each scale 1 / 127 rounds once (2), and so do the product's C + 4 operations: see brute_force._tolerance
    roundings = 2 + 4 + (-(-depth // chunk_d) if chunk_d else 1)
    assert ((out - exact).abs() <= 1.01 * roundings * 2.0**-24 * depth).all()


@each_backend
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor", "causal"])
def test_all_zeros(backend, granularity):
    zeros, ones = torch.zeros(3, 7), torch.ones(2, 7)
    for a, b in ((zeros, zeros), (zeros, ones), (ones, zeros)):
        out = multiply(a, b, granularity, stoc_len=100, backend=backend)
        assert torch.equal(out, torch.zeros(a.shape[0], b.shape[0]))


@each_backend
def test_zero_row_in_unipolar_mode(backend):
    a = np.concatenate([np.zeros((1, 9)), np.ones((1, 9)), -np.ones((1, 9))]).astype(np.float32)
    expected = brute_force.matmul(a, a, mode="unipolar")
    out = multiply(torch.from_numpy(a), torch.from_numpy(a), mode="unipolar", backend=backend)
    assert (np.abs(out.numpy() - expected.value) <= expected.tolerance).all()
    assert torch.equal(out[0], torch.zeros(3))


@each_backend
def test_one_huge_value_leaves_only_itself(backend):
    a = torch.linspace(-3, 3, 70).repeat(5, 1)
    a[2, 33] = -1e30
    codes = encode(a, resolve_streams(), "per_row").codes
    assert codes[2].nonzero().tolist() == [[33]]
    assert codes[2, 33] == -127
    out = multiply(a, torch.eye(70), stoc_len=256, backend=backend)
    assert torch.isfinite(out).all()
    assert out[2].nonzero().tolist() == [[33]]


@each_backend
@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("columns", [1, 3])
def test_rows_do_not_depend_on_their_neighbours(backend, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, 130, generator=generator), torch.randn(columns, 130, generator=generator)
    knobs = {"stoc_len": 96, "chunk_d": 64, "backend": backend}
    together = multiply(a, b, **knobs)
    alone = torch.cat([multiply(row[None], b, **knobs) for row in a])
    assert torch.equal(together, alone)


def test_operands_are_left_as_they_were():
    a, b = torch.randn(3, 40), torch.randn(2, 40)
    kept = a.clone(), b.clone()
    sc_matmul(a, b, smooth_scales=torch.full((40,), 2.0))
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


@each_backend
def test_strides_do_not_matter(backend):
    a, b = torch.randn(20, 6).T, torch.randn(4, 40)[:, ::2]
    assert torch.equal(
        multiply(a, b, stoc_len=77, backend=backend),
        multiply(a.contiguous(), b.contiguous(), stoc_len=77, backend=backend),
    )
