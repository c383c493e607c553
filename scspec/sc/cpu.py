"""Backend `cpu`: table look-ups in numba. Integer counts equal the reference's; floats follow `matmul` bit for bit.

For a fixed row of `a` and dimension d the gate's K is fixed, so a signed count is a function of the other operand's
code byte alone: a table of 256 entries. Four rows share one look-up: their signed counts are packed in one int64 as
four 16-bit fields that are summed as plain integers. A field holds a sum over UNIT = 64 dimensions
(|sum| <= 64 * 256 = 16384 < 2**15); fields are recovered low to high by sign extension.

Code bytes: bipolar = sign bit 7 | magnitude, unipolar = magnitude. Eight dimensions of one row of `b` lie in one uint64
word, so that a pass over the rows reads words in order and keeps its eight tables (16 KB) in the L1 cache.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np
import torch

from scspec.sc.encoding import SCALE_FLOOR, Encoded
from scspec.sc.streams import StreamSpec, count_table, ones_table

NAME = "cpu"
UNIT = 64
ROWS = 4
_JIT = {"cache": True, "nogil": True}


@dataclass(frozen=True)
class PackedWeight:
    """A weight (M, D), quantised per row and chunk, as the look-up kernel reads it.

    words: uint64 (units * 8, M); a chunk's D is padded to whole units with code 0, which counts nothing.
    scale: float32 (chunks, M).  depth: D.  chunk_d: dimensions of a chunk (D itself when not chunked).
    """

    words: np.ndarray
    scale: np.ndarray
    depth: int
    chunk_d: int

    @property
    def units_per_chunk(self) -> int:
        return -(-self.chunk_d // UNIT)


def pack(chunks: list[Encoded], chunk_d: int) -> PackedWeight:
    """Return bipolar codes (one Encoded (M, D_c) per chunk, in order) packed for `linear`."""
    depth = sum(chunk.codes.shape[1] for chunk in chunks)
    width = -(-chunk_d // UNIT) * UNIT
    words = [_pack_words(_code_bytes(chunk.codes.numpy(), bipolar=True), width) for chunk in chunks]
    scale = np.stack([chunk.scale.numpy()[:, 0] for chunk in chunks])
    return PackedWeight(np.ascontiguousarray(np.concatenate(words)), np.ascontiguousarray(scale), depth, chunk_d)


def counts(a_codes: torch.Tensor, b_codes: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    """Return sum over d of sign_a sign_b count: codes (N, D), (M, D) int16 -> int32 (N, M)."""
    bipolar = spec.mode == "bipolar"
    depth = a_codes.shape[1]
    width = -(-depth // UNIT) * UNIT
    words = _pack_words(_code_bytes(b_codes.contiguous().numpy(), bipolar), width)
    ones = _signed_ones(a_codes.contiguous().numpy(), ones_table(spec), width)
    sums = unit_sums(ones, words, count_table(spec), width // UNIT)
    return torch.from_numpy(_unpack_total(sums, a_codes.shape[0]))


def linear(x: torch.Tensor, weight: PackedWeight, spec: StreamSpec) -> torch.Tensor:
    """Return x @ weight.T, float32 (N, D) -> (N, M): `sc_matmul` per_row, bipolar, chunked, bit for bit."""
    ones, scale = encode_rows(x.numpy(), ones_table(spec), weight.chunk_d, weight.units_per_chunk)
    sums = unit_sums(ones, weight.words, count_table(spec), weight.units_per_chunk)
    factor = np.float32(spec.max_code**2 / spec.stoc_len)
    return torch.from_numpy(_rescale(sums, scale, weight.scale, weight.units_per_chunk, factor))


def _code_bytes(codes: np.ndarray, bipolar: bool) -> np.ndarray:
    magnitude = np.abs(codes).astype(np.uint8)
    return magnitude | ((codes < 0).astype(np.uint8) << 7) if bipolar else magnitude


def _pack_words(code_bytes: np.ndarray, width: int) -> np.ndarray:
    """Return bytes (M, D) zero-padded to (M, width) as little-endian words (width / 8, M)."""
    padded = np.zeros((code_bytes.shape[0], width), dtype=np.uint8)
    padded[:, : code_bytes.shape[1]] = code_bytes
    return np.ascontiguousarray(padded.view("<u8").T)


def _signed_ones(codes: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """Return K with the code's sign, int16 (groups, width, ROWS), zero-padded in rows and dimensions."""
    rows, depth = codes.shape
    out = np.zeros((-(-rows // ROWS) * ROWS, width), dtype=np.int16)
    ones = table[np.arange(depth) % table.shape[0], np.abs(codes)]
    out[:rows, :depth] = np.where(codes < 0, -ones, ones)
    return np.ascontiguousarray(out.reshape(-1, ROWS, width).transpose(0, 2, 1))


@nb.njit(**_JIT)
def clip_code(value, max_code):
    """Return rint(value) clipped to -max_code..max_code; NaN gives max_code, so that no index leaves its table."""
    code = np.rint(value)
    code = code if code < max_code else max_code
    return code if code > -max_code else -max_code


@nb.njit(**_JIT)
def quantise(x, scale, max_code, table, out):
    """Write the signed ones of x (float32 (D,)) into out int16 (D,); `scale` is the scope's. IEEE float32."""
    base = table.shape[0]
    for d in range(x.shape[0]):
        code = clip_code(x[d] / scale, max_code)
        ones = table[d % base, int(abs(code))]
        out[d] = -ones if code < 0 else ones


@nb.njit(**_JIT)
def magnitude_peak(x):
    """Return max |x|, NaN if any is NaN: magnitudes order like their bits, and a NaN's lie above infinity's."""
    bits = x.view(np.int32)
    peak = np.zeros(1, np.int32)
    for d in range(x.shape[0]):
        peak[0] = max(peak[0], bits[d] & np.int32(0x7FFFFFFF))
    return peak.view(np.float32)[0]


@nb.njit(**_JIT)
def row_scale(x, max_code):
    """Return max(|x|max, floor) / q of a row, float32. A NaN in x gives NaN, which the output then shows."""
    peak = magnitude_peak(x)
    return (np.float32(SCALE_FLOOR) if peak < np.float32(SCALE_FLOOR) else peak) / max_code


@nb.njit(**_JIT)
def encode_rows(x, table, chunk_d, units_per_chunk):
    """Return (signed ones int16 (groups, units * UNIT, ROWS), scales float32 (N, chunks)) of x float32 (N, D)."""
    rows, depth = x.shape
    chunks = -(-depth // chunk_d)
    max_code = np.float32(table.shape[1] - 1)
    ones = np.zeros((-(-rows // ROWS), chunks * units_per_chunk * UNIT, ROWS), np.int16)
    scale = np.empty((rows, chunks), np.float32)
    for n in range(rows):
        for c in range(chunks):
            piece = x[n, c * chunk_d : min((c + 1) * chunk_d, depth)]
            scale[n, c] = row_scale(piece, max_code)
            start = c * units_per_chunk * UNIT
            out = ones[n // ROWS, start : start + piece.shape[0], n % ROWS]
            quantise(piece, scale[n, c], max_code, table, out)
    return ones, scale


@nb.njit(**_JIT)
def build_tables(ones, first_dim, counts_of, tables):
    """Fill tables int64 (8, 256) with the packed signed counts of 8 dimensions, ones int16 (8, ROWS).

    Returns False, with the tables left as they were, if no row has a one in any of the dimensions.
    """
    busy = False
    for i in range(8):
        for r in range(ROWS):
            busy |= ones[i, r] != 0
    if not busy:
        return False
    base, codes = counts_of.shape[0], counts_of.shape[2]
    for i in range(8):
        of_dim = counts_of[(first_dim + i) % base]
        k0, k1, k2, k3 = ones[i, 0], ones[i, 1], ones[i, 2], ones[i, 3]
        c0, c1, c2, c3 = of_dim[abs(k0)], of_dim[abs(k1)], of_dim[abs(k2)], of_dim[abs(k3)]
        s0, s1 = np.int64(1 if k0 >= 0 else -1), np.int64(1 if k1 >= 0 else -1)
        s2, s3 = np.int64(1 if k2 >= 0 else -1), np.int64(1 if k3 >= 0 else -1)
        for j in range(codes):
            tables[i, j] = s0 * c0[j] + ((s1 * c1[j]) << 16) + ((s2 * c2[j]) << 32) + ((s3 * c3[j]) << 48)
        if codes <= 128:
            for j in range(codes):
                tables[i, 128 + j] = -tables[i, j]
    return True


@nb.njit(**_JIT)
def look_up(tables, words, out):
    """Add to out int64 (M,) the eight look-ups of each word of words uint64 (M,)."""
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


@nb.njit(parallel=True, **_JIT)
def unit_sums(ones, words, counts_of, units_per_chunk):
    """Return the packed sums of every unit, int64 (groups, units, M). Parallel over (group, unit): no thread adds to
    another's sum, and integers make the order irrelevant."""
    groups, units, columns = ones.shape[0], words.shape[0] // 8, words.shape[1]
    out = np.zeros((groups, units, columns), np.int64)
    for item in nb.prange(groups * units):
        group, unit = item // units, item % units
        tables = np.empty((8, 256), np.int64)
        for block in range(8):
            start = unit * UNIT + block * 8
            first_dim = (unit % units_per_chunk) * UNIT + block * 8
            if build_tables(ones[group, start : start + 8], first_dim, counts_of, tables):
                look_up(tables, words[unit * 8 + block], out[group, unit])
    return out


@nb.njit(**_JIT)
def add_fields(packed, out):
    """Add the four 16-bit fields of packed int64 (M,) to out int32 (ROWS, M)."""
    for m in range(packed.shape[0]):
        rest = packed[m]
        for r in range(ROWS):
            field = np.int64(np.int16(rest))
            out[r, m] += np.int32(field)
            rest = (rest - field) >> 16


@nb.njit(parallel=True, **_JIT)
def _rescale(sums, scale_a, scale_b, units_per_chunk, factor):
    """Return float32 (N, M): sum over chunks, in order, of (s_a s_b) * count sum; times factor."""
    rows, columns = scale_a.shape[0], scale_b.shape[1]
    out = np.empty((rows, columns), np.float32)
    blocks = -(-columns // 256)
    for item in nb.prange(sums.shape[0] * blocks):
        group, first = item // blocks, (item % blocks) * 256
        last = min(first + 256, columns)
        total = np.zeros((ROWS, last - first), np.float32)
        for c in range(scale_b.shape[0]):
            part = np.zeros((ROWS, last - first), np.int32)
            for u in range(c * units_per_chunk, (c + 1) * units_per_chunk):
                add_fields(sums[group, u, first:last], part)
            for r in range(min(ROWS, rows - group * ROWS)):
                s = scale_a[group * ROWS + r, c]
                for m in range(last - first):
                    total[r, m] += (s * scale_b[c, first + m]) * np.float32(part[r, m])
        for r in range(min(ROWS, rows - group * ROWS)):
            for m in range(last - first):
                out[group * ROWS + r, first + m] = total[r, m] * factor
    return out


def _unpack_total(sums: np.ndarray, rows: int) -> np.ndarray:
    """Return packed unit sums (groups, units, M) as totals int32 (rows, M)."""
    out = np.zeros((sums.shape[0], ROWS, sums.shape[2]), np.int32)
    for group in range(sums.shape[0]):
        for unit in range(sums.shape[1]):
            add_fields(sums[group, unit], out[group])
    return out.reshape(-1, sums.shape[2])[:rows]
