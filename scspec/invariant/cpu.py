"""Batch-invariant kernels for the CPU, numba without fastmath: no reassociation, no fused multiply-adds.

Loops vectorise only across independent outputs, where every lane runs the same IEEE operations as a scalar would.
"""

import math

import numba as nb
import numpy as np

from scspec.jit import compiled

#: Columns of a packed float weight that one task owns: their sums for 8 rows stay in the L1 cache (8 KB).
BLOCK = 256
_ROW_BLOCK = 8

# exp(r) on |r| <= ln(2)/2 as a Taylor polynomial of degree 7: truncation below 4e-9 relative, under float32's half ulp.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 = high + low; n * high is exact for |n| < 2**13 (Cody & Waite 1980)
_LN2_LOW = np.float32(-2.12194440e-4)
_C2, _C3, _C4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6, _C7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
_EXP_LOWEST, _EXP_HIGHEST = np.float32(-87.0), np.float32(88.0)


@compiled
def exp_into(x, out):
    """Write exp(x) of float32 (n,) into out, which may be x; x below -87 gives 0, above 88 exp(88)."""
    bits = np.empty(x.shape[0], np.int32)
    for i in range(x.shape[0]):
        in_range = x[i] >= _EXP_LOWEST
        v = min(max(x[i], _EXP_LOWEST), _EXP_HIGHEST)
        n = np.rint(v * _LOG2_E)
        r = (v - n * _LN2_HIGH) - n * _LN2_LOW
        tail = _C4 + r * (_C5 + r * (_C6 + r * _C7))
        out[i] = np.float32(1.0) + (r + (r * r) * (_C2 + r * (_C3 + r * tail)))
        bits[i] = (np.int32(n) + np.int32(127)) << 23 if in_range else np.int32(0)
    powers = bits.view(np.float32)
    for i in range(x.shape[0]):
        out[i] *= powers[i]


@compiled
def softmax_into(scores, out):
    """Write softmax(scores) of float32 (n,) into out: maximum, exp, sum in ascending order, division."""
    peak = scores[0]
    for i in range(scores.shape[0]):
        peak = max(peak, scores[i])
    for i in range(scores.shape[0]):
        out[i] = scores[i] - peak
    exp_into(out, out)
    total = np.float32(0.0)
    for i in range(out.shape[0]):
        total += out[i]
    for i in range(out.shape[0]):
        out[i] = out[i] / total


@compiled
def softmax_rows(scores, visible):
    """Return softmax of each row of scores float32 (N, T) over its first visible[n] keys, zero beyond."""
    out = np.zeros_like(scores)
    for n in range(scores.shape[0]):
        softmax_into(scores[n, : visible[n]], out[n, : visible[n]])
    return out


@compiled
def silu(x: np.ndarray) -> np.ndarray:
    """Return x / (1 + exp(-x)) of float32 (n,)."""
    out = np.empty_like(x)
    for i in range(x.shape[0]):
        out[i] = -x[i]
    exp_into(out, out)
    for i in range(x.shape[0]):
        out[i] = x[i] / (np.float32(1.0) + out[i])
    return out


@compiled(parallel=True)
def silu_mul(gate_up):
    """Return silu(gate) * up float32 (N, M) of gate_up float32 (N, 2 * M), gate's columns before up's."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = np.empty((rows, columns), np.float32)
    blocks = -(-columns // BLOCK)
    for item in nb.prange(rows * blocks):
        n, first = item // blocks, item % blocks * BLOCK
        last = min(first + BLOCK, columns)
        out[n, first:last] = silu(gate_up[n, first:last]) * gate_up[n, columns + first : columns + last]
    return out


@compiled(parallel=True)
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: np.float32) -> np.ndarray:
    """Return RMSNorm of x float32 (N, D) (Zhang & Sennrich 2019): the squares' sum in float64, ascending."""
    out = np.empty_like(x)
    for n in nb.prange(x.shape[0]):
        total = 0.0
        for d in range(x.shape[1]):
            total += np.float64(x[n, d]) * np.float64(x[n, d])
        mean = np.float32(total / x.shape[1])
        factor = np.float32(1.0) / np.sqrt(mean + eps)
        for d in range(x.shape[1]):
            out[n, d] = weight[d] * (x[n, d] * factor)
    return out


def pack_linear(weight):
    """Return weight float32 (M, D) as bits (ceil(M / BLOCK), D, BLOCK), zero-padded: one task streams one block.

    uint16, the upper halves, if no lower half says anything (a checkpoint in bfloat16): `linear` waits for memory, and
    this is half as much of it. Else uint32.
    """
    bits = weight.view(np.uint32)
    return _pack_blocks(bits if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16))


