"""Keys and values as the attention of a GPU reads them: encoded once, when they are written, in Triton.

They stay as code words: four dimensions of a position in an int32. A key's lie `capacity` apart, so that the lanes of a
warp find neighbouring keys side by side; a value's lie side by side, for lanes that run over channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from scspec.invariant.triton import launch
from scspec.sc.triton_encoding import clipped_code, magnitude_bits, row_scale

#: What differs between calls must not make another binary, which could add in another order. A slot's part of a store
#: of odd capacity is not aligned to 16 bytes, nor is its start.
ONE_BINARY = {
    "do_not_specialize": ["steps", "capacity", "words"],
    "do_not_specialize_on_alignment": [
        *("query", "key", "value", "qkv", "out", "start"),
        *("k_words", "v_words", "k_scale", "v_scale"),
    ],
}


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
        WORDS=padded_words(head_dim),
        num_warps=1,
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
        WORDS=padded_words(head_dim),
        num_warps=1,
    )
    return query


def padded_words(head_dim: int) -> int:
    return triton.next_power_of_2(-(-head_dim // 4))


@triton.jit
def dims(WORDS: tl.constexpr):
    """Return the dimensions of all bytes of a head's words, int32 (WORDS, 4)."""
    return 4 * tl.arange(0, WORDS)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def head_at(x, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Return the head at x, float32 (WORDS, 4), zero-padded."""
    dim = dims(WORDS)
    return tl.load(x + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _rotated_head(x, cos, sin, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr):
    """Return the head at x rotated by the angles at cos and sin, rounded to x's dtype, (WORDS, 4)."""
    dim = dims(WORDS)
    inside, low = dim < HEAD_DIM, dim < HEAD_DIM // 2
    partner = tl.where(low, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2)
    across = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    across = tl.where(low, -across, across) * tl.load(sin + dim, mask=inside, other=0.0)
    along = head_at(x, HEAD_DIM, WORDS) * tl.load(cos + dim, mask=inside, other=0.0)
    return (along + across).to(x.dtype.element_ty)


@triton.jit
def encoded_head(head, MAX_CODE: tl.constexpr):
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


@triton.jit(**ONE_BINARY)
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
    codes, scale = encoded_head(head_at(key + x, HEAD_DIM, WORDS), MAX_CODE)
    _write_key(_packed(codes), scale, k_words, k_scale, slot, position, capacity, words, WORDS)
    codes, scale = encoded_head(head_at(value + x, HEAD_DIM, WORDS), MAX_CODE)
    _write_value(_packed(codes), scale, v_words, v_scale, slot, position, capacity, words, WORDS)


@triton.jit(**ONE_BINARY)
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
        dim = dims(WORDS)
        tl.store(to + dim, _rotated_head(x, cos, sin, HEAD_DIM, WORDS), mask=dim < HEAD_DIM)
    elif head < HEADS + KV_HEADS:
        codes, scale = encoded_head(_rotated_head(x, cos, sin, HEAD_DIM, WORDS).to(tl.float32), MAX_CODE)
        slot += head - HEADS
        _write_key(_packed(codes), scale, k_words, k_scale, slot, position, capacity, words, WORDS)
    else:
        codes, scale = encoded_head(head_at(x, HEAD_DIM, WORDS), MAX_CODE)
        slot += head - HEADS - KV_HEADS
        _write_value(_packed(codes), scale, v_words, v_scale, slot, position, capacity, words, WORDS)
