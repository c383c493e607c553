"""Backend `cpu`: table look-ups in numba. Integer counts equal the reference's; floats follow `matmul` bit for bit.

For a fixed row of `a` and dimension d the gate's K is fixed, so a signed count is a function of the other operand's
code byte alone: a table of 256 entries. Four rows share one look-up: their signed counts are packed in one int64 as
four 16-bit fields that are summed as plain integers. A field holds a sum over at most RUN = 8 words, 64 dimensions
(|sum| <= 64 * 256 = 16384 < 2**15); every sum starts at 2**15 in each field, so that none ever borrows from the next.

Code bytes: bipolar = sign bit 7 | magnitude, unipolar = magnitude. Eight dimensions of one row of `b` lie in one uint64
word, so that a pass over the rows reads words in order and keeps its eight tables (16 KB) in the L1 cache.
"""

from dataclasses import dataclass
from functools import lru_cache

import numba as nb
import numpy as np
import torch

from scspec.jit import compiled
from scspec.sc.cpu_prefetch import prefetch
from scspec.sc.encoding import SCALE_FLOOR, Encoded
from scspec.sc.streams import KEPT_TABLES, StreamSpec, count_table, ones_table

NAME = "cpu"
ROWS = 4
RUN = 8
_WIDTH = 256  # columns that one task rescales: its sums stay in the L1 cache
_SIGN_BIT = 128  # of a bipolar code byte; magnitudes lie below
#: An empty packed sum: 2**15 in each field (as int64).
EMPTY = np.array(0x8000_8000_8000_8000, np.uint64).astype(np.int64)[()]


@dataclass(frozen=True)
class PackedWeight:
    """A weight (M, D), quantised per row and chunk, as the look-up kernel reads it.

    words: uint64 (sum over chunks of ceil(D_c / 8), M); code 0, which counts nothing, fills up a chunk's last word.
    scale: float32 (chunks, M).  depth: D.  chunk_d: dimensions of a chunk (D itself when not chunked).
    """

    words: np.ndarray
    scale: np.ndarray
    depth: int
    chunk_d: int


def pack(chunks: list[Encoded], chunk_d: int) -> PackedWeight:
    """Return bipolar codes (one Encoded (M, D_c) per chunk, in order) packed for `linear`."""
    depth = sum(chunk.codes.shape[1] for chunk in chunks)
    words = np.concatenate([_pack_words(_code_bytes(chunk.codes.numpy(), bipolar=True)) for chunk in chunks])
    scale = np.stack([chunk.scale.numpy()[:, 0] for chunk in chunks])
    return PackedWeight(np.ascontiguousarray(words), np.ascontiguousarray(scale), depth, chunk_d)


