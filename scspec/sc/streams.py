"""Sobol bit streams and the tables that follow from them. Integer arithmetic only (numpy).

Source: the published `scmp_kernels` (docs/method.md): Sobol points in Gray-code order (Antonov & Saleev 1979),
one sequence for each operand, decorrelated between dimensions by an xor scramble.

Not covered here: floating-point values and their quantisation (`encoding`), counting (`reference`, `cpu`).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: Direction seeds of operand b, by bit; the entries that sc_prec leaves out are 1 (see `_direction_seeds`).
_SEEDS_B_8 = (1, 1, 1, 1, 9, 1, 41, 255)
_GOLDEN_64 = 0x9E3779B97F4A7C15

SC_PREC_RANGE = (2, 8)
MODES = ("bipolar", "unipolar")
#: Count tables kept, of 4 to 17 MB at sc_prec 8: where two models of mixed lengths have more settings than that, each
#: forward builds tables anew, 20 ms each.
KEPT_TABLES = 32
GRANULARITIES = ("per_row", "per_head", "per_tensor", "causal")  # scopes of a quantisation scale


@dataclass(frozen=True)
class StreamSpec:
    """Everything that fixes the bit streams of one SC matmul.

    sc_prec: bits of a Sobol point, 2..8.  stoc_len: cycles, 1..2**sc_prec.
    rng_levels: levels of the random grid, a power of two in 2..2**sc_prec.
    mode: "bipolar" (sign-magnitude) or "unipolar".
    sc_seed: 0 is the published stream family; n > 0 draws another xor scramble per dimension.
    """

    sc_prec: int
    stoc_len: int
    rng_levels: int
    mode: str = "bipolar"
    sc_seed: int = 0

    @property
    def base(self) -> int:
        """Points of the Sobol sequence, and how many dimensions have streams of their own."""
        return 1 << self.sc_prec

    @property
    def max_code(self) -> int:
        """Largest magnitude code q."""
        return (1 << (self.sc_prec - (self.mode == "bipolar"))) - 1


def resolve_streams(
    mode: str = "bipolar",
    sc_prec: int = 8,
    stoc_len: int | None = None,
    rng_levels: int | None = None,
    halve_bipolar_stoc_len: bool = False,
    sc_seed: int = 0,
) -> StreamSpec:
    """Return the checked StreamSpec with defaults filled in.

    With `halve_bipolar_stoc_len` in bipolar mode an unset `stoc_len` and an unset `rng_levels` default to
    2**(sc_prec - 1), else to 2**sc_prec. A given `stoc_len` is always kept.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
    lowest, highest = SC_PREC_RANGE
    _check_int("sc_prec", sc_prec, lowest, highest)
    default = 2 ** (sc_prec - 1) if halve_bipolar_stoc_len and mode == "bipolar" else 2**sc_prec
    stoc_len = default if stoc_len is None else stoc_len
    rng_levels = default if rng_levels is None else rng_levels
    _check_int("stoc_len", stoc_len, 1, 2**sc_prec, f" (2**sc_prec, sc_prec={sc_prec})")
    _check_int("rng_levels", rng_levels, 2, 2**sc_prec, " and a power of two")
    if rng_levels & (rng_levels - 1):
        raise ValueError(f"rng_levels={rng_levels}: must be a power of two from 2 to {2**sc_prec}")
    _check_int("sc_seed", sc_seed, 0, 2**31 - 1)
    return StreamSpec(sc_prec, int(stoc_len), int(rng_levels), mode, int(sc_seed))


def _check_int(name: str, value: object, lowest: int, highest: int, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be an int from {lowest} to {highest}{note}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name}={value}: must be from {lowest} to {highest}{note}")


def _direction_seeds(operand: str, sc_prec: int) -> list[int]:
    seeds = [1] * sc_prec
    if operand == "b":
        if sc_prec == 8:
            seeds = list(_SEEDS_B_8)
        else:
            if sc_prec >= 5:
                seeds[4] = 9
            if sc_prec >= 7:
                seeds[6] = 41
    return seeds


