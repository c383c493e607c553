"""The forward of a patched model on a GPU: a fixed list of kernel launches, replayed as a CUDA graph.

A few launches a layer over the weights that the leaves of the module tree hold; nothing waits for the device. All
positions come from a tensor on the device, so one graph serves a cache at every length. A shape that is seen for the
first time runs launch by launch (Triton compiles then), the second time it is captured. A model spread over
several devices always runs launch by launch; its rows move on from device to device between two layers.

Not covered: the scopes and modes that `fits` refuses; they run through the module tree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from scspec.attention import GENERIC, RowKV, attend_rows, write_rows
from scspec.decoding.cache import KVCache
from scspec.invariant import triton as invariant
from scspec.sc import triton_kv
from scspec.sc.knobs import stream_spec
from scspec.sc.linear import SharedInput
from scspec.sc.matmul import GPU_BACKENDS, backend_module
from scspec.sc.triton import ADD, SILU_MUL, STORE

#: Rows (sequences x new tokens) up to which a forward is worth a graph; above, launches hide behind the work.
GRAPH_ROWS = 256


def fits(model) -> bool:
    """Return whether the present knobs of a patched model allow the fused forward."""
    knobs = model.sc_knobs
    layer = model.model.layers[0]
    shared = [layer.self_attn.q_proj.shared, model.lm_head.shared]
    return (
        knobs.backend in GPU_BACKENDS
        and knobs.batch_invariant
        and layer.self_attn.scspec_attention.path != GENERIC
        and all(group.will_join for group in shared)
    )


class DeviceLayers(list):
    """The stores of all layers, and what else a fused forward over them needs (`state`)."""

    def __init__(self, stores: list, batch: int, devices: Iterable[torch.device]):
        super().__init__(stores)
        self.state = _State.empty(batch, devices)


@dataclass
class _State:
    """starts: int32 (B,) on each device, the position of each sequence's next row; `held` is what they say.

    graphs: by shape, captured when weights and knobs were as `stamp` says.
    """

    starts: dict[torch.device, torch.Tensor]
    held: tuple[int, ...] | None
    graphs: dict = field(default_factory=dict)
    stamp: tuple | None = None

    @classmethod
    def empty(cls, batch: int, devices: Iterable[torch.device]) -> "_State":
        """Return the state of a cache that holds nothing; devices: each layer's."""
        starts = {device: torch.zeros(batch, dtype=torch.int32, device=device) for device in dict.fromkeys(devices)}
        return cls(starts, (0,) * batch)

    def place(self, lengths: tuple[int, ...]) -> None:
        """Make `starts` say `lengths`; they mostly do, since a forward moves them on itself."""
        if self.held != lengths:
            for start in self.starts.values():
                start.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
            self.held = lengths

    def drop_outdated_graphs(self, stamp: tuple) -> None:
        """Let go of graphs captured under another stamp: what they read may be gone."""
        if self.stamp != stamp:
            self.graphs, self.stamp = {}, stamp


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor
    logits: torch.Tensor
    rotary: dict  # held, because the model's own tables are others once they have grown


def forward(model, input_ids: torch.Tensor, cache: KVCache, logits_to_keep: int) -> torch.Tensor:
    """Return the logits float32 (B, k, V) of the last k new tokens (0: all) and write their K and V; input_ids (B, T).

    The caller advances the cache.
    """
    layers = cache.layers
    whole = isinstance(layers, DeviceLayers)  # a slot's view is used once, for a prefill: no graph
    with torch.cuda.device_of(input_ids):
        devices = (attention.device for attention in model.attentions)
        state = layers.state if whole else _State.empty(cache.batch, devices)
        state.place(cache.lengths)
        held, state.held = state.held, None  # until the forward has ended, nobody knows what `starts` say
        rotary = {device: model.model.rotary_emb.table(cache.capacity, device) for device in state.starts}
        if input_ids.is_cuda and whole and len(rotary) == 1 and input_ids.numel() <= GRAPH_ROWS:
            logits = _replayed(model, input_ids, layers, state, rotary, logits_to_keep)
        else:
            logits = _launched(model, input_ids, layers, state.starts, rotary, logits_to_keep)
    state.held = tuple(length + input_ids.shape[1] for length in held)
    return logits


