"""SC attention in scope `causal` on the GPU: Triton, over the same tables and formulas as `cpu_attention`.

Keys and values are encoded once, when they are written, and stay as code words: four dimensions of a position in an
int32. Every look-up reads `counts[dimension, K]`, 128 codes in one 128-byte line: the lanes of a warp run over keys in
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
from scspec.sc.triton_encoding import clipped_code, magnitude_bits, row_scale

#: Keys that one program scores, positions of one step of P @ V. Measured on an H100, one row, 32 heads of 128, 256
#: positions: 32, 64 and 128 keys 5.7, 5.9 and 8.5 us; 32, 64 and 128 positions within 4 % of each other.
KEYS, POSITIONS = 64, 64
BLOCK = 512  # positions of one step of the softmax: it fixes the order of the sum
SCRATCH = 2**25  # scores kept at a time, float32; a prefill with more is cut
_WRITE_WARPS, _SCORE_WARPS, _LIST_WARPS, _MIX_WARPS = 1, 8, 8, 8
#: What differs between calls must not make another binary, which could add in another order. A slot's part of a store
#: of odd capacity is not aligned to 16 bytes, nor is its start.
_ONE_BINARY = {
    "do_not_specialize": ["steps", "capacity", "words"],
    "do_not_specialize_on_alignment": [
        *("query", "key", "value", "qkv", "out", "start"),
        *("k_words", "v_words", "k_scale", "v_scale"),
    ],
}
_CODES = tl.constexpr(128)  # codes in a line of the tables
_DIMS = tl.constexpr(DIMS)
_ONES_BITS = tl.constexpr(9)  # K <= 256 in the low bits of an entry of the list of active positions


@dataclass(frozen=True)
class DeviceKV:
    """The codes of one layer's keys and values; B sequences, H_kv heads, `capacity` positions.

    k_words: int32 (B, H_kv, ceil(head_dim / 4), capacity); byte i of word w is the code of dimension 4w + i, sign in
    its bit 7.  v_words: int32 (B, H_kv, capacity, ceil(head_dim / 4)), likewise.
    k_scale, v_scale: float32 (B, H_kv, capacity).  max_code: the q they were encoded with.
    """

    k_words: torch.Tensor
    v_words: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    max_code: int

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, capacity: int, max_code: int, device: torch.device
    ) -> "DeviceKV":
        """Return a store with room for `capacity` positions on `device`."""
        words = -(-head_dim // 4)
        return cls(
            torch.zeros(batch, kv_heads, words, capacity, dtype=torch.int32, device=device),
            torch.zeros(batch, kv_heads, capacity, words, dtype=torch.int32, device=device),
            torch.zeros(batch, kv_heads, capacity, device=device),
            torch.zeros(batch, kv_heads, capacity, device=device),
            max_code,
        )

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return self.k_words.shape[3]

    @property
    def words(self) -> int:
        """Words of a head."""
        return self.k_words.shape[2]

    def slot(self, b: int) -> "DeviceKV":
        """Return the store of sequence b alone, sharing memory."""
        parts = (x[b : b + 1] for x in (self.k_words, self.v_words, self.k_scale, self.v_scale))
        return DeviceKV(*parts, self.max_code)


def write(key: torch.Tensor, value: torch.Tensor, store: DeviceKV, start: torch.Tensor) -> None:
    """Encode key, value (B, T, H_kv, head_dim) per position and KV head into positions start[b]..start[b]+T-1.

    start: int32 (B,) on the device; start[b] + T <= capacity is the caller's promise (a check would be a host sync).
    """
    batch, steps, kv_heads, head_dim = key.shape
    launch(
        _write_kernel,
        (batch * steps, kv_heads),
        key.contiguous(),
        value.contiguous(),
        store.k_words,
        store.v_words,
        store.k_scale,
        store.v_scale,
        start,
        steps,
        store.capacity,
        store.words,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        MAX_CODE=store.max_code,
        WORDS=_padded_words(head_dim),
        num_warps=_WRITE_WARPS,
    )


def rotate_and_write(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, store: DeviceKV, start: torch.Tensor, heads: int
) -> torch.Tensor:
    """Return the rotated queries (B, T, heads, head_dim) of qkv (B, T, (heads + 2 H_kv) * head_dim), in its dtype.

    Keys are rotated too, and encoded with the values as `write` does. cos, sin: float32 (positions, head_dim).
    Rotary (Su et al. 2021) as in Hugging Face's Llama (a dimension's partner lies head_dim / 2 away), computed in
    float32 and rounded to the dtype once.
    """
    batch, steps, width = qkv.shape
    kv_heads = store.k_words.shape[1]
    head_dim = width // (heads + 2 * kv_heads)
    query = torch.empty(batch, steps, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _rotate_and_write_kernel,
        (batch * steps, heads + 2 * kv_heads),
        qkv.contiguous(),
        query,
        cos,
        sin,
        store.k_words,
        store.v_words,
        store.k_scale,
        store.v_scale,
        start,
        steps,
        store.capacity,
        store.words,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        MAX_CODE=store.max_code,
        WORDS=_padded_words(head_dim),
        num_warps=_WRITE_WARPS,
    )
    return query


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
        WORDS=_padded_words(query.shape[3]),
        LINES=spec.stoc_len + 1,
        MAX_CODE=spec.max_code,
        KEYS=KEYS,
        num_warps=_SCORE_WARPS,
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
        num_warps=_LIST_WARPS,
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
        WORDS=_padded_words(query.shape[3]),
        LINES=spec.stoc_len + 1,
        POSITIONS=POSITIONS,
        num_warps=_MIX_WARPS,
    )
    return out


def _heads(query, store: DeviceKV) -> dict:
    """Return the constants that say which KV head a row reads."""
    return {"HEADS": query.shape[2], "SHARED": query.shape[2] // store.k_words.shape[1]}


def _padded_words(head_dim: int) -> int:
    return triton.next_power_of_2(-(-head_dim // 4))


@triton.jit
def _dims(WORDS: tl.constexpr):
    """Return the dimensions of all bytes of a head's words, int32 (WORDS, 4)."""
    return 4 * tl.arange(0, WORDS)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _head(x, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Return the head at x, float32 (WORDS, 4), zero-padded."""
    dim = _dims(WORDS)
    return tl.load(x + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _rotated_head(x, cos, sin, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Return the head at x rotated by the angles at cos and sin, rounded to x's dtype, (WORDS, 4)."""
    dim = _dims(WORDS)
    inside, low = dim < HEAD_DIM, dim < HEAD_DIM // 2
    partner = tl.where(low, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2)
    across = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    across = tl.where(low, -across, across) * tl.load(sin + dim, mask=inside, other=0.0)
    along = _head(x, HEAD_DIM, WORDS) * tl.load(cos + dim, mask=inside, other=0.0)
    return (along + across).to(x.dtype.element_ty)


@triton.jit
def _encode(head, MAX_CODE: tl.constexpr):
    """Return (signed codes int32, scale) of head float32 (WORDS, 4). A NaN gives the scale NaN, which then shows."""
    scale = row_scale(tl.max(tl.max(magnitude_bits(head), 1), 0), MAX_CODE * 1.0)
    return clipped_code(head, scale, MAX_CODE * 1.0), scale


@triton.jit
def _packed(codes):
    """Return the words int32 (WORDS,) of signed codes (WORDS, 4)."""
    byte = tl.abs(codes) | tl.where(codes < 0, 128, 0)
    return tl.sum(byte << (8 * tl.arange(0, 4))[None, :], 1)


@triton.jit
def _write_key(word, scale, words_at, scale_at, slot, position, capacity, words, WORDS: tl.constexpr):
    """Store a key's words, one every `capacity`; slot = sequence * H_kv + head."""
    w = tl.arange(0, WORDS)
    tl.store(words_at + (slot * words + w) * capacity + position, word, mask=w < words)
    tl.store(scale_at + slot * capacity + position, scale)


@triton.jit
def _write_value(word, scale, words_at, scale_at, slot, position, capacity, words, WORDS: tl.constexpr):
    """Store a value's words, side by side."""
    w = tl.arange(0, WORDS)
    tl.store(words_at + (slot * capacity + position) * words + w, word, mask=w < words)
    tl.store(scale_at + slot * capacity + position, scale)


@triton.jit(**_ONE_BINARY)
def _write_kernel(
    key,
    value,
    k_words,
    v_words,
    k_scale,
    v_scale,
    start,
    steps,
    capacity,
    words,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_CODE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program per (sequence and new row, KV head)."""
    row, head = tl.program_id(0), tl.program_id(1)
    b = row // steps
    position = tl.load(start + b) + row % steps
    slot = (b * KV_HEADS + head).to(tl.int64)
    x = (row * KV_HEADS + head).to(tl.int64) * HEAD_DIM
    codes, scale = _encode(_head(key + x, HEAD_DIM, WORDS), MAX_CODE)
    _write_key(_packed(codes), scale, k_words, k_scale, slot, position, capacity, words, WORDS)
    codes, scale = _encode(_head(value + x, HEAD_DIM, WORDS), MAX_CODE)
    _write_value(_packed(codes), scale, v_words, v_scale, slot, position, capacity, words, WORDS)


@triton.jit(**_ONE_BINARY)
def _rotate_and_write_kernel(
    qkv,
    query,
    cos,
    sin,
    k_words,
    v_words,
    k_scale,
    v_scale,
    start,
    steps,
    capacity,
    words,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_CODE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program per (sequence and new row, head of queries, keys, values)."""
    row, head = tl.program_id(0), tl.program_id(1)
    b = row // steps
    position = tl.load(start + b) + row % steps
    slot = (b * KV_HEADS).to(tl.int64)
    x = qkv + (row * (HEADS + 2 * KV_HEADS) + head).to(tl.int64) * HEAD_DIM
    cos += position * HEAD_DIM
    sin += position * HEAD_DIM
    if head < HEADS:
        to = query + (row * HEADS + head).to(tl.int64) * HEAD_DIM
        dim = _dims(WORDS)
        tl.store(to + dim, _rotated_head(x, cos, sin, HEAD_DIM, WORDS), mask=dim < HEAD_DIM)
    elif head < HEADS + KV_HEADS:
        codes, scale = _encode(_rotated_head(x, cos, sin, HEAD_DIM, WORDS).to(tl.float32), MAX_CODE)
        slot += head - HEADS
        _write_key(_packed(codes), scale, k_words, k_scale, slot, position, capacity, words, WORDS)
    else:
        codes, scale = _encode(_head(x, HEAD_DIM, WORDS), MAX_CODE)
        slot += head - HEADS - KV_HEADS
        _write_value(_packed(codes), scale, v_words, v_scale, slot, position, capacity, words, WORDS)


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


@triton.jit(**_ONE_BINARY)
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
    b = row // HEADS // steps
    visible = tl.load(start + b) + row // HEADS % steps + 1
    if first < visible:
        slot = (b * (HEADS // SHARED) + row % HEADS // SHARED).to(tl.int64)
        keys = first + tl.arange(0, KEYS)
        w = tl.arange(0, WORDS)
        head = _head(query + row.to(tl.int64) * HEAD_DIM, HEAD_DIM, WORDS)
        codes, q_scale = _encode(head, MAX_CODE)
        dim = _dims(WORDS)
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


@triton.jit(**_ONE_BINARY)
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
    b = row // HEADS // steps
    visible = tl.load(start + b) + row // HEADS % steps + 1
    slot = (b * (HEADS // SHARED) + row % HEADS // SHARED).to(tl.int64)
    scores += row.to(tl.int64) * capacity
    active, row_scale = _list_active(scores, v_scale + slot * capacity, ones, visible, MAX_CODE, BLOCK)
    tl.store(count + row, active)
    tl.store(scale + row, row_scale)


@triton.jit(**_ONE_BINARY)
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
    b = row // HEADS // steps
    slot = (b * (HEADS // SHARED) + row % HEADS // SHARED).to(tl.int64)
    active, row_scale = tl.load(count + row), tl.load(scale + row)
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
    _store_channels(out, sums0, 0, row_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums1, 1, row_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums2, 2, row_scale, factor, HEAD_DIM, WORDS)
    _store_channels(out, sums3, 3, row_scale, factor, HEAD_DIM, WORDS)


@triton.jit
def _store_channels(out, sums, i: tl.constexpr, scale, factor, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Store channels 4w + i, out pointing at 4w: scale * count * factor in that order."""
    value = (scale * tl.sum(sums, 0).to(tl.float32)) * factor
    tl.store(out + i, value.to(out.dtype.element_ty), mask=4 * tl.arange(0, WORDS) + i < HEAD_DIM)
