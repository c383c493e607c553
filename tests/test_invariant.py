"""Batch-invariant arithmetic: accurate to derived bounds, and every row has the same bits in any company.

u = 2**-24 is float32's unit roundoff, gamma(n) = n u / (1 - n u) (Higham 2002, section 3.1). A float64 reference counts
as exact.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from scspec.invariant import InvariantRMSNorm, InvariantRotary, InvariantSiLU, cpu

U = 2.0**-24
THREADS = (1, 2)


def gamma(n):
    return n * U / (1 - n * U)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def exp(x):
    out = np.empty_like(x)
    cpu.exp_into(x, out)
    return out


# ---------------------------------------------------------------------------------------------- exp, silu, softmax


def test_exp_is_within_two_ulp():
    """Reduction (u/4 absolute) and the inner sum (u/4), over a result of at least 0.7, are half an ulp; the last sum
    is half an ulp more. Two ulp leave room for the polynomial and its roundings."""
    x = np.concatenate([np.linspace(-87, 88, 200_001), normal(50_000), normal(1000, scale=1e-6), np.arange(-87, 89)])
    x = np.clip(x, -87, 88).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()


def test_exp_at_the_edges():
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    below = np.nextafter(np.float32(-87), -inf)
    x = np.array([below, -87.5, -104, -1e30, -inf, 0.0, -0.0, 89, 1e30, inf, nan], np.float32)
    out = exp(x)
    assert out[:7].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert (out[7:10] == exp(np.array([88], np.float32))).all()
    assert np.isnan(out[10])


@pytest.mark.parametrize("function", [exp, cpu.silu])
def test_position_and_length_change_no_bit(function):
    """Vector bodies and scalar tails run the same operations: lengths 1..33, every offset."""
    x = normal(80, scale=20)
    whole = function(x)
    for length in range(1, 34):
        for first in range(0, 80 - length):
            piece = function(x[first : first + length].copy())
            assert piece.tobytes() == whole[first : first + length].tobytes()


def test_exp_in_place():
    x = normal(37, scale=5)
    expected = exp(x)
    cpu.exp_into(x, x)
    assert x.tobytes() == expected.tobytes()


def test_silu():
    """exp within 2 ulp (4 u), 1 + exp and the division: 6 roundings of a positive denominator's terms.

    Below -88 exp stays at exp(88): the result is -|x| / 1.7e38, in place of one that is smaller still.
    """
    x = np.concatenate([np.linspace(-88, 88, 20_001), [0.0, -0.0, 1e30, 1e-30]]).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(cpu.silu(x) - exact) <= gamma(6) * np.abs(exact)).all()
    far = np.array([-89, -200, -1000], np.float32)
    assert (np.abs(cpu.silu(far)) < 1e-35).all()
    assert np.isnan(cpu.silu(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 513])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_softmax(size, scale):
    """The subtraction errs by u |difference|, which exp turns into a relative error; exp: 4 u; the sum: gamma(size);
    the division: u. What lies more than 87 below the maximum is 0, and exp(-87) < 1e-37."""
    scores = normal(1, size, scale=scale)
    out = cpu.softmax_rows(scores, np.array([size]))[0]
    shifted = scores[0].astype(np.float64) - scores[0].max()
    exact = np.exp(shifted) / np.exp(shifted).sum()
    shift_error = np.expm1(U * np.minimum(-shifted, 87))
    relative = shift_error + shift_error.max() + gamma(size + 10)
    assert (np.abs(out - exact) <= relative * exact + 1e-37).all()
    # the outputs' sum: each entry is exp / total with one rounding, the total was rounded size - 1 times
    assert abs(out.astype(np.float64).sum() - 1) <= gamma(size + 1)


@pytest.mark.parametrize("size", range(1, 34))
def test_softmax_sees_its_visible_keys_only(size):
    scores = normal(3, 40, scale=4)
    alone = cpu.softmax_rows(scores[1:2, :size].copy(), np.array([size]))
    spoiled = scores.copy()
    spoiled[:, size:] = np.nan
    together = cpu.softmax_rows(spoiled, np.array([size] * 3))
    assert together[1, :size].tobytes() == alone.tobytes()
    assert not together[:, size:].any()


def test_softmax_shows_not_a_number():
    for bad in (np.nan, np.inf):
        for position in (0, 3, 8):
            scores = normal(1, 9)
            scores[0, position] = bad
            assert np.isnan(cpu.softmax_rows(scores, np.array([9]))).all()
    scores = normal(1, 9)
    scores[0, 4] = -np.inf
    out = cpu.softmax_rows(scores, np.array([9]))[0]
    assert out[4] == 0
    assert np.isfinite(out).all()


# ---------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("depth", [1, 7, 64, 576, 4097])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm(depth, scale):
    """With the sum in float64: the mean rounds once, + eps once, both halved by the square root, which rounds once, as
    do 1 / root and the two products: five roundings, one more for what the float64 sum and second orders add."""
    x, weight, eps = normal(5, depth, scale=scale), normal(depth, seed=1), np.float32(1e-5)
    out = cpu.rms_norm(x, weight, eps)
    wide = x.astype(np.float64)
    exact = weight * wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + np.float64(eps))
    assert (np.abs(out - exact) <= gamma(6) * np.abs(exact)).all()


@pytest.mark.parametrize("depth", [1, 7, 64, 576])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_rms_norm_rows_are_independent(depth, rows):
    x, weight = torch.from_numpy(normal(rows, depth)), torch.from_numpy(normal(depth, seed=1))
    module = InvariantRMSNorm(weight, 1e-5)
    out = module(x)
    assert torch.equal(out, torch.cat([module(row[None]) for row in x]))
    assert torch.equal(out, module(x.view(1, rows, 1, depth)).view(rows, depth))
    assert torch.equal(module(torch.zeros(1, depth)), torch.zeros(1, depth))
    x[0, 0] = float("nan")
    assert torch.isnan(module(x)[0]).all()
    assert torch.equal(module(x)[1:], out[1:])


# ---------------------------------------------------------------------------------------------- linear

COLUMNS = (1, 255, 256, 257, 600)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (3, 33), (8, 64), (9, 577), (17, 130)])
def test_linear(rows, depth, columns, threads):
    """Close to the exact product (depth products and sums: gamma(depth) |x| |w|), and the same bits on any number of
    threads, beside any rows, with or without the columns that follow."""
    x, weight = normal(rows, depth), normal(columns, depth, seed=1)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = gamma(depth) * (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T)
    outs = []
    for count in THREADS:
        threads(count)
        packed = cpu.pack_linear(weight)
        outs.append(cpu.linear(x, packed, columns))
        alone = [cpu.linear(x[i : i + 1], packed, columns) for i in range(rows)]
        assert outs[-1].tobytes() == np.concatenate(alone).tobytes()
    assert outs[0].tobytes() == outs[1].tobytes()
    assert (np.abs(outs[0] - exact) <= bound).all()
    fewer = cpu.linear(x, cpu.pack_linear(weight[: (columns + 1) // 2]), (columns + 1) // 2)
    assert outs[0][:, : (columns + 1) // 2].tobytes() == fewer.tobytes()


@pytest.mark.parametrize(("kept_bits", "packed_as"), [(32, np.uint32), (17, np.uint32), (16, np.uint16)])
def test_linear_is_the_ascending_sum(kept_bits, packed_as):
    """Weights of a bfloat16 checkpoint are packed in 16 bits; one more bit in a single weight, and none are."""
    x, weight = normal(3, 50), normal(7, 50, seed=1)
    bits = weight.view(np.uint32)
    bits &= np.uint32(0xFFFFFFFF if kept_bits == 32 else 0xFFFF0000)
    bits[6, 49] |= np.uint32(0x8000 if kept_bits == 17 else 0)
    packed = cpu.pack_linear(weight)
    assert packed.dtype == packed_as
    out = cpu.linear(x, packed, 7)
    for n in range(3):
        for m in range(7):
            total = np.float32(0)
            for d in range(50):
                total = total + x[n, d] * weight[m, d]
            assert out[n, m] == total


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 255), (3, 256), (2, 1537)])
def test_silu_mul_is_silu_times_up(rows, columns):
    gate_up = normal(rows, 2 * columns, seed=3, scale=4.0)
    wanted = np.stack([cpu.silu(row[:columns]) * row[columns:] for row in gate_up])
    assert np.array_equal(cpu.silu_mul(gate_up), wanted)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 12), (3, 3, 6), (9, 3, 64)])
def test_rotated_heads_are_hugging_faces(heads, kv_heads, head_dim):
    """Two sequences at positions of their own; bit for bit, the elementwise products and sums being IEEE in both."""
    batch, steps, start = 2, 5, np.array([3, 11])
    qkv = normal(batch * steps, (heads + 2 * kv_heads) * head_dim, seed=1)
    cos, sin = normal(16, head_dim, seed=2), normal(16, head_dim, seed=4)
    parts = cpu.rotated_heads(qkv, start, kv_heads, cos, sin)
    rows = torch.from_numpy(qkv).view(batch, steps, -1, head_dim).transpose(1, 2)
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
    tables = (torch.from_numpy(table[start[:, None] + np.arange(steps)]) for table in (cos, sin))
    wanted = (*apply_rotary_pos_emb(query, key, *tables), value)
    for part, want in zip(parts, wanted, strict=True):
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(part)), want)


def test_silu_module_keeps_the_shape():
    x = torch.from_numpy(normal(2, 3, 33))
    assert torch.equal(InvariantSiLU()(x).flatten(), torch.from_numpy(cpu.silu(x.flatten().numpy())))
    assert InvariantSiLU()(x).shape == x.shape


# ---------------------------------------------------------------------------------------------- rotary

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def rotary_pair(rope, head_dim=64):
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(ROPES[rope])
    )
    theirs = LlamaRotaryEmbedding(config)
    return theirs, lambda: InvariantRotary(theirs.inv_freq, theirs.attention_scaling)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_equals_hugging_face(rope):
    """The angle is the same float32 product. Our cosine is the C library's in float64, rounded (half an ulp); torch's
    vectorised float32 cosine is good to one ulp. So they lie within two."""
    theirs, new = rotary_pair(rope)
    ids = torch.arange(3000)[None]
    for ours, wanted in zip(new()(torch.empty(1), ids), theirs(torch.empty(1, 1, 1), ids), strict=True):
        assert ours.shape == wanted.shape == (1, 3000, 64)
        ulp = np.spacing(wanted.abs().numpy())
        assert (np.abs(ours.numpy().astype(np.float64) - wanted.numpy()) <= 2 * ulp).all()


@pytest.mark.parametrize("head_dim", [2, 64, 66])
def test_rotary_does_not_depend_on_how_its_table_grew(head_dim):
    _, new = rotary_pair("default", head_dim)
    grown, at_once = new(), new()
    expected = at_once(torch.empty(1), torch.arange(1500)[None])
    for first, last in ((0, 1), (1, 5), (5, 256), (256, 257), (700, 703), (1499, 1500), (2, 9)):
        rows = grown(torch.empty(1), torch.arange(first, last)[None])
        for ours, wanted in zip(rows, expected, strict=True):
            assert torch.equal(ours, wanted[:, first:last])
    ids = torch.tensor([[3, 900], [0, 41]])
    for ours, wanted in zip(grown(torch.empty(1), ids), expected, strict=True):
        assert torch.equal(ours, wanted[0][ids])


def test_rotary_scales_its_table():
    theirs, _ = rotary_pair("default")
    plain, scaled = (InvariantRotary(theirs.inv_freq, s) for s in (1.0, 1.25))
    ids = torch.arange(50)[None]
    for one, other in zip(plain(torch.empty(1), ids), scaled(torch.empty(1), ids), strict=True):
        assert torch.equal(one * 1.25, other)


# ---------------------------------------------------------------------------------------------- float attention


def attention_operands(batch, kv_heads, shared, positions, head_dim, capacity):
    query = normal(batch, kv_heads * shared, positions, head_dim)
    keys = np.full((batch, kv_heads, head_dim, capacity), np.nan, np.float32)
    values = np.full((batch, kv_heads, capacity, head_dim), np.nan, np.float32)
    keys[..., :positions] = normal(batch, kv_heads, head_dim, positions, seed=1)
    values[:, :, :positions] = normal(batch, kv_heads, positions, head_dim, seed=2)
    return query, keys, values


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(("positions", "head_dim"), [(1, 8), (9, 20), (40, 64), (300, 7)])
def test_attention(shared, positions, head_dim):
    """A score errs by delta = (gamma(head_dim + 1) + 2 u) |q| |k| scaling: the product, the scaling, the subtraction
    of the maximum. Score errors of at most delta change a probability by the factor exp(2 delta); exp (4 u), the sum,
    the division and the weighted sum add gamma(2 S + 10) relative to sum p |v|."""
    query, keys, values = attention_operands(2, 2, shared, positions, head_dim, positions + 5)
    scaling = np.float32(head_dim**-0.5)
    out = cpu.attention(query, keys, values, np.zeros(len(query), np.int64), scaling)
    k = keys[..., :positions].astype(np.float64).repeat(shared, axis=1)
    v = values[:, :, :positions].astype(np.float64).repeat(shared, axis=1)
    hidden = np.triu(np.ones((positions, positions), bool), 1)
    scores = torch.from_numpy(np.where(hidden, -np.inf, query.astype(np.float64) @ k * np.float64(scaling)))
    probs = scores.softmax(-1).numpy()
    magnitude = np.where(hidden, 0, np.abs(query).astype(np.float64) @ np.abs(k) * np.float64(scaling))
    delta = (gamma(head_dim + 1) + 2 * U) * magnitude.max(axis=-1, keepdims=True)
    bound = (np.expm1(2 * delta) + 2 * gamma(2 * positions + 10)) * (probs @ np.abs(v))
    error = np.abs(out.transpose(0, 2, 1, 3) - probs @ v)
    assert (error <= bound).all()


@pytest.mark.parametrize("steps", [[1] * 21, [4, 4, 4, 4, 5], [20, 1], [7, 5, 1, 8]])
def test_attention_of_partitions_changes_no_bit(steps, threads):
    """Later keys, the capacity and other sequences leave no trace either: what is not yet written is NaN here."""
    query, keys, values = attention_operands(2, 2, 3, 21, 20, 24)
    whole = cpu.attention(query, keys, values, np.zeros(2, np.int64), np.float32(0.2))
    for count in THREADS:
        threads(count)
        first = 0
        for step in steps:
            last = first + step
            k, v = np.full_like(keys[..., : last + 2], np.nan), np.full_like(values[:, :, : last + 2], np.nan)
            k[..., :last], v[:, :, :last] = keys[..., :last], values[:, :, :last]
            rows = cpu.attention(query[:, :, first:last].copy(), k, v, np.full(2, first), np.float32(0.2))
            assert rows.tobytes() == whole[:, first:last].tobytes()
            alone = [x[1:].copy() for x in (query[:, :, first:last], k, v)]
            rows = cpu.attention(*alone, np.full(1, first), np.float32(0.2))
            assert rows.tobytes() == whole[1:, first:last].tobytes()
            first = last


def test_attention_of_sequences_at_different_positions():
    query, keys, values = attention_operands(3, 2, 3, 21, 20, 24)
    whole = cpu.attention(query, keys, values, np.zeros(3, np.int64), np.float32(0.2))
    start = np.array([9, 0, 16])
    rows = np.stack([query[b, :, first : first + 5] for b, first in enumerate(start)])
    for b, first in enumerate(start):  # nothing beyond a sequence's own rows is looked at
        keys[b, ..., first + 5 :] = values[b, :, first + 5 :] = np.nan
    out = cpu.attention(rows, keys, values, start, np.float32(0.2))
    assert all(np.array_equal(out[b], whole[b, first : first + 5]) for b, first in enumerate(start))
