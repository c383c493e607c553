"""The linear layers of the GPU backends: packed weights and floats, bit for bit, in the interpreter without a GPU.

More of their counts in `test_sc_matmul`: golden vectors, single bits. What `cuda` alone has is in `test_sc_cuda`.
"""

import itertools

import pytest
import torch
from compile_sm90 import compiled
from interpreter import DEVICE, DTYPES

from scspec import sc_matmul
from scspec.invariant import triton as invariant
from scspec.sc import cpu, reference, triton
from scspec.sc.device import CHUNK, PackedWeight, device_tables
from scspec.sc.encoding import encode
from scspec.sc.golden import LINEAR_CASES, TOLERANCE, golden_cases, linear_error
from scspec.sc.matmul import backend_module, chunk_slices
from scspec.sc.streams import resolve_streams
from scspec.sc.triton import ADD, SILU_MUL, STORE

LENGTHS = (1, 100, 128, 200, 256)
#: rows, outputs, depth: one and more groups of rows, blocks of outputs, chunks; none of them full, and all of them
SHAPES = [
    *[(1, 1, 1), (2, 31, 63), (3, 33, 65), (4, 130, 128), (5, 7, 200), (6, 11, 576)],
    *[(7, 32, 257), (8, 64, 129), (9, 160, 130), (17, 5, 64)],
]
MANY_ROWS = [(64, 40, 200), (65, 200, 130), (200, 33, 576)]

each_backend = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)])


def thinned(*axes):
    """Return the product of the axes: every fourth case for all; the rest, too many to interpret, for a GPU."""
    cases = enumerate(itertools.product(*axes))
    return [case if i % 4 == 0 else pytest.param(*case, marks=pytest.mark.gpu) for i, case in cases]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty returns is wrong until something writes it."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -12345)

    monkeypatch.setattr(torch, "empty", poisoned)


