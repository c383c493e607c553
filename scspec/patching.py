"""Rewire ONE model instance to stochastic computing: Hugging Face's module tree stays, its leaves are replaced.

Linear -> SCLinear, RMSNorm / SiLU / rotary -> batch-invariant ones, attention -> ours through transformers' attention
interface. The knobs live on `model.config`. Nothing of another instance, even of the same class, changes.

Not covered: where weights come from (`models`). Other model families than Llama's are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from scspec.decoding.cache import KVCache
from scspec.invariant import InvariantRMSNorm, InvariantRotary, InvariantSiLU
from scspec.invariant import cpu as invariant
from scspec.sc.attention import sc_attention
from scspec.sc.cpu_attention import EncodedKV, attend
from scspec.sc.knobs import SC_CONFIG_DEFAULTS, check_knobs, resolve_knobs, stream_spec
from scspec.sc.linear import SCLinear, SharedInput
from scspec.sc.matmul import resolve_backend

_ATTENTION_NAME = "scspec"
_ROPE_TYPES = ("default", "linear", "llama3")


def knobs_of(model: PreTrainedModel) -> dict:
    """Return the knobs now set on a patched model's config."""
    return {name: getattr(model.config, name) for name in SC_CONFIG_DEFAULTS}


def patch_model(
    model: PreTrainedModel, overrides: dict | str | None = None, *, keep_float_weights: bool = False
) -> PreTrainedModel:
    """Return `model`, rewired in place. Afterwards it obeys the seam of docs/architecture.md (`new_kv_cache`, ...).

    overrides: SC knobs (`SC_CONFIG_DEFAULTS`) or a preset's name. keep_float_weights: knobs that need the weights again
    (sc_prec, the linear scopes, switching SC on or off) stay free; costs the float copy's memory.
    Raises ValueError for a model or knob that is not modelled.
    """
    knobs = resolve_knobs(overrides)
    _check_supported(model)
    for name, value in knobs.items():
        setattr(model.config, name, value)
    model.eval().requires_grad_(False)
    model.sc_knobs = SimpleNamespace(**knobs)  # what the leaves read; refreshed from the config before each forward
    linears = _replace_leaves(model)
    _replace_attention(model)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)
    model.new_kv_cache = MethodType(_new_kv_cache, model)
    if not keep_float_weights:
        for linear in linears:
            linear.drop_float_weight()
    return model


def _check_supported(model: PreTrainedModel) -> None:
    config = model.config
    name = type(model).__name__
    if config.model_type != "llama" or not hasattr(model, "lm_head"):
        raise ValueError(f"model class {name}: only Llama-architecture causal LMs are modelled (LlamaForCausalLM)")
    if getattr(config, "_attn_implementation", None) == _ATTENTION_NAME:
        raise ValueError(f"model {name}: already patched; change the knobs on model.config instead")
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        raise ValueError(f"rope_type={rope!r}: modelled are {', '.join(_ROPE_TYPES)}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}: modelled is 'silu'")
    for feature in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size"):
        if getattr(config, feature, None):
            raise ValueError(f"{feature}={getattr(config, feature)!r}: this model feature is not modelled")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"model in {model.dtype} on {model.device}: on the CPU it must be torch.float32")


def _replace_leaves(model: PreTrainedModel) -> list[SCLinear]:
    """Replace the leaves; return the SCLinears. Raises ValueError if a layer keeps a leaf we do not know."""
    linears = []
    for path, module in list(model.named_modules()):
        new = _replacement(path, module, model.sc_knobs)
        if new is not None:
            model.set_submodule(path, new)
            linears += [new] if isinstance(new, SCLinear) else []
    known = (SCLinear, InvariantRMSNorm, InvariantSiLU, InvariantRotary, nn.Embedding)
    if model.config.batch_invariant:
        for path, module in model.named_modules():
            if not list(module.children()) and not isinstance(module, known):
                raise ValueError(f"module {path} ({type(module).__name__}): has no batch-invariant version")
    if not linears:
        raise ValueError(f"model class {type(model).__name__}: no linear layer found to replace")
    for layer in model.model.layers:
        SharedInput.join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        SharedInput.join([layer.mlp.gate_proj, layer.mlp.up_proj])
    return linears


