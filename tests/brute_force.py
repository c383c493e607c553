"""The SC matmul over single bits: an oracle that shares no code, and imports nothing, from scspec.

Written from the specification's text alone. Streams are rows of 0 and 1; the gate is walked cycle by cycle. Only numpy
float32 for the quantisation (IEEE, round half to even) and Python integers elsewhere. Slow: keep operands small.
"""

from dataclasses import dataclass

import numpy as np

FLOOR = np.float32(1e-5)
UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Part:
    """One chunk of one head: codes (N, D) and (M, D), and sum over d of sign_a sign_b count, (N, M), all integers."""

    head: int
    chunk: int
    a_codes: np.ndarray
    b_codes: np.ndarray
    sums: np.ndarray


@dataclass(frozen=True)
class Product:
    """value: float64, shaped like the product. tolerance: what float32 rounding may add to it (see `_tolerance`)."""

    parts: list[Part]
    value: np.ndarray
    tolerance: np.ndarray


def matmul(
    a,
    b,
    granularity="per_row",
    *,
    mode="bipolar",
    sc_prec=8,
    stoc_len=None,
    chunk_d=0,
    group_a=1,
    group_b=1,
    rng_levels=None,
    halve_bipolar_stoc_len=False,
    smooth_scales=None,
    scramble=None,
):
    """Return the Product of float32 arrays a (N, D), b (M, D), or with a leading axis of heads.

    scramble: the xor of each dimension modulo 2**sc_prec; None for the published one.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if smooth_scales is not None:
        a, b = a / np.asarray(smooth_scales, np.float32), b * np.asarray(smooth_scales, np.float32)
    base = 2**sc_prec
    default = base // 2 if halve_bipolar_stoc_len and mode == "bipolar" else base
    cycles = default if stoc_len is None else stoc_len
    grid = default if rng_levels is None else rng_levels
    heads_a, heads_b = (x.reshape((-1, *x.shape[-2:])) for x in (a, b))
    heads, rows, depth = heads_a.shape
    shape = (heads, rows, heads_b.shape[1])
    parts, terms = [], []
    step = chunk_d or depth
    for chunk, first in enumerate(range(0, depth, step)):
        piece_a, piece_b = heads_a[:, :, first : first + step], heads_b[:, :, first : first + step]
        if granularity == "causal":
            coded_a, coded_b = quantise_causal(piece_a, piece_b, sc_prec)
        else:
            coded_a = quantise(piece_a, mode, sc_prec, granularity, group_a)
            coded_b = quantise(piece_b, mode, sc_prec, granularity, group_b)
        term, noise = np.zeros(shape), np.zeros(shape)
        for h in range(heads):
            codes_a, codes_b = coded_a.codes[h], coded_b.codes[h]
            sums = count_ones(codes_a, codes_b, sc_prec, cycles, grid, largest(mode, sc_prec), scramble)
            parts.append(Part(h, chunk, codes_a, codes_b, sums))
            term[h], noise[h] = _floats(h, coded_a, coded_b, sums, largest(mode, sc_prec), cycles)
        terms.append((term, noise))
    value = sum(term for term, _ in terms)
    tolerance = _tolerance(terms)
    flat = a.ndim == 2
    return Product(parts, value[0] if flat else value, tolerance[0] if flat else tolerance)


# ---------------------------------------------------------------------------------------------- quantisation


def largest(mode, sc_prec):
    return 2 ** (sc_prec - 1) - 1 if mode == "bipolar" else 2**sc_prec - 1


@dataclass(frozen=True)
class Coded:
    """codes int64 (H, rows, D); scale and zero float32 (H, rows), equal within a scope."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def quantise(x, mode, sc_prec, granularity, group):
    """Return x (H, rows, D) as Coded, scope by scope."""
    q = np.float32(largest(mode, sc_prec))
    codes = np.zeros(x.shape, np.int64)
    scale, zero = np.zeros(x.shape[:2], np.float32), np.zeros(x.shape[:2], np.float32)
    for scope in _scopes(x.shape, granularity, group):
        values = x[scope]
        if mode == "bipolar":
            scale[scope] = max(np.abs(values).max(), FLOOR) / q
            codes[scope] = np.clip(np.rint(values / scale[scope].flat[0]), -q, q)
        else:
            s = max(values.max() - values.min(), FLOOR) / q
            z = np.clip(np.rint(-values.min() / s), np.float32(0), q)
            scale[scope], zero[scope] = s, z
            codes[scope] = np.clip(np.rint(values / s + z), 0, q)
    return Coded(codes, scale, zero)


def _scopes(shape, granularity, group):
    """Return index tuples that cut (H, rows, D) into the sets of values that share a scale."""
    heads, rows, _ = shape
    if granularity == "per_tensor":
        return [(slice(None), slice(None))]
    if granularity == "per_head":
        return [(slice(h, h + 1), slice(None)) for h in range(heads)]
    return [(slice(h, h + 1), slice(r, r + group)) for h in range(heads) for r in range(0, rows, group)]