def operands(rows, outputs, depth, dtype=torch.float32, seed=0):
    """Return x (rows, depth) with saturated, tiny and zero rows among it, and weight (outputs, depth) float32."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(outputs, depth, generator=generator)
    x[1::5] = 3 * x[1::5].sign()
    x[2::5] = 0
    x[3::5] *= 1e-6
    weight[::3] = -weight[::3].sign()
    return x.to(dtype).to(DEVICE), weight.to(dtype).float().to(DEVICE)


def packed(weight, spec) -> PackedWeight:
    return triton.pack([encode(weight[:, s], spec, "per_row") for s in chunk_slices(weight.shape[1], CHUNK)], CHUNK)


def linear(backend, x, weight, spec, **options):
    return backend_module(backend).linear(x, weight, spec, **{"out_dtype": x.dtype, **options})


def specified(x, weight, stoc_len, bias=None):
    """Return x @ weight.T (+ bias) float32 as `sc_matmul` gives it on the CPU."""
    out = sc_matmul(x.float().cpu(), weight.cpu(), chunk_d=CHUNK, stoc_len=stoc_len, backend="cpu").to(DEVICE)
    return out if bias is None else out + bias.float()


@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
@pytest.mark.parametrize(
    "spec",
    [
        resolve_streams("bipolar", 8, 200),
        resolve_streams("bipolar", 8, 256),
        resolve_streams("bipolar", 5, 21, 16, sc_seed=7),
        resolve_streams("unipolar", 8, 256),
        resolve_streams("unipolar", 2, 3),
    ],
)
def test_counts_equal_the_reference(rows, outputs, depth, spec):
    generator = torch.Generator().manual_seed(rows)
    low = -spec.max_code if spec.mode == "bipolar" else 0
    a, b = (
        torch.randint(low, spec.max_code + 1, (count, depth), generator=generator, dtype=torch.int16)
        for count in (rows, outputs)
    )
    found = triton.counts(a.to(DEVICE), b.to(DEVICE), spec)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu(), reference.counts(a, b, spec))


@each_backend
@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize(("shape", "stoc_len", "dtype"), thinned(SHAPES, LENGTHS, DTYPES.values()), ids=str)
def test_linear_is_sc_matmul(backend, shape, stoc_len, dtype):
    x, weight = operands(*shape, dtype)
    spec = resolve_streams("bipolar", 8, stoc_len)
    bias = torch.linspace(-2, 2, shape[1], device=DEVICE).to(dtype) if shape[0] % 2 else None
    out = linear(backend, x, packed(weight, spec), spec, bias=bias)
    assert out.dtype == dtype
    assert torch.equal(out, specified(x, weight, stoc_len, bias).to(dtype))


@each_backend
@pytest.mark.parametrize(("sc_prec", "stoc_len", "grid"), [(2, 3, 4), (4, 16, 16), (7, 64, 64), (8, 32, 8)])
def test_linear_of_other_streams(backend, sc_prec, stoc_len, grid):
    x, weight = operands(5, 33, 200)
    for seed in (0, 11):
        spec = resolve_streams("bipolar", sc_prec, stoc_len, grid, sc_seed=seed)
        codes = [encode(weight.cpu()[:, s], spec, "per_row") for s in chunk_slices(200, CHUNK)]
        wanted = cpu.linear(x.cpu(), cpu.pack(codes, CHUNK), spec)
        assert torch.equal(linear(backend, x, packed(weight, spec), spec).cpu(), wanted)


@each_backend
@pytest.mark.parametrize("case", range(0, LINEAR_CASES, 3))
def test_linear_meets_the_golden_vectors(backend, case):
    assert linear_error(golden_cases()[case], backend, DEVICE) <= TOLERANCE


@each_backend
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
def test_linear_of_many_rows(backend, shape, stoc_len, dtype):
    x, weight = operands(*shape, dtype)
    spec = resolve_streams("bipolar", 8, stoc_len)
    assert torch.equal(linear(backend, x, packed(weight, spec), spec), specified(x, weight, stoc_len).to(dtype))


@each_backend
@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("depth", [64, 128, 576])
def test_saturated_codes_do_not_overflow(backend, stoc_len, depth):
    """Rows of equal and of opposite signs: whatever is packed side by side borrows from its neighbour."""
    signs = torch.tensor([1.0, 1, -1, -1, 1, -1, -1, -1, 1], device=DEVICE)[:, None]
    x, weight = signs.expand(9, depth).contiguous(), signs[1:4].expand(3, depth)
    spec = resolve_streams("bipolar", 8, stoc_len)
    for rows in (2, 4, 9):
        out = linear(backend, x[:rows], packed(weight, spec), spec)
        assert torch.equal(out, specified(x[:rows], weight, stoc_len))
        assert torch.equal(out.round(), signs[:rows] * signs[1:4].T * depth)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("outputs", "depth"), [(7, 130), (130, 129)])
@pytest.mark.usefixtures("wide_steps")
def test_rows_do_not_depend_on_their_neighbours(backend, outputs, depth, dtype):
    """Rows of odd width are not aligned when they stand alone."""
    x, weight = operands(9, outputs, depth, dtype)
    spec = resolve_streams("bipolar", 8, 96)
    prepared = packed(weight, spec)
    whole = linear(backend, x, prepared, spec)
    for count in (1, 2, 3, 5):
        assert torch.equal(linear(backend, x[:count], prepared, spec), whole[:count]), count
    for row in (1, 4, 8):
        assert torch.equal(linear(backend, x[row : row + 1], prepared, spec), whole[row : row + 1]), row


# ---------------------------------------------------------------------------------------------- finishes


@each_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 6, 70), (5, 34, 200), (3, 262, 128), (2, 64, 200)])
@pytest.mark.usefixtures("wide_steps")
def test_finishes_are_the_steps_apart(backend, rows, outputs, depth, biased, dtype):
    x, weight = operands(rows, outputs, depth, dtype)
    spec = resolve_streams("bipolar", 8, 128)
    prepared = packed(weight, spec)
    bias = torch.linspace(-1, 1, outputs, device=DEVICE).to(dtype) if biased else None
    product = linear(backend, x, prepared, spec, bias=bias, finish=STORE)
    assert torch.equal(product, specified(x, weight, 128, bias).to(dtype))
    addend = operands(rows, outputs, outputs, dtype, seed=1)[0][:, :outputs].contiguous()
    kept = addend.clone()
    added = linear(backend, x, prepared, spec, bias=bias, finish=ADD, addend=addend)
    assert torch.equal(added, addend + product)
    assert torch.equal(addend, kept)
    gated = linear(backend, x, prepared, spec, bias=bias, finish=SILU_MUL)
    assert gated.dtype == dtype
    assert torch.equal(gated, invariant.silu_mul(*product.chunk(2, dim=1)))


@pytest.mark.usefixtures("wide_steps")
def test_every_slab_of_rows_has_its_own_addend():
    x, weight = operands(67, 4, 40)
    spec = resolve_streams("bipolar", 8, 128)
    addend = torch.arange(67.0 * 4, device=DEVICE).view(67, 4)
    added = linear("triton", x, packed(weight, spec), spec, finish=ADD, addend=addend)
    assert torch.equal(added, addend + specified(x, weight, 128))


def test_the_sum_may_overwrite_its_addend():
    x, weight = operands(3, 9, 200)
    spec = resolve_streams("bipolar", 8, 128)
    prepared = packed(weight, spec)
    hidden = torch.ones(3, 9, device=DEVICE)
    parts = triton.segment_sums(x, prepared, device_tables(spec, DEVICE))
    triton.rescale(parts, prepared, spec, hidden, finish=ADD, addend=hidden)
    assert torch.equal(hidden, 1 + specified(x, weight, 128))


@each_backend
def test_logits_stay_float32(backend):
    x, weight = operands(3, 9, 200, torch.float16)
    spec = resolve_streams("bipolar", 8, 128)
    out = linear(backend, x, packed(weight, spec), spec, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out, specified(x, weight, 128))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_float_weight_finishes_the_same_way(backend, dtype):
    x, weight = operands(5, 34, 70, dtype)
    weight, bias = weight.to(dtype), torch.linspace(-1, 1, 34, device=DEVICE).to(dtype)
    product = invariant.linear(x, weight, dtype) + bias
    spec = resolve_streams()
    assert torch.equal(linear(backend, x, weight, spec, bias=bias), product)
    assert torch.equal(linear(backend, x, weight, spec, bias=bias, finish=ADD, addend=product), product + product)
    gated = linear(backend, x, weight, spec, bias=bias, finish=SILU_MUL)
    assert torch.equal(gated, invariant.silu_mul(*product.chunk(2, dim=1)))


# ---------------------------------------------------------------------------------------------- bad values, bad knobs


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy, where inf / inf is meant
@pytest.mark.usefixtures("wide_steps")
def test_not_a_number_comes_out_again(backend, rows, bad):
    """No check costs the model a pass over its data: a bad value must not leave its table, and must be seen."""
    x, weight = operands(rows, 33, 200)
    spec = resolve_streams("bipolar", 8, 128)
    prepared = packed(weight, spec)
    good = linear(backend, x, prepared, spec)
    x[0, 150] = bad
    out = linear(backend, x, prepared, spec)
    assert not torch.isfinite(out[0]).any()
    assert torch.equal(out[1:], good[1:])


@each_backend
def test_not_a_number_in_the_weight_comes_out_again(backend):
    x, weight = operands(2, 9, 200)
    spec = resolve_streams("bipolar", 8, 128)
    good = linear(backend, x, packed(weight, spec), spec)
    weight[3, 100] = float("nan")
    out = linear(backend, x, packed(weight, spec), spec)
    assert torch.isnan(out[:, 3]).all()
    kept = [m for m in range(9) if m != 3]
    assert torch.equal(out[:, kept], good[:, kept])


def test_only_chunks_of_128_are_packed():
    spec = resolve_streams()
    with pytest.raises(ValueError, match=r"chunk_d=64.*128"):
        triton.pack([encode(torch.ones(2, 64), spec, "per_row")], 64)


def test_packed_codes_lie_where_the_layout_says():
    spec = resolve_streams("bipolar", 8, 128)
    weight = operands(1, 37, 150)[1].cpu()
    prepared = packed(weight, spec)
    assert (prepared.outputs, prepared.depth, prepared.m_pad, prepared.chunks) == (37, 150, 64, 2)
    assert (prepared.codes.dtype, prepared.codes.shape) == (torch.uint8, (4, 64, 64))
    seen = torch.zeros(64, 256, dtype=torch.uint8)
    for chunk, columns in enumerate(chunk_slices(150, CHUNK)):
        coded = encode(weight[:, columns], spec, "per_row")
        assert torch.equal(prepared.scale[chunk, :37], coded.scale[:, 0])
        for m in range(37):
            for d, code in enumerate(coded.codes[m].tolist(), start=columns.start):
                seen[m, d] = abs(code) | (128 if code < 0 else 0)
    assert torch.equal(prepared.codes.transpose(0, 1).reshape(64, 256), seen)


# ---------------------------------------------------------------------------------------------- sm_90

_CLASSES = [(sc_prec, stoc_len) for sc_prec in range(2, 9) for stoc_len in (2 ** (sc_prec - 1), 2**sc_prec)]


def launches():
    """Return name -> function: each launches one class of each kernel for every number of rows and every size."""
    found = {
        f"{name}, {finish}": lambda d=d, f=finish: _all_rows(d, f) for name, d in DTYPES.items() for finish in range(3)
    }
    found |= {f"p {p}, L {length}": lambda p=p, length=length: _all_counts(p, length) for p, length in _CLASSES}
    return found


def _all_rows(dtype, finish):
    spec = resolve_streams("bipolar", 8, 128)
    for outputs, depth in ((64, 64), (62, 130), (4096, 576)):
        weight = packed(torch.zeros(outputs, depth), spec)
        for rows in (1, 2, 3, 16, 17, 64, 65, 200):
            addend = torch.zeros(rows, outputs, dtype=dtype) if finish == ADD else None
            linear("triton", torch.zeros(rows, depth, dtype=dtype), weight, spec, finish=finish, addend=addend)


def _all_counts(sc_prec, stoc_len):
    for mode in ("bipolar", "unipolar"):
        for rows, outputs, depth in ((1, 1, 1), (5, 64, 16), (16, 37, 260)):
            codes = torch.zeros(rows, depth, dtype=torch.int16), torch.zeros(outputs, depth, dtype=torch.int16)
            triton.counts(*codes, resolve_streams(mode, sc_prec, stoc_len))


def test_one_binary_serves_every_number_of_rows():
    """Every kernel compiles for sm_90; streams need two binaries of counts, for two modes."""
    for name, binaries in compiled("test_sc_triton").items():
        if name.startswith("p "):
            assert binaries == {"_counts_kernel": 2}, name
        else:
            assert binaries == {"_counts_kernel": 1, "_encode_kernel": 1, "_rescale_kernel": 1}, name