def _replacement(path: str, module: nn.Module, knobs) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return SCLinear(module, knobs, "sc_lm_head" if path == "lm_head" else "use_sc_linear")
    if not knobs.batch_invariant:
        return None
    kind = type(module).__name__
    if kind == "LlamaRMSNorm":
        return InvariantRMSNorm(module.weight, module.variance_epsilon)
    if kind == "LlamaRotaryEmbedding":
        return InvariantRotary(module.inv_freq, module.attention_scaling)
    if path.endswith(".act_fn"):
        return InvariantSiLU()
    return None


def _replace_attention(model: PreTrainedModel) -> None:
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.layer_idx = index
        attention.scspec_attention = CausalAttention(model.config, model.sc_knobs)
    model.config._attn_implementation = _ATTENTION_NAME


def _attention_function(module, query, key, value, attention_mask, scaling, kv_cache=None, **_):
    """What transformers calls; the layer's own CausalAttention does the work."""
    starts = _starts(kv_cache, query.shape[0])
    store = None if kv_cache is None else kv_cache.layers[module.layer_idx]
    return module.scspec_attention(query, key, value, store, starts, scaling), None


def _starts(cache: KVCache | None, batch: int) -> Sequence[int]:
    """Return the absolute position of each sequence's first new row."""
    return (0,) * batch if cache is None else cache.lengths


def _no_mask(*_, **__) -> None:
    """Return None: our attention is causal by absolute position and takes no padding."""


AttentionInterface.register(_ATTENTION_NAME, _attention_function)
AttentionMaskInterface.register(_ATTENTION_NAME, _no_mask)


class CausalAttention:
    """The attention of one layer: which of three paths the knobs ask for, and the store each of them reads.

    SC in scope `causal` (EncodedKV); SC in a published scope, or plain arithmetic (FloatKV, generic); batch-invariant
    floats (FloatKV).
    """

    def __init__(self, config, knobs):
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.knobs = knobs

    def new_store(self, batch: int, capacity: int) -> "EncodedKV | FloatKV":
        shape = batch, self.kv_heads, self.head_dim, capacity
        if self._is_encoded():
            return EncodedKV.empty(*shape, stream_spec(self.knobs).max_code)
        return FloatKV.empty(*shape)

    def _is_encoded(self) -> bool:
        return self.knobs.use_sc_attn and self.knobs.sc_granularity == "causal"

    def __call__(self, query, key, value, store, starts: Sequence[int], scaling: float) -> torch.Tensor:
        """Return float32 (B, T, H, head_dim) for new rows, row t of sequence b at position starts[b] + t.

        Writes their K and V to `store`.
        """
        knobs = self.knobs
        store = self.new_store(query.shape[0], query.shape[2]) if store is None else store
        if isinstance(store, EncodedKV) != self._is_encoded():
            raise ValueError("use_sc_attn or sc_granularity changed: the KV cache was made for another attention")
        if self._is_encoded():
            return attend(query, key, value, store, starts, scaling, stream_spec(knobs))
        store.write(key, value, starts)
        if not knobs.use_sc_attn and knobs.batch_invariant:
            arrays = query.contiguous().numpy(), store.keys.numpy(), store.values.numpy()
            return torch.from_numpy(invariant.attention(*arrays, np.array(starts), np.float32(scaling)))
        lengths = [start + query.shape[2] for start in starts]
        rows = [self._generic(query[b : b + 1], *store.slot(b).read(n), scaling) for b, n in enumerate(lengths)]
        return torch.cat(rows)

    def _generic(self, query, keys, values, scaling: float) -> torch.Tensor:
        """Return attention (1, T, H, head_dim) of the last T rows of keys and values (1, H_kv, S, head_dim)."""
        knobs = self.knobs
        if not knobs.use_sc_attn:
            return _plain_attention(query, keys, values, scaling)
        backend = resolve_backend(None, query.device)
        softmax = _invariant_softmax if knobs.batch_invariant else _plain_softmax
        spec = stream_spec(knobs)
        return sc_attention(query, keys, values, scaling, spec, knobs.sc_granularity, softmax, backend)


