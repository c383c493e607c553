"""The forward of a patched model on the CPU: one compiled call a decoder layer.

The kernels and their bits are those of the module tree; what is saved is the walk through it: between two kernels it
took longer than a draft step's norms, rotary, activation and encoding together.

Not covered: biases, norms of queries and keys, and the scopes and modes that `fits` refuses; they run through the
module tree.
"""

import numba as nb
import numpy as np
import torch

from scspec.attention import SC_CAUSAL
from scspec.decoding.cache import KVCache
from scspec.invariant.cpu import rms_norm, rotated_heads, silu_mul
from scspec.jit import compiled
from scspec.sc import cpu
from scspec.sc.cpu_attention import attend_rows, write_rows
from scspec.sc.knobs import stream_spec
from scspec.sc.streams import StreamSpec


def fits(model) -> bool:
    """Return whether parts and present knobs of a patched model allow the fused forward."""
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    linears = attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj
    return (
        model.sc_knobs.backend == cpu.NAME
        and model.sc_knobs.batch_invariant
        and attention.scspec_attention.path == SC_CAUSAL
        and attention.q_proj.shared.will_join
        and all(linear.bias is None for linear in linears)
        and not hasattr(attention, "q_norm")
    )


def forward(model, input_ids: torch.Tensor, cache: KVCache, logits_to_keep: int) -> torch.Tensor:
    """Return the logits float32 (B, k, V) of the last k new tokens (0: all) and write their K and V; input_ids (B, T).

    The caller advances the cache.
    """
    nb.get_num_threads()  # starts numba's threads, which code from its cache may rely on without doing so itself
    streams = _streams(model)
    start = np.array(cache.lengths, np.int64)
    rotary = model.model.rotary_emb.table(int(start.max()) + input_ids.shape[1], input_ids.device)
    rotary = tuple(table.numpy() for table in rotary)
    hidden = model.model.embed_tokens(input_ids).numpy()
    # All of this walk before the first kernel: afterwards the weights would have flushed it out of the caches.
    layers = [_arguments(layer, store, streams) for layer, store in zip(model.model.layers, cache.layers, strict=True)]
    for norms, weights, arrays, tables, scaling in layers:
        hidden = _decoder_layer(hidden, start, norms, weights, arrays, rotary, tables, scaling)
    rows = torch.from_numpy(hidden)
    return model.lm_head(model.model.norm(rows[:, -logits_to_keep:] if logits_to_keep else rows))


def _streams(model) -> dict[int, tuple[StreamSpec, tuple]]:
    """Return (streams, (K's table, the counts' table, factor)) by the identity of the knobs that a leaf reads."""
    specs = {id(knobs): stream_spec(knobs) for knobs in (model.sc_knobs, *model.sc_module_knobs.values())}
    found = {}
    for key, spec in specs.items():
        tables, factor = cpu.tables_of(spec)
        found[key] = spec, (*tables, factor)
    return found


def _arguments(layer, store, streams: dict) -> tuple:
    """Return (norms, weights, store, tables, scaling) of a decoder layer as `_decoder_layer` takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    attention.scspec_attention.check_store(store)
    spec, tables = streams[id(attention.scspec_attention.knobs)]
    store.check(spec)
    groups = [module.shared for module in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)]
    for group in groups:
        group.bring_up_to_date()
    weights = tuple(
        (group.weight.words, group.weight.scale, group.weight.chunk_d, *streams[id(group.members[0].knobs)][1])
        for group in groups
    )
    norms = tuple((norm.weight.numpy(), norm.eps) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    return norms, weights, store.arrays, tables, np.float32(attention.scaling)


@compiled
def _decoder_layer(hidden, start, norms, weights, store, rotary, tables, scaling):
    """Return hidden float32 (B, T, D) after one layer; row t of sequence b stands at position start[b] + t.

    norms: (weight, eps) of both; weights: (words, scale, chunk_d, *tables) of qkv, o, gate-up, down; store:
    EncodedKV.arrays; tables: (K's, the counts', factor) of the attention.
    """
    batch, steps, depth = hidden.shape
    residual = hidden.reshape(batch * steps, depth)
    qkv = cpu.linear_rows(rms_norm(residual, *norms[0]), *weights[0])
    query, key, value = rotated_heads(qkv, start, store[0].shape[1], *rotary)
    write_rows(key, value, start, *store, np.float32(tables[0].shape[1] - 1))
    mixed = attend_rows(query, start, *store, *tables, scaling).reshape(batch * steps, -1)
    residual = residual + cpu.linear_rows(mixed, *weights[1])
    inner = silu_mul(cpu.linear_rows(rms_norm(residual, *norms[1]), *weights[2]))
    residual = residual + cpu.linear_rows(inner, *weights[3])
    return residual.reshape(batch, steps, depth)