def sobol_points(operand: str, sc_prec: int) -> np.ndarray:
    """Return all 2**sc_prec Sobol points of operand "a" or "b" in Gray-code order, int64."""
    directions = [(s << sc_prec) >> (i + 1) for i, s in enumerate(_direction_seeds(operand, sc_prec))]
    points, x = [], 0
    for k in range(2**sc_prec):
        points.append(x)
        trailing_ones = (~k & (k + 1)).bit_length() - 1
        if trailing_ones < sc_prec:
            x ^= directions[trailing_ones]
    return np.array(points, dtype=np.int64)


def _bit_reverse(values: np.ndarray, bits: int) -> np.ndarray:
    out = np.zeros_like(values)
    for i in range(bits):
        out |= ((values >> i) & 1) << (bits - 1 - i)
    return out


def scrambles(spec: StreamSpec) -> np.ndarray:
    """Return the xor scramble of each dimension modulo `base`, int64 (base,).

    sc_seed 0: bit-reversed dimension, none where the whole unscaled sequence is used (published).
    sc_seed n > 0: a permutation of 0..base-1 drawn by sorting SplitMix64 hashes of (n, dimension), always applied.
    """
    dims = np.arange(spec.base, dtype=np.int64)
    if spec.sc_seed:
        hashes = [_splitmix64((spec.sc_seed << 32) + int(d)) for d in dims]
        return np.argsort(np.array(hashes, dtype=np.uint64), kind="stable").astype(np.int64)
    if spec.stoc_len == spec.base and spec.rng_levels == spec.base:
        return np.zeros_like(dims)
    return _bit_reverse(dims, spec.sc_prec)


def _splitmix64(x: int) -> int:
    """Return SplitMix64's output function of x (Steele, Lea & Flood 2014)."""
    mask = 2**64 - 1
    x = (x + _GOLDEN_64) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@lru_cache(maxsize=32)
def stream_levels(operand: str, spec: StreamSpec) -> np.ndarray:
    """Return the random levels of operand "a" or "b" in 0..rng_levels-1, int64 (base, stoc_len), read-only."""
    points = sobol_points(operand, spec.sc_prec)[: spec.stoc_len]
    levels = points[None, :] ^ scrambles(spec)[:, None]
    return _frozen(levels * spec.rng_levels // spec.base)


@lru_cache(maxsize=32)
def boundaries(spec: StreamSpec) -> np.ndarray:
    """Return B(i) = rint(i * rng_levels / q), the magnitude boundary of each code 0..q, int64 (q + 1,)."""
    codes = np.arange(spec.max_code + 1, dtype=np.float64)
    return _frozen(np.rint(codes * spec.rng_levels / spec.max_code).astype(np.int64))


@lru_cache(maxsize=32)
def ones_table(spec: StreamSpec) -> np.ndarray:
    """Return K[d, i], the ones in a's stream at dimension d (mod base) for magnitude code i, int16 (base, q + 1)."""
    levels = stream_levels("a", spec)
    ones = (levels[:, :, None] < boundaries(spec)[None, None, :]).sum(axis=1)
    return _frozen(ones.astype(np.int16))


@lru_cache(maxsize=KEPT_TABLES)
def count_table(spec: StreamSpec) -> np.ndarray:
    """Return C[d, K, j] = #{t < K : rb[d, t] < B(j)}: counts (base, stoc_len + 1, q + 1), read-only.

    uint8 where stoc_len fits (4.2 MB at sc_prec 8, bipolar, stoc_len 128: caches decide its speed), else uint16.
    """
    dtype = np.uint8 if spec.stoc_len < 256 else np.uint16
    table = np.zeros((spec.base, spec.stoc_len + 1, spec.max_code + 1), dtype=dtype)
    hits = stream_levels("b", spec)[:, :, None] < boundaries(spec)[None, None, :]
    np.cumsum(hits, axis=1, dtype=dtype, out=table[:, 1:])
    return _frozen(table)


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