def counts(a_codes: torch.Tensor, b_codes: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    """Return sum over d of sign_a sign_b count: codes (N, D), (M, D) int16 -> int32 (N, M)."""
    words = _pack_words(_code_bytes(b_codes.contiguous().numpy(), spec.mode == "bipolar"))
    ones = _signed_ones(a_codes.contiguous().numpy(), ones_table(spec), words.shape[0] * 8)
    rows = a_codes.shape[0]
    sums = run_sums(ones, rows, words, counts_by_magnitude(spec), words.shape[0])
    return torch.from_numpy(_unpack_total(sums, rows))


@lru_cache(maxsize=KEPT_TABLES)
def counts_by_magnitude(spec: StreamSpec) -> np.ndarray:
    """Return `count_table`, (base, stoc_len + 1, 128 if bipolar, else 256): zero for magnitudes above the codes."""
    table = count_table(spec)
    missing = (_SIGN_BIT if spec.mode == "bipolar" else 256) - table.shape[2]
    if missing:
        table = np.pad(table, ((0, 0), (0, 0), (0, missing)))
        table.setflags(write=False)  # as the other is: layers of mixed precisions are one binary to numba
    return table


def linear(x: torch.Tensor, weight: PackedWeight, spec: StreamSpec) -> torch.Tensor:
    """Return x @ weight.T, float32 (N, D) -> (N, M): `sc_matmul` per_row, bipolar, chunked, bit for bit."""
    tables, factor = tables_of(spec)
    return torch.from_numpy(linear_rows(x.numpy(), weight.words, weight.scale, weight.chunk_d, *tables, factor))


def tables_of(spec: StreamSpec) -> tuple[tuple[np.ndarray, np.ndarray], np.float32]:
    """Return ((K's table, the counts' table), what a scaled sum of counts is multiplied with) for the kernels."""
    return (ones_table(spec), counts_by_magnitude(spec)), np.float32(spec.max_code**2 / spec.stoc_len)


def _code_bytes(codes: np.ndarray, bipolar: bool) -> np.ndarray:
    magnitude = np.abs(codes).astype(np.uint8)
    return magnitude | ((codes < 0).astype(np.uint8) << 7) if bipolar else magnitude


def _pack_words(code_bytes: np.ndarray) -> np.ndarray:
    """Return bytes (M, D), zero-padded to whole words, as little-endian words (ceil(D / 8), M)."""
    padded = np.zeros((code_bytes.shape[0], -(-code_bytes.shape[1] // 8) * 8), dtype=np.uint8)
    padded[:, : code_bytes.shape[1]] = code_bytes
    return np.ascontiguousarray(padded.view("<u8").T)


def _signed_ones(codes: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """Return K with the code's sign, int16 (groups, width, ROWS), zero-padded in rows and dimensions."""
    rows, depth = codes.shape
    out = np.zeros((-(-rows // ROWS) * ROWS, width), dtype=np.int16)
    ones = table[np.arange(depth) % table.shape[0], np.abs(codes)]
    out[:rows, :depth] = np.where(codes < 0, -ones, ones)
    return np.ascontiguousarray(out.reshape(-1, ROWS, width).transpose(0, 2, 1))


@compiled
def clip_code(value, max_code):
    """Return rint(value) clipped to -max_code..max_code; NaN gives max_code, so that no index leaves its table."""
    code = np.rint(value)
    code = code if code < max_code else max_code
    return code if code > -max_code else -max_code


@compiled
def quantise(x, scale, max_code, table, out):
    """Write the signed ones of x (float32 (D,)) into out int16 (D,); `scale` is the scope's. IEEE float32."""
    codes = np.empty(x.shape[0], np.int16)
    for d in range(x.shape[0]):  # two loops: this one vectorises
        codes[d] = np.int16(clip_code(x[d] / scale, max_code))
    base = table.shape[0]
    for first in range(0, x.shape[0], base):
        for d in range(first, min(first + base, x.shape[0])):
            ones = table[d - first, abs(np.int64(codes[d]))]
            out[d] = -ones if codes[d] < 0 else ones


@compiled
def magnitude_peak(x):
    """Return max |x|, NaN if any is NaN: magnitudes order like their bits, and a NaN's lie above infinity's."""
    bits = x.view(np.int32)
    peak = np.int32(0)
    for d in range(x.shape[0]):
        magnitude = np.int32(bits[d] & np.int32(0x7FFFFFFF))
        peak = magnitude if magnitude > peak else peak
    found = np.empty(1, np.int32)
    found[0] = peak
    return found.view(np.float32)[0]


@compiled
def row_scale(x, max_code):
    """Return max(|x|max, floor) / q of a row, float32. A NaN in x gives NaN, which the output then shows."""
    peak = magnitude_peak(x)
    return (np.float32(SCALE_FLOOR) if peak < np.float32(SCALE_FLOOR) else peak) / max_code


@compiled(parallel=True)
def linear_rows(x, words, scale_b, chunk_d, ones_of, counts_of, factor):
    """Return float32 (N, M): encode, count, rescale. One compiled call: a dispatch costs as much as a short row."""
    chunk_words = -(-chunk_d // 8)
    ones, scale_a = encode_rows(x, ones_of, chunk_d, words.shape[0])
    sums = run_sums(ones, x.shape[0], words, counts_of, chunk_words)
    chunk_runs = -(-chunk_words // RUN)
    rows, columns = x.shape[0], words.shape[1]
    out = np.empty((rows, columns), np.float32)
    blocks = -(-columns // _WIDTH)
    for item in nb.prange(rows * blocks):
        n, first = item // blocks, item % blocks * _WIDTH
        last = min(first + _WIDTH, columns)
        _rescale(sums[n // ROWS], n % ROWS, scale_a[n], scale_b, first, last, chunk_runs, out[n, first:last])
        out[n, first:last] *= factor
    return out


@compiled(parallel=True)
def encode_rows(x, table, chunk_d, words):
    """Return (signed ones int16 (groups, words * 8, ROWS), scales float32 (N, chunks)) of x float32 (N, D)."""
    rows, depth = x.shape
    chunks, step = -(-depth // chunk_d), -(-chunk_d // 8) * 8
    max_code = np.float32(table.shape[1] - 1)
    ones = np.zeros((-(-rows // ROWS), words * 8, ROWS), np.int16)
    scale = np.empty((rows, chunks), np.float32)
    for item in nb.prange(rows * chunks):
        n, c = item // chunks, item % chunks
        piece = x[n, c * chunk_d : min((c + 1) * chunk_d, depth)]
        scale[n, c] = row_scale(piece, max_code)
        out = ones[n // ROWS, c * step : c * step + piece.shape[0], n % ROWS]
        quantise(piece, scale[n, c], max_code, table, out)
    return ones, scale


@compiled
def build_tables(ones, used, first_dim, counts_of, tables):
    """Fill tables int64 (8, 256) with the packed signed counts of 8 dimensions, ones int16 (8, ROWS).

    counts_of: see `counts_by_magnitude`. Only the first `used` rows may have ones: a lone row, as in every draft step,
    takes half the time. The loops' lengths are constants, known not to overlap their stores: two to three times faster.
    """
    for i in range(8):
        of_dim = counts_of[(first_dim + i) % counts_of.shape[0]]
        k0, k1, k2, k3 = ones[i, 0], ones[i, 1], ones[i, 2], ones[i, 3]
        one0, one1, one2, one3 = _field(k0, 0), _field(k1, 1), _field(k2, 2), _field(k3, 3)
        c0, c1, c2, c3 = of_dim[abs(k0)], of_dim[abs(k1)], of_dim[abs(k2)], of_dim[abs(k3)]
        if of_dim.shape[1] != _SIGN_BIT:
            for j in range(256):
                tables[i, j] = one0 * c0[j] + one1 * c1[j] + one2 * c2[j] + one3 * c3[j]
        elif used == 1:
            for j in range(_SIGN_BIT):
                value = one0 * c0[j]
                tables[i, j] = value
                tables[i, _SIGN_BIT + j] = -value
        else:
            for j in range(_SIGN_BIT):
                value = one0 * c0[j] + one1 * c1[j] + one2 * c2[j] + one3 * c3[j]
                tables[i, j] = value
                tables[i, _SIGN_BIT + j] = -value


@compiled
def _field(ones, r):
    """Return 1 in field r of a packed sum, with the sign of `ones`."""
    return np.int64(1 if ones >= 0 else -1) << (16 * r)


@compiled
def look_up(tables, words, ahead, out):
    """Add to out int64 (M,) the eight look-ups of each word of words uint64 (M,); `ahead` are the words read next."""
    byte = np.uint64(255)
    for m in range(words.shape[0]):
        w = words[m]
        out[m] += (
            tables[0, w & byte]
            + tables[1, (w >> np.uint64(8)) & byte]
            + tables[2, (w >> np.uint64(16)) & byte]
            + tables[3, (w >> np.uint64(24)) & byte]
            + tables[4, (w >> np.uint64(32)) & byte]
            + tables[5, (w >> np.uint64(40)) & byte]
            + tables[6, (w >> np.uint64(48)) & byte]
            + tables[7, w >> np.uint64(56)]
        )
        if m % 8 == 0:
            prefetch(ahead, m)


@compiled(parallel=True)
def run_sums(ones, rows, words, counts_of, chunk_words):
    """Return the packed sums of every run, int64 (groups, runs, M); a run is at most RUN words of one chunk.

    Parallel over (run, group): no thread adds to another's sum, and integers make the order irrelevant. Groups of one
    run follow each other, so that each thread gets as many lone rows, whose tables are cheap, as the others.
    """
    groups, columns = ones.shape[0], words.shape[1]
    chunk_runs = -(-chunk_words // RUN)
    whole, rest = words.shape[0] // chunk_words, words.shape[0] % chunk_words
    runs = whole * chunk_runs + -(-rest // RUN)
    out = np.empty((groups, runs, columns), np.int64)
    for item in nb.prange(groups * runs):
        run, group = item // groups, item % groups
        chunk_start = run // chunk_runs * chunk_words
        first = chunk_start + run % chunk_runs * RUN
        last = min(first + RUN, chunk_start + chunk_words, words.shape[0])
        tables = np.empty((8, 256), np.int64)
        out[group, run] = EMPTY
        for word in range(first, last):
            eight = ones[group, word * 8 : word * 8 + 8]
            build_tables(eight, min(ROWS, rows - group * ROWS), (word - chunk_start) * 8, counts_of, tables)
            look_up(tables, words[word], words[min(word + 1, words.shape[0] - 1)], out[group, run])
    return out


@compiled
def add_field(packed, r, out):
    """Add field r of packed int64 (M,), sums that started as EMPTY, to out int32 (M,)."""
    for m in range(packed.shape[0]):
        out[m] += np.int32((packed[m] >> (16 * r)) & 0xFFFF) - np.int32(0x8000)


@compiled
def _rescale(sums, r, scale_a, scale_b, first, last, chunk_runs, out):
    """Write columns first..last-1 of a row, float32 (M,): sum over chunks, in order, of (s_a s_b) * count sum.

    sums: packed int64 (runs, columns), the row's in field r.  scale_a: (chunks,).  scale_b: (chunks, columns).
    """
    out[:] = 0.0
    part = np.empty(last - first, np.int32)
    for c in range(scale_b.shape[0]):
        part[:] = 0
        for run in range(c * chunk_runs, min((c + 1) * chunk_runs, sums.shape[0])):
            add_field(sums[run, first:last], r, part)
        scale = scale_b[c, first:last]
        for m in range(part.shape[0]):
            out[m] += (scale_a[c] * scale[m]) * np.float32(part[m])


def _unpack_total(sums: np.ndarray, rows: int) -> np.ndarray:
    """Return packed sums (groups, runs, M) as totals int32 (rows, M)."""
    out = np.zeros((rows, sums.shape[2]), np.int32)
    for n in range(rows):
        for run in sums[n // ROWS]:
            add_field(run, n % ROWS, out[n])
    return out
