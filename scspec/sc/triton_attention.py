"""SC attention in scope `causal` on the GPU: Triton, over the same tables and formulas as `cpu_attention`.

Every look-up reads `counts[dimension, K]`, 128 codes in one 128-byte line: the lanes of a warp run over keys in
the scores and over channels in P @ V, where dimension and K are the same for all of them, so that one L1 access serves
them. Strides are passed unspecialised on purpose: knowing them divisible by 16, the compiler would give each lane
several neighbouring words and mix lines within a warp.

A row's floats come from one binary with blocks anchored at position 0; sums over counts are integers, whose order is
free. So neither neighbours nor the capacity nor the batch changes a bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from scspec.invariant.triton import launch
from scspec.sc.device import DIMS, DeviceTables
from scspec.sc.triton_encoding import clipped_code, magnitude_bits
from scspec.sc.triton_kv import ONE_BINARY, DeviceKV, dims, encoded_head, head_at, padded_words

#: Keys that one program scores, positions of one step of P @ V. Measured on an H100, one row, 32 heads of 128, 256
#: positions: 32, 64 and 128 keys 5.7, 5.9 and 8.5 us; 32, 64 and 128 positions within 4 % of each other.
KEYS, POSITIONS = 64, 64
BLOCK = 512  # positions of one step of the softmax: it fixes the order of the sum
SCRATCH = 2**25  # scores kept at a time, float32; a prefill with more is cut
_WARPS = 8  # of every kernel here
_CODES = tl.constexpr(128)  # codes in a line of the tables
_DIMS = tl.constexpr(DIMS)
_ONES_BITS = tl.constexpr(9)  # K <= 256 in the low bits of an entry of the list of active positions


def attend(
    query: torch.Tensor,
    store: DeviceKV,
    start: torch.Tensor,
    scaling: float,
    tables: DeviceTables,
    *,
    scored: Callable | None = None,
    mixed: Callable | None = None,
) -> torch.Tensor:
    """Return causal SC attention (B, T, H * head_dim) of query (B, T, H, head_dim), in its dtype.

    Query row t of sequence b sees positions 0..start[b]+t, all of them written already; start: int32 (B,) on the
    device.  scored, mixed: what counts, None for this backend's `scores` and `mix`.  Raises ValueError if the store
    was encoded with another sc_prec than the tables' streams have.
    """
    spec = tables.spec
    if store.max_code != spec.max_code:
        raise ValueError(f"sc_prec={spec.sc_prec}: the KV cache was encoded with largest code {store.max_code}")
    query, parts = query.contiguous(), []
    slab = max(1, SCRATCH // (query.shape[0] * query.shape[2] * store.capacity))
    for first in range(0, query.shape[1], slab):
        rows = query if slab >= query.shape[1] else query[:, first : first + slab].contiguous()
        begin = start + first if first else start
        found = (scored or scores)(rows, store, begin, scaling, tables)
        parts.append((mixed or mix)(found, active_positions(found, rows, store, begin, tables), rows, store, tables))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scores(query: torch.Tensor, store: DeviceKV, start, scaling: float, tables: DeviceTables) -> torch.Tensor:
    """Return scaled query-key products float32 (B * T * H, capacity), undefined beyond a row's visible keys."""
    found = torch.empty(query.shape[:3].numel(), store.capacity, device=query.device)
    operands = query, store.k_words, store.k_scale, start, tables.ones, tables.counts, found
    spec = tables.spec
    launch(
        _score_kernel,
        (found.shape[0], triton.cdiv(store.capacity, KEYS)),
        *operands,
        query.shape[1],
        store.capacity,
        store.words,
        spec.max_code**2 / spec.stoc_len,
        scaling,
        **_heads(query, store),
        HEAD_DIM=query.shape[3],
        WORDS=padded_words(query.shape[3]),
        LINES=spec.stoc_len + 1,
        MAX_CODE=spec.max_code,
        KEYS=KEYS,
        num_warps=_WARPS,
    )
    return found


@dataclass(frozen=True)
class ActivePositions:
    """What P @ V needs of each row's probabilities: how many positions have ones (int32), and the scale of P."""

    count: torch.Tensor
    scale: torch.Tensor


def active_positions(found: torch.Tensor, query, store: DeviceKV, start, tables: DeviceTables) -> ActivePositions:
    """Encode softmax(scores) folded with V's scales; `found` then holds the list of positions that have ones."""
    rows = found.shape[0]
    count = torch.empty(rows, dtype=torch.int32, device=found.device)
    scale = torch.empty(rows, device=found.device)
    launch(
        _list_kernel,
        (rows,),
        *(found, store.v_scale, start, tables.ones, count, scale),
        query.shape[1],
        store.capacity,
        **_heads(query, store),
        MAX_CODE=tables.spec.max_code,
        BLOCK=BLOCK,
        num_warps=_WARPS,
    )
    return ActivePositions(count, scale)