def quantise_causal(a, b, sc_prec):
    """b gets a scale per position (column), folded into a, whose rows are then quantised without a floor."""
    q = np.float32(largest("bipolar", sc_prec))
    codes_a, codes_b = np.zeros(a.shape, np.int64), np.zeros(b.shape, np.int64)
    scale_a = np.zeros(a.shape[:2], np.float32)
    folded = np.zeros(a.shape, np.float32)
    for h in range(b.shape[0]):
        for j in range(b.shape[2]):
            s = max(np.abs(b[h, :, j]).max(), FLOOR) / q
            codes_b[h, :, j] = np.clip(np.rint(b[h, :, j] / s), -q, q)
            folded[h, :, j] = a[h, :, j] * s
        for n in range(a.shape[1]):
            s = np.abs(folded[h, n]).max() / q
            if s > 0:
                codes_a[h, n] = np.clip(np.rint(folded[h, n] / s), -q, q)
            scale_a[h, n] = s
    ones = np.ones(b.shape[:2], np.float32)
    return Coded(codes_a, scale_a, np.zeros_like(scale_a)), Coded(codes_b, ones, np.zeros_like(ones))


# ---------------------------------------------------------------------------------------------- streams and gate


def sobol(operand, sc_prec):
    """Return the 2**sc_prec Sobol points of operand "a" or "b", in Gray-code order."""
    seeds = [1] * sc_prec
    if operand == "b" and sc_prec == 8:
        seeds = [1, 1, 1, 1, 9, 1, 41, 255]
    elif operand == "b":
        for bit, seed in ((4, 9), (6, 41)):
            if bit < sc_prec:
                seeds[bit] = seed
    v = [(seeds[i] << sc_prec) >> (i + 1) for i in range(sc_prec)]
    points, x = [], 0
    for k in range(2**sc_prec):
        points.append(x)
        ones = 0
        while (k >> ones) & 1:
            ones += 1
        if ones < sc_prec:  # after the last element there is nothing to step to
            x ^= v[ones]
    return points


def reversed_bits(value, bits):
    return int(format(value, f"0{bits}b")[::-1], 2)


def levels(operand, depth, sc_prec, cycles, grid, scramble=None):
    """Return the random level of each dimension and cycle, (depth, cycles)."""
    base = 2**sc_prec
    out = np.zeros((depth, cycles), np.int64)
    points = sobol(operand, sc_prec)
    for d in range(depth):
        if scramble is not None:
            flip = int(scramble[d % base])
        else:
            flip = reversed_bits(d % base, sc_prec) if cycles < base or grid != base else 0
        for t in range(cycles):
            out[d, t] = (points[t] ^ flip) * grid // base
    return out


def boundary(magnitude, grid, q):
    """Return rint(magnitude * grid / q) in integers; no tie exists, since q is odd and grid a power of two."""
    return (2 * magnitude * grid + q) // (2 * q)


def count_ones(codes_a, codes_b, sc_prec, cycles, grid, q, scramble=None):
    """Return sum over d of sign_a sign_b (ones leaving the gate), (N, M), walking over the cycles.

    A one in a's stream enables the gate: the next bit of b's stream comes out, and only then b's stream advances.
    """
    depth = codes_a.shape[1]
    levels_a = levels("a", depth, sc_prec, cycles, grid, scramble)
    levels_b = levels("b", depth, sc_prec, cycles, grid, scramble)
    bound_a, bound_b = boundary(np.abs(codes_a), grid, q), boundary(np.abs(codes_b), grid, q)
    dims = np.arange(depth)
    position = np.zeros(codes_a.shape, np.int64)  # of b's stream, for each row of a and dimension
    ones = np.zeros((codes_a.shape[0], codes_b.shape[0], depth), np.int64)
    for t in range(cycles):
        a_bit = levels_a[:, t] < bound_a
        b_bit = levels_b[dims, position][:, None, :] < bound_b[None, :, :]
        ones += a_bit[:, None, :] & b_bit
        position += a_bit
    signs = np.sign(codes_a)[:, None, :] * np.sign(codes_b)[None, :, :]
    return (signs * ones).sum(axis=2)


# ---------------------------------------------------------------------------------------------- back to floats


def _floats(head, coded_a, coded_b, sums, q, cycles):
    """Return (one chunk's float64 product, the float64 rounding that cancelling zero points may add), (N, M)."""
    scale = coded_a.scale[head].astype(float)[:, None] * coded_b.scale[head].astype(float)[None, :]
    zero_a, zero_b = (coded.zero[head].astype(np.int64) for coded in (coded_a, coded_b))
    row_a, row_b = coded_a.codes[head].sum(axis=1), coded_b.codes[head].sum(axis=1)
    depth = coded_a.codes.shape[2]
    crossed = np.outer(row_a, zero_b) + np.outer(zero_a, row_b)
    both = depth * np.outer(zero_a, zero_b)
    bracket = (q * q * sums + cycles * (both - crossed)) / cycles  # an exact integer, divided once
    noise = 4 * 2.0**-53 * (q * q * np.abs(sums) / cycles + crossed + both)
    return scale * bracket, scale * noise


def _tolerance(terms):
    """Return a bound on |float32 evaluation - value|.

    With u = 2**-24, a term's evaluation rounds at most: s_a s_b, the bracket, their product, C - 1 additions of chunks,
    the factor q * q / L and the product with it: C + 4 relative roundings of each term, so gamma_(C+4) times the sum of
    |terms| (Higham 2002, section 3.1). Counts below 2**24 are exact in float32. `noise`: see `_floats`.
    """
    k = len(terms) + 4
    gamma = k * UNIT_ROUNDOFF / (1 - k * UNIT_ROUNDOFF)
    return sum(gamma * np.abs(term) + 2 * noise for term, noise in terms)
