"""SC attention in scope `causal` on the CPU: numba, over the look-up kernels of `cpu`.

Keys and values are encoded once, when they are written (`write`), and stay as code words. Query heads that share a KV
head are rows of one look-up, so K and V are not copied for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba as nb
import numpy as np
import torch

from scspec.invariant.cpu import softmax_into
from scspec.jit import compiled
from scspec.sc.cpu import (
    EMPTY,
    ROWS,
    RUN,
    add_field,
    build_tables,
    clip_code,
    look_up,
    magnitude_peak,
    quantise,
    row_scale,
    tables_of,
)
from scspec.sc.streams import StreamSpec


@dataclass(frozen=True)
class EncodedKV:
    """The codes of one layer's keys and values; B sequences, H_kv heads, `capacity` positions.

    k_words: uint64 (B, H_kv, ceil(head_dim / 8), capacity), 8 dimensions of a key in a word.
    v_words: uint64 (B, H_kv, ceil(capacity / 8), head_dim), 8 positions of a channel in a word.
    k_scale, v_scale: float32 (B, H_kv, capacity).  max_code: the q they were encoded with.
    """

    k_words: np.ndarray
    v_words: np.ndarray
    k_scale: np.ndarray
    v_scale: np.ndarray
    max_code: int

    @classmethod
    def empty(cls, batch: int, kv_heads: int, head_dim: int, capacity: int, max_code: int) -> "EncodedKV":
        """Return a store with room for `capacity` positions."""
        return cls(
            np.zeros((batch, kv_heads, -(-head_dim // 8), capacity), np.uint64),
            np.zeros((batch, kv_heads, -(-capacity // 8), head_dim), np.uint64),
            np.zeros((batch, kv_heads, capacity), np.float32),
            np.zeros((batch, kv_heads, capacity), np.float32),
            max_code,
        )

    def slot(self, b: int) -> "EncodedKV":
        """Return the store of sequence b alone, a view."""
        return EncodedKV(*(array[b : b + 1] for array in self.arrays), self.max_code)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays, in the order in which the kernels take them."""
        return self.k_words, self.v_words, self.k_scale, self.v_scale

    def check(self, spec: StreamSpec) -> None:
        """Raise ValueError if the codes are of another sc_prec than `spec`."""
        if self.max_code != spec.max_code:
            raise ValueError(f"sc_prec={spec.sc_prec}: the KV cache was encoded with largest code {self.max_code}")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    store: EncodedKV,
    start: int | Sequence[int],
    scaling: float,
    spec: StreamSpec,
) -> torch.Tensor:
    """Return causal SC attention of the new rows, float32 (B, T, H, head_dim), and write their K and V.

    query: float32 (B, H, T, head_dim); key, value: (B, H_kv, T, head_dim); row t of sequence b stands at position
    start[b] + t (one int: the same for all), and the store holds all earlier ones.
    """
    store.check(spec)
    start = np.full(query.shape[0], start, np.int64)
    write_rows(key.contiguous().numpy(), value.contiguous().numpy(), start, *store.arrays, np.float32(spec.max_code))
    tables, factor = tables_of(spec)
    query, scaling = query.contiguous().numpy(), np.float32(scaling)
    return torch.from_numpy(attend_rows(query, start, *store.arrays, *tables, factor, scaling))


@compiled
def _code_byte(x, scale, max_code):
    code = clip_code(x / scale, max_code)
    magnitude = np.uint64(abs(code))
    return magnitude | np.uint64(128) if code < 0 else magnitude