@compiled(parallel=True)
def _pack_blocks(bits):
    columns, depth = bits.shape
    blocks = -(-columns // BLOCK)
    out = np.zeros((blocks, depth, BLOCK), bits.dtype)
    for block in nb.prange(blocks):
        for m in range(min(BLOCK, columns - block * BLOCK)):
            for d in range(depth):
                out[block, d, m] = bits[block * BLOCK + m, d]
    return out


@compiled(parallel=True)
def linear(x, packed, columns):
    """Return x @ weight.T of x float32 (N, D), weight as `pack_linear` packs it: sums over d in ascending order."""
    rows = x.shape[0]
    out = np.empty((rows, columns), np.float32)
    shift = 32 - 8 * packed.itemsize
    for block in nb.prange(packed.shape[0]):
        width = min(BLOCK, columns - block * BLOCK)
        total = np.empty((_ROW_BLOCK, BLOCK), np.float32)
        bits = np.empty(BLOCK, np.uint32)
        weights = bits.view(np.float32)
        for first in range(0, rows, _ROW_BLOCK):
            count = min(_ROW_BLOCK, rows - first)
            total[:] = 0.0
            for d in range(x.shape[1]):
                for m in range(BLOCK):
                    bits[m] = np.uint32(packed[block, d, m]) << shift
                for r in range(count):
                    v = x[first + r, d]
                    for m in range(BLOCK):
                        total[r, m] += v * weights[m]
            for r in range(count):
                for m in range(width):
                    out[first + r, block * BLOCK + m] = total[r, m]
    return out


@compiled
def rotary_table(inv_freq: np.ndarray, scaling: np.float32, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin) float32 (last - first, 2 * len(inv_freq)) for positions first..last-1.

    The angle is a float32 product, as in Hugging Face; its cosine comes from the C library in float64, one at a time.
    """
    half = inv_freq.shape[0]
    cos = np.empty((last - first, 2 * half), np.float32)
    sin = np.empty((last - first, 2 * half), np.float32)
    for row in range(last - first):
        for i in range(half):
            angle = np.float64(np.float32(first + row) * inv_freq[i])
            cos[row, i] = cos[row, half + i] = np.float32(math.cos(angle)) * scaling
            sin[row, i] = sin[row, half + i] = np.float32(math.sin(angle)) * scaling
    return cos, sin


@compiled
def rotated_heads(qkv, start, kv_heads, cos, sin):
    """Return (query, key, value) float32 (B, heads, T, head_dim) of qkv float32 (B * T, all heads' dimensions).

    Query and key are rotated as in Hugging Face, by row start[b] + t of cos and sin float32 (positions, head_dim).
    """
    batch, head_dim = start.shape[0], cos.shape[1]
    steps, heads = qkv.shape[0] // batch, qkv.shape[1] // head_dim
    out = np.empty((batch, heads, steps, head_dim), np.float32)
    half = head_dim // 2
    for b in range(batch):
        for t in range(steps):
            c, s = cos[start[b] + t], sin[start[b] + t]
            for h in range(heads):
                x, y = qkv[b * steps + t, h * head_dim : (h + 1) * head_dim], out[b, h, t]
                if h >= heads - kv_heads:
                    y[:] = x
                    continue
                for i in range(half):
                    y[i] = x[i] * c[i] + (-x[half + i]) * s[i]
                    y[half + i] = x[half + i] * c[half + i] + x[i] * s[half + i]
    first_key, first_value = heads - 2 * kv_heads, heads - kv_heads
    parts = out[:, :first_key], out[:, first_key:first_value], out[:, first_value:]
    return parts


@compiled(parallel=True)
def attention(query, keys, values, start, scaling):
    """Return causal attention float32 (B, T, H, head_dim): every sum in ascending order of dimension or position.

    query: float32 (B, H, T, head_dim), row t of sequence b at position start[b] + t, start: int64 (B,);
    keys: float32 (B, H_kv, head_dim, capacity); values: float32 (B, H_kv, capacity, head_dim), both already written.
    """
    batch, heads, count, head_dim = query.shape
    shared = heads // keys.shape[1]
    out = np.zeros((batch, count, heads, head_dim), np.float32)
    for item in nb.prange(batch * heads):
        b, h = item // heads, item % heads
        k, v = keys[b, h // shared], values[b, h // shared]
        for t in range(count):
            scores = np.zeros(start[b] + t + 1, np.float32)
            for d in range(head_dim):
                x = query[b, h, t, d]
                for j in range(scores.shape[0]):
                    scores[j] += x * k[d, j]
            for j in range(scores.shape[0]):
                scores[j] *= scaling
            softmax_into(scores, scores)
            for j in range(scores.shape[0]):
                for c in range(head_dim):
                    out[b, t, h, c] += scores[j] * v[j, c]
    return out