def mix(found: torch.Tensor, active: ActivePositions, query, store: DeviceKV, tables: DeviceTables) -> torch.Tensor:
    """Return P @ V (B, T, H * head_dim) in query's dtype, from the lists that `active_positions` made."""
    out = torch.empty_like(query).flatten(2)
    spec = tables.spec
    launch(
        _mix_kernel,
        (found.shape[0],),
        *(found, active.count, active.scale, store.v_words, tables.counts, out),
        query.shape[1],
        store.capacity,
        store.words,
        spec.max_code**2 / spec.stoc_len,
        **_heads(query, store),
        HEAD_DIM=query.shape[3],
        WORDS=padded_words(query.shape[3]),
        LINES=spec.stoc_len + 1,
        POSITIONS=POSITIONS,
        num_warps=_WARPS,
    )
    return out


def _heads(query, store: DeviceKV) -> dict:
    """Return the constants that say which KV head a row reads."""
    return {"HEADS": query.shape[2], "SHARED": query.shape[2] // store.k_words.shape[1]}


@triton.jit
def _visible(row, start, steps, HEADS: tl.constexpr):
    """Return how many positions a row = (sequence * steps + step) * HEADS + head sees."""
    return tl.load(start + row // HEADS // steps) + row // HEADS % steps + 1


@triton.jit
def _slot(row, steps, HEADS: tl.constexpr, SHARED: tl.constexpr):
    """Return which (sequence, KV head) a row reads, int64."""
    return (row // HEADS // steps * (HEADS // SHARED) + row % HEADS // SHARED).to(tl.int64)


@triton.jit
def _line(dim, ones, LINES: tl.constexpr):
    """Return where counts[dim mod 256, ones] begins, a multiple of 128."""
    return (dim % _DIMS * LINES + ones) * _CODES


@triton.jit
def _column(tile, i: tl.constexpr):
    """Return column i of tile int32 (WORDS, 4). Through a sum, which the compiler does not repeat in every lane."""
    return tl.sum(tl.where((tl.arange(0, 4) == i)[None, :], tile, 0), 1)


@triton.jit
def _signed_counts(counts, line, byte):
    """Return the count of code `byte` (sign in bit 7) in its line of the table, int32, with its sign."""
    count = tl.load(counts + (line + (byte & 127))).to(tl.int32)
    return tl.where(byte > 127, -count, count)


@triton.jit(**ONE_BINARY)
def _score_kernel(
    query,
    k_words,
    k_scale,
    start,
    ones,
    counts,
    scores,
    steps,
    capacity,
    words,
    factor,
    scaling,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WORDS: tl.constexpr,
    LINES: tl.constexpr,
    MAX_CODE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write the scaled query-key products of one row with one block of keys; blocks beyond the visible ones do nothing.

    One program per ((sequence, new row, head), block).
    """
    row, first = tl.program_id(0), tl.program_id(1) * KEYS
    visible = _visible(row, start, steps, HEADS)
    if first < visible:
        slot = _slot(row, steps, HEADS, SHARED)
        keys = first + tl.arange(0, KEYS)
        w = tl.arange(0, WORDS)
        head = head_at(query + row.to(tl.int64) * HEAD_DIM, HEAD_DIM, WORDS)
        codes, q_scale = encoded_head(head, MAX_CODE)
        dim = dims(WORDS)
        k = tl.load(ones + dim % _DIMS * _CODES + tl.abs(codes)).to(tl.int32)
        lines = _line(dim, k, LINES) | (codes < 0)
        inside = (w < words)[:, None] & (keys < visible)[None, :]
        k_words += slot * words * capacity
        word = tl.load(k_words + (w[:, None] * capacity + keys[None, :]), mask=inside, other=0)
        sums = tl.zeros((WORDS, KEYS), tl.int32)
        for i in tl.static_range(4):
            line = _column(lines, i)[:, None]
            sums += _signed_counts(counts, line & -_CODES, (word >> (8 * i)) & 255 ^ (line & 1) << 7)
        scale = tl.load(k_scale + slot * capacity + keys, mask=keys < visible, other=0.0)
        score = ((q_scale * scale) * tl.sum(sums, 0).to(tl.float32)) * factor * scaling
        tl.store(scores + row.to(tl.int64) * capacity + keys, score, mask=keys < visible)


@triton.jit
def _folded(scores, v_scale, at, visible, peak, total):
    """Return the probabilities of positions `at`, times the values' scales; zero beyond the visible ones."""
    score = tl.load(scores + at, mask=at < visible, other=float("-inf"))
    return tl.div_rn(tl.exp(score - peak), total) * tl.load(v_scale + at, mask=at < visible, other=0.0)


@triton.jit
def _list_active(scores, v_scale, ones, visible, MAX_CODE: tl.constexpr, BLOCK: tl.constexpr):
    """Encode the probabilities of a row of scores; return (how many positions have ones, the row's scale).

    The scores make room for the list of those positions (int32: position, then K in the low bits): most keys far back
    have no ones. An entry never comes to lie behind its own position, so no score is lost before it is read.
    """
    at = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, visible, BLOCK):
        peaks = tl.maximum(peaks, tl.load(scores + first + at, mask=first + at < visible, other=float("-inf")))
    peak = tl.max(peaks, 0)
    totals = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, visible, BLOCK):
        totals += tl.exp(tl.load(scores + first + at, mask=first + at < visible, other=float("-inf")) - peak)
    total = tl.sum(totals, 0)
    bits = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, visible, BLOCK):
        bits = tl.maximum(bits, magnitude_bits(_folded(scores, v_scale, first + at, visible, peak, total)))
    scale = tl.div_rn(tl.max(bits, 0).to(tl.float32, bitcast=True), MAX_CODE * 1.0)
    active = 0
    if scale > 0:  # not so in an all-zero row, nor where something is NaN
        entries = scores.to(tl.pointer_type(tl.int32))
        for first in range(0, visible, BLOCK):
            position = first + at
            folded = _folded(scores, v_scale, position, visible, peak, total)
            code = clipped_code(folded, scale, MAX_CODE * 1.0)
            k = tl.load(ones + position % _DIMS * _CODES + code).to(tl.int32)
            has_ones = (k > 0).to(tl.int32)
            entry = active + tl.cumsum(has_ones, 0) - 1
            tl.store(entries + entry, position << _ONES_BITS | k, mask=k > 0)
            active += tl.sum(has_ones, 0)
    return active, scale


@triton.jit(**ONE_BINARY)
def _list_kernel(
    scores,
    v_scale,
    start,
    ones,
    count,
    scale,
    steps,
    capacity,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    MAX_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax of one row of scores, as a list. One program per (sequence, new row, head)."""
    row = tl.program_id(0)
    visible = _visible(row, start, steps, HEADS)
    slot = _slot(row, steps, HEADS, SHARED)
    scores += row.to(tl.int64) * capacity
    active, p_scale = _list_active(scores, v_scale + slot * capacity, ones, visible, MAX_CODE, BLOCK)
    tl.store(count + row, active)
    tl.store(scale + row, p_scale)


@triton.jit(**ONE_BINARY)
def _mix_kernel(
    scores,
    count,
    scale,
    v_words,
    counts,
    out,
    steps,
    capacity,
    words,
    factor,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WORDS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The product of one row's list with the values. One program per (sequence, new row, head)."""
    row = tl.program_id(0)
    slot = _slot(row, steps, HEADS, SHARED)
    active, p_scale = tl.load(count + row), tl.load(scale + row)
    entries = (scores + row.to(tl.int64) * capacity).to(tl.pointer_type(tl.int32))
    w = tl.arange(0, WORDS)
    at = tl.arange(0, POSITIONS)
    v_words += slot * capacity * words
    sums0 = tl.zeros((POSITIONS, WORDS), tl.int32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, active, POSITIONS):
        # beyond the list: position 0 with K = 0, which counts nothing
        entry = tl.load(entries + first + at, mask=first + at < active, other=0)
        position = entry >> _ONES_BITS
        line = _line(position, entry & 511, LINES)[:, None]
        word = tl.load(v_words + position[:, None] * words + w[None, :], mask=(w < words)[None, :], other=0)
        sums0 += _signed_counts(counts, line, word & 255)
        sums1 += _signed_counts(counts, line, (word >> 8) & 255)
        sums2 += _signed_counts(counts, line, (word >> 16) & 255)
        sums3 += _signed_counts(counts, line, (word >> 24) & 255)
    out += row.to(tl.int64) * HEAD_DIM + 4 * w
    _store_channels(out, sums0, 0, p_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums1, 1, p_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums2, 2, p_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums3, 3, p_scale, factor, HEAD_DIM, WORDS)


@triton.jit
def _store_channels(out, sums, i: tl.constexpr, scale, factor, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Store channels 4w + i, out pointing at 4w: scale * count * factor in that order."""
    value = (scale * tl.sum(sums, 0).to(tl.float32)) * factor
    tl.store(out + i, value.to(out.dtype.element_ty), mask=4 * tl.arange(0, WORDS) + i < HEAD_DIM)