@compiled
def write_rows(key, value, start, k_words, v_words, k_scale, v_scale, max_code):
    """Encode new keys and values (per position, per KV head) into the store's words; start: int64 (B,)."""
    batch, heads, count, head_dim = key.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(count):
                j = start[b] + t
                scale = k_scale[b, h, j] = row_scale(key[b, h, t], max_code)
                for block in range(k_words.shape[2]):
                    word = np.uint64(0)
                    for i in range(min(8, head_dim - block * 8)):
                        word |= _code_byte(key[b, h, t, block * 8 + i], scale, max_code) << np.uint64(8 * i)
                    k_words[b, h, block, j] = word
                scale = v_scale[b, h, j] = row_scale(value[b, h, t], max_code)
                shift = np.uint64(8 * (j % 8))
                for c in range(head_dim):
                    kept = v_words[b, h, j // 8, c] & ~(np.uint64(255) << shift)
                    v_words[b, h, j // 8, c] = kept | (_code_byte(value[b, h, t, c], scale, max_code) << shift)


@compiled(parallel=True)
def attend_rows(query, start, k_words, v_words, k_scale, v_scale, ones_of, counts_of, factor, scaling):
    """Return attention (B, T, H, head_dim); one task per (sequence, KV head, group of ROWS query rows)."""
    batch, heads, count, head_dim = query.shape
    kv_heads = k_words.shape[1]
    shared = heads // kv_heads
    groups = -(-shared * count // ROWS)
    out = np.empty((batch, count, heads, head_dim), np.float32)
    for item in nb.prange(batch * kv_heads * groups):
        b, h, group = item // (kv_heads * groups), item // groups % kv_heads, item % groups
        first, last = group * ROWS, min((group + 1) * ROWS, shared * count)
        keys = start[b] + (last - 1) // shared + 1  # row = t * shared + head: the last row sees the most keys
        scores = np.zeros((ROWS, keys), np.float32)
        rows = query[b, h * shared : (h + 1) * shared]
        _score(rows, first, last, k_words[b, h], k_scale[b, h], ones_of, counts_of, factor, scaling, scores)
        ones = np.zeros((-(-keys // 8) * 8, ROWS), np.int16)
        scale = np.zeros(ROWS, np.float32)
        for row in range(first, last):
            visible = start[b] + row // shared + 1
            r = row - first
            scale[r] = _encode_probabilities(scores[r, :visible], v_scale[b, h], ones_of, ones[:, r])
        sums = _block_sums(ones, v_words[b, h], head_dim, counts_of)
        for row in range(first, last):
            r = row - first
            for c in range(head_dim):
                value = (scale[r] * np.float32(sums[r, c])) * factor
                out[b, row // shared, h * shared + row % shared, c] = value
    return out


@compiled
def _score(rows, first, last, words, k_scale, ones_of, counts_of, factor, scaling, scores):
    """Write scaled query-key products of rows first..last-1 of rows (shared, T, head_dim) into scores (ROWS, keys)."""
    shared, _, head_dim = rows.shape
    keys = scores.shape[1]
    ones = np.zeros((words.shape[0] * 8, ROWS), np.int16)
    q_scale = np.zeros(ROWS, np.float32)
    max_code = np.float32(ones_of.shape[1] - 1)
    for row in range(first, last):
        x = rows[row % shared, row // shared]
        q_scale[row - first] = row_scale(x, max_code)
        quantise(x, q_scale[row - first], max_code, ones_of, ones[:head_dim, row - first])
    sums = _block_sums(ones, words, keys, counts_of)
    for r in range(last - first):
        for j in range(keys):
            scores[r, j] = ((q_scale[r] * k_scale[j]) * np.float32(sums[r, j])) * factor * scaling


@compiled
def _encode_probabilities(scores, v_scale, ones_of, ones):
    """Turn scores (visible,) into probabilities folded with V's scales, write their ones; return the row's scale."""
    softmax_into(scores, scores)
    for j in range(scores.shape[0]):
        scores[j] *= v_scale[j]
    max_code = np.float32(ones_of.shape[1] - 1)
    scale = magnitude_peak(scores) / max_code
    if scale > 0:
        quantise(scores, scale, max_code, ones_of, ones)
    return scale


@compiled
def _block_sums(ones, words, columns, counts_of):
    """Return the count sums int32 (ROWS, columns) of ones int16 (8 * blocks, ROWS) with words (blocks, columns ...)."""
    sums = np.zeros((ROWS, columns), np.int32)
    packed = np.full(columns, EMPTY)
    tables = np.empty((8, 256), np.int64)
    blocks = ones.shape[0] // 8
    for block in range(blocks):
        eight = ones[block * 8 : block * 8 + 8]
        if eight.any():  # most keys far back have no ones at all
            build_tables(eight, ROWS, block * 8, counts_of, tables)
            look_up(tables, words[block, :columns], words[min(block + 1, blocks - 1)], packed)
        if block % RUN == RUN - 1 or block == blocks - 1:
            for r in range(ROWS):
                add_field(packed, r, sums[r])
            packed[:] = EMPTY
    return sums