@dataclass(frozen=True)
class FloatKV:
    """One layer's keys float32 (B, H_kv, head_dim, capacity) and values (B, H_kv, capacity, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, head_dim: int, capacity: int) -> "FloatKV":
        """Return a store with room for `capacity` positions."""
        keys, values = (batch, kv_heads, head_dim, capacity), (batch, kv_heads, capacity, head_dim)
        return cls(torch.zeros(keys), torch.zeros(values))

    def slot(self, b: int) -> "FloatKV":
        """Return the store of sequence b alone, a view."""
        return FloatKV(self.keys[b : b + 1], self.values[b : b + 1])

    def write(self, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int]) -> None:
        """Store row t of key, value (B, H_kv, T, head_dim) at position starts[b] + t of sequence b."""
        for b, start in enumerate(starts):
            last = start + key.shape[2]
            self.keys[b, ..., start:last] = key[b].transpose(1, 2)
            self.values[b, :, start:last] = value[b]

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `length` keys and values, (B, H_kv, length, head_dim)."""
        return self.keys[..., :length].transpose(2, 3), self.values[:, :, :length]


def _invariant_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(invariant.softmax_rows(scores.contiguous().numpy(), visible.numpy()))


def _plain_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    hidden = torch.arange(scores.shape[1], device=scores.device) >= visible[:, None]
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)


def _plain_attention(query, keys, values, scaling: float) -> torch.Tensor:
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    scores = (query @ keys.transpose(2, 3)) * scaling
    steps, total = scores.shape[2:]
    visible = torch.arange(total - steps + 1, total + 1).repeat(scores.shape[0] * scores.shape[1])
    probs = _plain_softmax(scores.reshape(-1, total), visible).view_as(scores)
    return (probs @ values).transpose(1, 2)


def _new_kv_cache(model: PreTrainedModel, batch: int, capacity: int) -> KVCache:
    """Return an empty cache for `batch` sequences of up to `capacity` tokens."""
    _refresh_knobs(model)
    stores = [layer.self_attn.scspec_attention.new_store(batch, capacity) for layer in model.model.layers]
    return KVCache(batch, capacity, stores)


def _refresh_knobs(model: PreTrainedModel) -> None:
    """Check the knobs on the config and hand them to the leaves. The switch of the leaves themselves is not one."""
    knobs = knobs_of(model)
    check_knobs(knobs)
    if knobs["batch_invariant"] != model.sc_knobs.batch_invariant:
        raise ValueError("batch_invariant: fixed when the model was patched; load it again with the other value")
    model.sc_knobs.__dict__.update(knobs)


def _before_forward(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Check the knobs, give the new rows their absolute positions, and keep transformers' own caches out."""
    _refresh_knobs(model)
    ids = args[0] if args else kwargs["input_ids"]
    for refused in ("attention_mask", "past_key_values", "inputs_embeds"):
        if kwargs.get(refused) is not None:
            raise ValueError(f"{refused}: not supported; every row of input_ids is a token, the cache is kv_cache")
    cache = kwargs.get("kv_cache")
    starts = _starts(cache, ids.shape[0])
    if cache is not None:
        if ids.shape[0] != cache.batch:
            raise ValueError(f"input_ids has {ids.shape[0]} sequences; the KV cache was made for {cache.batch}")
        if max(starts) + ids.shape[1] > cache.capacity:
            raise ValueError(f"KV cache: {max(starts)} + {ids.shape[1]} tokens; its capacity is {cache.capacity}")
    positions = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return args, {**kwargs, "position_ids": positions, "use_cache": False}


def _after_forward(model: PreTrainedModel, args: tuple, kwargs: dict, output) -> None:
    if kwargs.get("kv_cache") is not None:
        ids = args[0] if args else kwargs["input_ids"]
        kwargs["kv_cache"].advance(ids.shape[1])
