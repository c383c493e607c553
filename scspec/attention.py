"""The attention of one decoder layer, and what it keeps of keys and values.

Three paths, as the knobs say; on a GPU the first two are Triton kernels over stores of their own layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scspec.families import head_dim
from scspec.invariant import cpu as invariant
from scspec.sc.attention import sc_attention
from scspec.sc.cpu_attention import EncodedKV, attend
from scspec.sc.knobs import stream_spec
from scspec.sc.matmul import GPU_BACKENDS, backend_module

SC_CAUSAL, FLOAT_INVARIANT, GENERIC = "SC, causal", "float, batch invariant", "generic"


class CausalAttention:
    """The attention of one layer: which of three paths the knobs ask for, and the store that it reads.

    SC in scope `causal` (EncodedKV, on a GPU DeviceKV); batch-invariant floats (FloatKV, on a GPU RowKV); SC in a
    published scope, or plain arithmetic (FloatKV; slow). knobs: names of `sc.knobs`, and `backend`. device: the
    layer's.
    """

    def __init__(self, config, knobs, device: torch.device):
        self.kv_heads, self.head_dim = config.num_key_value_heads, head_dim(config)
        self.knobs, self.device = knobs, device

    @property
    def path(self) -> str:
        """Which way the present knobs ask for."""
        if self.knobs.use_sc_attn:
            return SC_CAUSAL if self.knobs.sc_granularity == "causal" else GENERIC
        return FLOAT_INVARIANT if self.knobs.batch_invariant else GENERIC

    def new_store(self, batch: int, capacity: int, dtype: torch.dtype):
        """Return the empty store of the present path on the layer's device; dtype is that of floats on a GPU."""
        kind, shape = self.store_class, (batch, self.kv_heads, self.head_dim, capacity)
        if kind in (FloatKV, RowKV):
            return kind.empty(*shape, dtype, self.device)
        max_code = stream_spec(self.knobs).max_code
        return kind.empty(*shape, max_code) if kind is EncodedKV else kind.empty(*shape, max_code, self.device)

    @property
    def store_class(self) -> type:
        """What the present path reads keys and values from."""
        on_gpu = self.knobs.backend in GPU_BACKENDS
        if self.path == SC_CAUSAL:
            return _gpu_sc().DeviceKV if on_gpu else EncodedKV
        return RowKV if on_gpu and self.path == FLOAT_INVARIANT else FloatKV

    def check_store(self, store) -> None:
        """Raise ValueError if `store` was made for another path."""
        if type(store) is not self.store_class:
            raise ValueError("use_sc_attn or sc_granularity changed: the KV cache was made for another attention")

    def __call__(self, query, key, value, store, starts: Sequence[int], scaling: float) -> torch.Tensor:
        """Return (B, T, H, head_dim) for new rows, row t of sequence b at position starts[b] + t.

        query: (B, H, T, head_dim); key, value: (B, H_kv, T, head_dim). Writes their K and V to `store`.
        """
        self.check_store(store)
        if self.path == GENERIC:
            return self._generic(query, key, value, store, starts, scaling)
        if self.knobs.backend in GPU_BACKENDS:
            return self._on_gpu(query, key, value, store, starts, scaling)
        if self.path == SC_CAUSAL:
            return attend(query, key, value, store, starts, scaling, stream_spec(self.knobs))
        store.write(key, value, starts)
        arrays = query.contiguous().numpy(), store.keys.numpy(), store.values.numpy()
        return torch.from_numpy(invariant.attention(*arrays, np.array(starts), np.float32(scaling)))

    def _on_gpu(self, query, key, value, store, starts, scaling: float) -> torch.Tensor:
        start = torch.tensor(starts, dtype=torch.int32, device=query.device)
        write_rows(key.transpose(1, 2), value.transpose(1, 2), store, start)
        return attend_rows(query.transpose(1, 2), store, start, scaling, self.knobs).view(
            query.shape[0], query.shape[2], query.shape[1], query.shape[3]
        )

    def _generic(self, query, key, value, store: "FloatKV", starts, scaling: float) -> torch.Tensor:
        store.write(key, value, starts)
        rows = []
        for b, start in enumerate(starts):
            keys, values = store.slot(b).read(start + query.shape[2])
            rows.append(self._generic_rows(query[b : b + 1], keys, values, scaling))
        return torch.cat(rows)

    def _generic_rows(self, query, keys, values, scaling: float) -> torch.Tensor:
        """Return attention (1, T, H, head_dim) of the last T rows of keys and values (1, H_kv, S, head_dim)."""
        knobs = self.knobs
        if not knobs.use_sc_attn:
            return _plain_attention(query, keys, values, scaling)
        softmax = _invariant_softmax if knobs.batch_invariant else _plain_softmax
        operands = (x.float() for x in (query, keys, values))
        spec = stream_spec(knobs)
        out = sc_attention(*operands, scaling, spec, knobs.sc_granularity, softmax, knobs.backend)
        return out.to(query.dtype)