def _replayed(model, input_ids, layers, state: _State, rotary, logits_to_keep: int) -> torch.Tensor:
    state.drop_outdated_graphs((SharedInput.prepared, tuple(vars(model.sc_knobs).items())))
    key = (*input_ids.shape, logits_to_keep)
    if key not in state.graphs:
        logits = _launched(model, input_ids, layers, state.starts, rotary, logits_to_keep)
        state.graphs[key] = None
        return logits
    if state.graphs[key] is None:
        ids, graph = input_ids.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(input_ids.device)  # torch's own for captures stays on the first device that used it
        with torch.cuda.graph(graph, stream=stream):
            logits = _launched(model, ids, layers, state.starts, rotary, logits_to_keep)
        state.graphs[key] = _Graph(graph, ids, logits, rotary)
    captured = state.graphs[key]
    captured.ids.copy_(input_ids)
    captured.graph.replay()
    return captured.logits.clone()  # the next replay writes over it


def _launched(model, input_ids, layers, starts: dict, rotary: dict, logits_to_keep: int) -> torch.Tensor:
    """Return the logits, on the last layer's device."""
    hidden = model.model.embed_tokens(input_ids)
    for layer, store in zip(model.model.layers, layers, strict=True):
        device = layer.self_attn.scspec_attention.device
        hidden = _decoder_layer(layer, hidden.to(device), store, starts[device], rotary[device])
    for start in starts.values():
        start += input_ids.shape[1]
    kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    rows = _norm(model.model.norm, kept.reshape(-1, kept.shape[2]))
    return _product(model.lm_head.shared, rows).view(*kept.shape[:2], -1)


def _decoder_layer(layer, hidden: torch.Tensor, store, start: torch.Tensor, rotary: tuple) -> torch.Tensor:
    """Return hidden (B, T, D) after one layer; all on one device."""
    rows = hidden.view(-1, hidden.shape[2])
    normed = _norm(layer.input_layernorm, rows)
    mixed = _attention(layer.self_attn, normed.view(hidden.shape), store, start, *rotary)
    rows = _product(layer.self_attn.o_proj.shared, mixed, ADD, rows)
    inner = _product(layer.mlp.gate_proj.shared, _norm(layer.post_attention_layernorm, rows), SILU_MUL)
    return _product(layer.mlp.down_proj.shared, inner, ADD, rows).view(hidden.shape)


def _norm(module, x: torch.Tensor) -> torch.Tensor:
    return invariant.rms_norm(x, module.weight, float(module.eps))


def _attention(module, x: torch.Tensor, store, start, cos, sin) -> torch.Tensor:
    """Return the attention (B * T, H * head_dim) of x (B, T, D), before its output projection."""
    attention = module.scspec_attention
    attention.check_store(store)
    batch, steps, depth = x.shape
    head_dim, kv_heads = attention.head_dim, attention.kv_heads
    qkv = _product(module.q_proj.shared, x.view(-1, depth)).view(batch, steps, -1, head_dim)
    sizes = [qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads]
    if hasattr(module, "q_norm"):
        qkv = _with_normed_heads(module, *qkv.split(sizes, dim=2))
    if isinstance(store, RowKV):
        query, key, value = qkv.split(sizes, dim=2)
        query, key = (invariant.rotary(part, cos, sin, start) for part in (query, key))
        write_rows(key, value, store, start)
    else:
        query = triton_kv.rotate_and_write(qkv.flatten(2), cos, sin, store, start, sizes[0])
    return attend_rows(query, store, start, module.scaling, attention.knobs).view(batch * steps, -1)


def _with_normed_heads(module, query, key, value) -> torch.Tensor:
    """Return q, k and v side by side, (B, T, H + 2 H_kv, head_dim), each head of q and k normed (Qwen3)."""
    normed = (_norm(norm, x.flatten(0, 2)).view(x.shape) for norm, x in ((module.q_norm, query), (module.k_norm, key)))
    return torch.cat([*normed, value], dim=2)


def _product(shared: SharedInput, x: torch.Tensor, finish: int = STORE, addend: torch.Tensor | None = None):
    shared.bring_up_to_date()
    knobs = shared.members[0].knobs
    options = {"out_dtype": shared.out_dtype(x), "bias": shared.bias, "finish": finish, "addend": addend}
    return backend_module(knobs.backend).linear(x, shared.weight, stream_spec(knobs), **options)
