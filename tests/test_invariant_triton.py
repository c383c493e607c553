"""The GPU kernels, in Triton's interpreter where there is no GPU: accurate to derived bounds, every row the same bits.

u = 2**-24 is float32's unit roundoff, gamma(n) = n u / (1 - n u) (Higham 2002, section 3.1), the dtype's own unit
roundoff comes with the last rounding. A float64 reference counts as exact. Outputs are poisoned before they are
written.
"""

import pytest
import torch
from interpreter import DEVICE, DTYPES, ROW_COUNTS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from scspec.invariant import InvariantRMSNorm, InvariantRotary, InvariantSiLU
from scspec.invariant import triton as kernels

U = 2.0**-24
WIDTHS = (576, 40, 130)


def gamma(n):
    return n * U / (1 - n * U)


def rounding(exact, dtype):
    """Return what one rounding to dtype may add: half its epsilon, or half the smallest subnormal."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2) + info.tiny * info.eps / 2


def exp_error(x):
    """Return the relative error of exp(x): x log2(e) rounds twice (2 u |x|), exp2 is good to 2 ulp (4 u)."""
    return torch.expm1(2 * U * x.abs()) + 4 * U


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.to(dtype).to(DEVICE)


def starts(*positions):
    return torch.tensor(positions, dtype=torch.int32, device=DEVICE)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty returns is not a number until something writes it."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **k: _plain(*a, **k).fill_(float("nan")))


def assert_within(out, exact, bound):
    assert not out.isnan().any()
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max():.2f} times the bound"


def assert_rows_are_independent(function, *operands):
    """Any number of first rows, and single rows from the middle (unaligned, for odd widths), give the same bits."""
    whole = function(*operands)
    for count in ROW_COUNTS:
        assert torch.equal(function(*(x[:count] for x in operands)), whole[:count]), count
    for row in (1, 16, 32):
        assert torch.equal(function(*(x[row : row + 1] for x in operands)), whole[row : row + 1]), row


# ---------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 1, 9000])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_rms_norm(width, scale, dtype):
    """Squares and their sum in any order: gamma(width), halved by the root; mean, + eps, root, 1 / root, two products
    add gamma(6)."""
    x, weight = normal(3, width, scale=scale, dtype=dtype), normal(width, seed=1, dtype=dtype)
    wide = x.double()
    exact = weight.double() * wide / torch.sqrt((wide**2).mean(dim=1, keepdim=True) + 1e-5)
    bound = (gamma(width) / 2 + gamma(6)) * exact.abs()
    assert_within(kernels.rms_norm(x, weight, 1e-5), exact, bound + rounding(exact.abs() + bound, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_rows_are_independent(width, dtype):
    x, weight = (normal(33, width, seed=s, dtype=dtype) for s in range(2))
    assert_rows_are_independent(lambda x: kernels.rms_norm(x, weight[0], 1e-5), x)


# ---------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (16, 40), (17, 130), (3, 1)])
@pytest.mark.parametrize("columns", [1, 31, 130])
def test_linear(rows, width, columns, dtype):
    """Products and sums: gamma(width) |x| |w|, twice that for tensor cores, whose sums truncate."""
    x, weight = normal(rows, width, dtype=dtype), normal(columns, width, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    bound = gamma(2 * width) * (x.double().abs() @ weight.double().abs().T)
    out = kernels.linear(x, weight)
    assert out.dtype == torch.float32
    assert_within(out, exact, bound)
    assert torch.equal(kernels.linear(x, weight, dtype), out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_rows_are_independent(width, dtype):
    x, weight = normal(33, width, dtype=dtype), normal(50, width, seed=1, dtype=dtype)
    assert_rows_are_independent(lambda x: kernels.linear(x, weight), x)


# ---------------------------------------------------------------------------------------------- activation


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_silu(dtype):
    """exp, 1 + exp and the division; beyond -88 the exact value is below 1e-36."""
    x = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([0.0, -300.0, 300.0])]).to(dtype).to(DEVICE)[None]
    wide = x.double()
    exact = wide * torch.sigmoid(wide)
    bound = (exp_error(wide.clamp(min=-88)) + 2 * U) * exact.abs() + 1e-35
    assert_within(kernels.silu(x), exact, bound + rounding(exact.abs() + bound, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 1500])
def test_silu_mul(width, dtype):
    both = normal(33, 2 * width, scale=4, dtype=dtype)
    gate, up = both[:, :width], both[:, width:]
    expected = (kernels.silu(gate).float() * up.float()).to(dtype)
    assert torch.equal(kernels.silu_mul(gate, up), expected)
    assert torch.equal(kernels.silu_mul(gate.contiguous(), up.contiguous()), expected)
    assert_rows_are_independent(kernels.silu_mul, gate, up)


# ---------------------------------------------------------------------------------------------- softmax

VISIBLE = (0, 1, 2, 63, 64, 1023, 1024, 1025, 2500)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_softmax(scale):
    """The subtraction errs by u |difference|, exp by its own; the sum: gamma(size); the division: u."""
    scores, visible = normal(len(VISIBLE), 2500, scale=scale), torch.tensor(VISIBLE, dtype=torch.int32, device=DEVICE)
    out = kernels.softmax_rows(scores, visible)
    for row, size in enumerate(VISIBLE):
        assert not out[row, size:].any()
        if size:
            shifted = scores[row, :size].double() - scores[row, :size].double().max()
            exact = torch.softmax(shifted, 0)
            single = exp_error(shifted.clamp(min=-87)) + torch.expm1(U * shifted.abs())
            assert_within(out[row, :size], exact, (single + single.max() + gamma(size + 4)) * exact + 1e-37)


def test_softmax_sees_its_visible_keys_only():
    """Alone or beside others, in any capacity, whatever lies beyond."""
    counts = [*range(1, 34), 60, 64]
    visible = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    scores = normal(len(counts), 64, scale=4)
    whole = kernels.softmax_rows(scores, visible)
    wider = torch.full((len(counts), 1500), float("nan"), device=DEVICE)
    wider[:, :64] = scores
    out = kernels.softmax_rows(wider, visible)
    assert torch.equal(out[:, :64], whole)
    assert not out[:, 64:].any()
    for row, count in enumerate(counts):
        alone = kernels.softmax_rows(scores[row : row + 1, :count].contiguous(), visible[row : row + 1])
        assert torch.equal(alone, whole[row : row + 1, :count])


# ---------------------------------------------------------------------------------------------- attention


def caches(batch, kv_heads, capacity, head_dim, written, dtype, beyond=float("nan")):
    """Return keys, values (B, H_kv, capacity, head_dim), the same for every capacity, `beyond` where nothing is yet."""
    out = []
    for seed in (1, 2):
        cache = torch.full((batch, kv_heads, capacity, head_dim), beyond, dtype=dtype, device=DEVICE)
        rows = normal(batch, kv_heads, max(written), head_dim, seed=seed, dtype=dtype)
        for b, count in enumerate(written):
            cache[b, :, :count] = rows[b, :, :count]
        out.append(cache)
    return out


def exact_attention(query, keys, values, start, scaling):
    """Return (the exact result, a bound on its error), (B, T, H * head_dim) float64.

    A score errs by (gamma(head_dim + 1) + u) |q| |k| scaling, the subtraction and exp by exp_error and u of what they
    see; kept factors multiply once per block. Twice that in a ratio, gamma of the sums, and of the last division.
    """
    batch, count, heads, head_dim = query.shape
    shared = heads // keys.shape[1]
    exact = torch.zeros(batch, count, heads, head_dim, dtype=torch.float64, device=query.device)
    bound = torch.zeros_like(exact)
    for b in range(batch):
        for t in range(count):
            visible = int(start[b]) + t + 1
            k, v = (x[b, :, :visible].double().repeat_interleave(shared, 0) for x in (keys, values))
            q = query[b, t].double()[:, None]
            scores, magnitude = (q * k).sum(-1) * scaling, (q * k).abs().sum(-1) * scaling
            probs = scores.softmax(-1)
            delta = (gamma(head_dim + 1) + 2 * U) * magnitude.amax(-1, keepdim=True)
            spread = scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)
            steps = visible // kernels.KEY_BLOCK + 1
            relative = torch.expm1(2 * delta) + 2 * (steps + 1) * exp_error(spread) + 2 * gamma(2 * visible + 8)
            exact[b, t] = (probs[..., None] * v).sum(1)
            bound[b, t] = relative * (probs[..., None] * v.abs()).sum(1)
    return exact.flatten(2), bound.flatten(2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("head_dim", [12, 64])
def test_attention(shared, head_dim, dtype):
    """Ragged starts; one block of keys, its edge, several; not a number wherever nothing is written."""
    start, count = starts(0, 61, 140), 3
    keys, values = caches(3, 2, 150, head_dim, [int(s) + count for s in start], dtype)
    query = normal(3, count, 2 * shared, head_dim, dtype=dtype)
    out = kernels.attention(query, keys, values, start, head_dim**-0.5)
    assert out.dtype == dtype
    exact, bound = exact_attention(query, keys, values, start, head_dim**-0.5)
    assert_within(out, exact, bound + rounding(exact.abs() + bound, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [12, 64])
def test_attention_of_partitions_changes_no_bit(head_dim, dtype):
    """Rows at once or one by one, in any capacity, alone or beside others, contiguous or part of a wider tensor."""
    start, count, room = starts(0, 40, 57), 7, (64, 512, 65)
    query = normal(3, count, 4, head_dim, dtype=dtype)
    written = [int(s) + count for s in start]
    whole = kernels.attention(query, *caches(3, 2, room[0], head_dim, written, dtype), start, 0.2)
    for capacity in room:
        cache = caches(3, 2, capacity, head_dim, written, dtype)
        singly = [kernels.attention(query[:, t : t + 1], *cache, start + t, 0.2) for t in range(count)]
        assert torch.equal(torch.cat(singly, 1), whole)
        for b in range(3):
            alone = kernels.attention(query[b : b + 1], *(x[b : b + 1] for x in cache), start[b : b + 1], 0.2)
            assert torch.equal(alone, whole[b : b + 1])
    wider = torch.full((3, count, 9, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    wider[:, :, 2:6] = query
    assert torch.equal(kernels.attention(wider[:, :, 2:6], *cache, start, 0.2), whole)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_write_kv(dtype):
    """Each row at its own place; nothing else is touched, and nothing is written beyond the capacity."""
    both = normal(2, 4, 6, 20, dtype=dtype)
    key, value = both[:, :, :3], both[:, :, 3:]
    guarded = torch.full((2, 2 * 3 * 9 * 20 + 400), -7.0, dtype=dtype, device=DEVICE)
    keys, values = (row[:-400].view(2, 3, 9, 20) for row in guarded)
    start = starts(2, 7)
    kernels.write_kv(key, value, keys, values, start)
    for new, cache in ((key, keys), (value, values)):
        expected = torch.full_like(cache, -7.0)
        expected[0, :, 2:6] = new[0].transpose(0, 1)
        expected[1, :, 7:9] = new[1, :2].transpose(0, 1)
        assert torch.equal(cache, expected)
    assert (guarded[:, -400:] == -7).all()


# ---------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [2, 12, 64])
def test_rotary(head_dim, dtype):
    """Hugging Face's formula in float32, rounded once, bit for bit; strided, ragged, one by one."""
    cos, sin = InvariantRotary(0.3 ** torch.arange(head_dim // 2), 1.0)(torch.empty(1), torch.arange(50)[None])
    cos, sin = cos[0].to(DEVICE), sin[0].to(DEVICE)
    wide = normal(2, 4, 7, head_dim, dtype=dtype)
    x, start = wide[:, :, 1:6], starts(0, 45)
    at = start[:, None] + torch.arange(4, device=DEVICE)
    turned = x.float().transpose(1, 2)
    expected = apply_rotary_pos_emb(turned, turned, cos[at], sin[at])[0].transpose(1, 2).to(dtype)
    out = kernels.rotary(x, cos, sin, start)
    assert torch.equal(out, expected)
    singly = [kernels.rotary(x[:, t : t + 1], cos, sin, start + t) for t in range(4)]
    assert torch.equal(torch.cat(singly, 1), out)
    assert torch.equal(kernels.rotary(x[1:], cos, sin, start[1:]), out[1:])
    assert torch.equal(wide, normal(2, 4, 7, head_dim, dtype=dtype))


# ---------------------------------------------------------------------------------------------- refusals


def test_wrong_operands_are_refused():
    x, start = normal(2, 8), starts(0, 0)
    cache = torch.zeros(2, 2, 8, 4, device=DEVICE)
    query = normal(2, 1, 4, 4)
    calls = [
        lambda: kernels.rms_norm(x, x[0, :7], 1e-5),
        lambda: kernels.linear(x, x.half()),
        lambda: kernels.linear(x, x[:, :7]),
        lambda: kernels.silu_mul(x, x[:, :7]),
        lambda: kernels.silu(x.T),
        lambda: kernels.softmax_rows(x, start.long()),
        lambda: kernels.attention(query, cache, cache, start.long(), 1.0),
        lambda: kernels.attention(query, cache, cache.transpose(2, 3), start, 1.0),
        lambda: kernels.attention(query[:, :, :3], cache, cache, start, 1.0),
        lambda: kernels.write_kv(query, query, cache, cache, start),
        lambda: kernels.write_kv(query[:, :, :2].half(), query[:, :, :2], cache, cache, start),
        lambda: kernels.rotary(query, x[:, :3], x[:, :3], start),
        lambda: kernels.rotary(query, x[:, :4], x[:, :4], start),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\w"):
            call()
    assert [x.shape for x in (kernels.rms_norm(x[:0], x[0], 1e-5), kernels.linear(x[:0], x))] == [(0, 8), (0, 2)]


# ---------------------------------------------------------------------------------------------- modules


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_modules_on_a_gpu(dtype):
    x = normal(2, 3, 64, dtype=dtype)
    norm = InvariantRMSNorm(normal(64, seed=1, dtype=dtype), 1e-5)
    assert torch.equal(norm(x).view(6, 64), kernels.rms_norm(x.view(6, 64), norm.weight, 1e-5))
    assert torch.equal(InvariantSiLU()(x).view(6, 64), kernels.silu(x.view(6, 64)))
    rotary = InvariantRotary(0.3 ** torch.arange(32), 1.0, positions=300).to(DEVICE, dtype)
    ids = torch.tensor([[3, 299], [0, 41]])
    ours = rotary(x, ids.to(DEVICE))
    on_cpu = InvariantRotary(0.3 ** torch.arange(32), 1.0)(torch.empty(1), ids)
    for out, expected in zip(ours, on_cpu, strict=True):
        assert torch.equal(out.cpu(), expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernels_in_a_graph(dtype):
    """One captured graph serves every position; nothing in it waits for the device."""
    x, weight, start = normal(4, 64, dtype=dtype), normal(64, 64, seed=1, dtype=dtype), starts(0, 0)
    cos, sin = normal(40, 32), normal(40, 32, seed=1)
    keys, values = (torch.zeros(2, 1, 40, 32, dtype=dtype, device=DEVICE) for _ in range(2))

    def step():
        heads = kernels.linear(kernels.rms_norm(x, weight[0], 1e-5), weight, dtype).view(2, 2, 2, 32)
        turned = kernels.rotary(heads, cos, sin, start)
        kernels.write_kv(turned[:, :, :1], heads[:, :, 1:], keys, values, start)
        mixed = kernels.attention(turned, keys, values, start, 0.2).view(4, 64)
        return kernels.silu_mul(mixed, x)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for position in (0, 2, 38):
        start.fill_(position)
        graph.replay()
        assert torch.equal(captured, step())