def write_rows(key, value, store, start: torch.Tensor) -> None:
    """Write key, value (B, T, H_kv, head_dim) at positions start[b] + t of a GPU store; start: int32 (B,)."""
    if isinstance(store, RowKV):
        _gpu_floats().write_kv(key, value, store.keys, store.values, start)
    else:
        _gpu_sc().write(key, value, store, start)


def attend_rows(query, store, start: torch.Tensor, scaling: float, knobs) -> torch.Tensor:
    """Return attention (B, T, H * head_dim) of query (B, T, H, head_dim) over a GPU store that holds its own rows."""
    if isinstance(store, RowKV):
        return _gpu_floats().attention(query, store.keys, store.values, start, scaling)
    from scspec.sc.device import device_tables

    tables = device_tables(stream_spec(knobs), query.device)
    return backend_module(knobs.backend).attend(query, store, start, scaling, tables)


def _gpu_sc():
    from scspec.sc import triton_kv

    return triton_kv


def _gpu_floats():
    from scspec.invariant import triton

    return triton


@dataclass(frozen=True)
class FloatKV:
    """One layer's keys (B, H_kv, head_dim, capacity) and values (B, H_kv, capacity, head_dim), as a CPU reads them."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, head_dim: int, capacity: int, dtype, device) -> "FloatKV":
        """Return a store with room for `capacity` positions."""
        keys, values = (batch, kv_heads, head_dim, capacity), (batch, kv_heads, capacity, head_dim)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in (keys, values)))

    def slot(self, b: int) -> "FloatKV":
        """Return the store of sequence b alone, a view."""
        return type(self)(self.keys[b : b + 1], self.values[b : b + 1])

    def write(self, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int]) -> None:
        """Store row t of key, value (B, H_kv, T, head_dim) at position starts[b] + t of sequence b."""
        for b, start in enumerate(starts):
            last = start + key.shape[2]
            self.keys[b, ..., start:last] = key[b].transpose(1, 2)
            self.values[b, :, start:last] = value[b]

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `length` keys and values, (B, H_kv, length, head_dim)."""
        return self.keys[..., :length].transpose(2, 3), self.values[:, :, :length]


@dataclass(frozen=True)
class RowKV:
    """One layer's keys and values (B, H_kv, capacity, head_dim), as the GPU reads them."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, head_dim: int, capacity: int, dtype, device) -> "RowKV":
        """Return a store with room for `capacity` positions."""
        shape = batch, kv_heads, capacity, head_dim
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def slot(self, b: int) -> "RowKV":
        """Return the store of sequence b alone, a view."""
        return RowKV(self.keys[b : b + 1], self.values[b : b + 1])


def _invariant_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if scores.is_cuda:
        return _gpu_floats().softmax_rows(scores, visible.to(torch.int32))
    return torch.from_numpy(invariant.softmax_rows(scores.contiguous().numpy(), visible.numpy()))


def _plain_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    hidden = torch.arange(scores.shape[1], device=scores.device) >= visible[:, None]
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)


def _plain_attention(query, keys, values, scaling: float) -> torch.Tensor:
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    scores = (query @ keys.transpose(2, 3)) * scaling
    steps, total = scores.shape[2:]
    visible = torch.arange(total - steps + 1, total + 1, device=query.device)
    visible = visible.repeat(scores.shape[0] * scores.shape[1])
    probs = _plain_softmax(scores.reshape(-1, total), visible).view_as(scores)
    return (probs @ values).transpose(1, 2)
