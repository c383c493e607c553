"""Rewire ONE model instance to stochastic computing: Hugging Face's module tree stays, its leaves are replaced.

Linear -> SCLinear, RMSNorm / SiLU / rotary -> batch-invariant ones, attention -> ours through transformers' attention
interface. The knobs live on `model.config`. Nothing of another instance, even of the same class, changes.

Not covered: where weights come from (`models`). Other model families than Llama's are refused.
"""

from collections.abc import Callable
from types import MethodType, SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from scspec import fused_cpu
from scspec.attention import CausalAttention
from scspec.decoding.cache import KVCache
from scspec.invariant import InvariantRMSNorm, InvariantRotary, InvariantSiLU
from scspec.sc.knobs import SC_CONFIG_DEFAULTS, check_knobs, resolve_knobs
from scspec.sc.linear import SCLinear, SharedInput
from scspec.sc.matmul import GPU_BACKENDS, resolve_backend

_ATTENTION_NAME = "scspec"
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROPE_TYPES = ("default", "linear", "llama3")


def knobs_of(model: PreTrainedModel) -> dict:
    """Return the knobs now set on a patched model's config."""
    return {name: getattr(model.config, name) for name in SC_CONFIG_DEFAULTS}


def patch_model(
    model: PreTrainedModel,
    overrides: dict | str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    keep_float_weights: bool = False,
) -> PreTrainedModel:
    """Return `model`, rewired in place. Afterwards it obeys the seam of docs/architecture.md (`new_kv_cache`, ...).

    overrides: SC knobs (`SC_CONFIG_DEFAULTS`) or a preset's name. device, dtype: where the model goes, and as what;
    None for what it is. Layers are moved, rounded and packed one after the other, so that no second copy of the float
    weights ever exists. backend: of every SC matmul, None for the device's default. keep_float_weights: knobs that need
    the weights again (sc_prec, the linear scopes, switching SC on or off) stay free; costs the float copy's memory.
    Raises ValueError for a model or knob that is not modelled.
    """
    knobs = resolve_knobs(overrides)
    device = model.device if device is None else torch.device(device)
    dtype = dtype or model.dtype
    backend = model_backend(backend, device)
    check_dtype(dtype, backend)
    _check_supported(model)
    for name, value in knobs.items():
        setattr(model.config, name, value)
    model.eval().requires_grad_(False)
    # What the leaves read; refreshed from the config before each forward.
    model.sc_knobs = SimpleNamespace(**knobs, backend=backend)
    _replace_leaves(model)
    _replace_attention(model)
    model.forward = MethodType(_forward, model)
    model.new_kv_cache = MethodType(_new_kv_cache, model)
    llama = model.model
    for part in (llama.embed_tokens, llama.rotary_emb, *llama.layers, llama.norm, model.lm_head):
        _settle(part, device, dtype, keep_float_weights)
    model.config.dtype = dtype
    return model


def model_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend of a model on `device`. Raises ValueError for one that packs no weights."""
    backend = resolve_backend(backend, device)
    if backend == "reference":
        raise ValueError(
            "backend='reference': multiplies, but packs no weights of a model; on the CPU allowed is 'cpu'"
        )
    return backend


def check_dtype(dtype: torch.dtype, backend: str) -> None:
    """Raise ValueError for a dtype of floats that models do not have on `backend`."""
    allowed = GPU_DTYPES if backend in GPU_BACKENDS else (torch.float32,)
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype}: on backend {backend!r} allowed are {', '.join(map(str, allowed))}")


def _settle(part: nn.Module, device: torch.device, dtype: torch.dtype, keep_float_weights: bool) -> None:
    """Move a part of the model to `device`, its parameters as `dtype`, in place, so that tied ones stay tied.

    What is not an SCLinear is copied even where it could stay: a norm that lies in a mapped file would keep the whole
    file in memory. Buffers keep their dtype: Hugging Face's rotary frequencies are float32 in every model.
    """
    linears = [module for module in part.modules() if isinstance(module, SCLinear)]
    for module in part.modules():
        for parameter in module.parameters(recurse=False) if module not in linears else ():
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for shared in dict.fromkeys(linear.shared for linear in linears):
        shared.settle(device, dtype, keep_float_weights)
    part.to(device)


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


def _replace_leaves(model: PreTrainedModel) -> None:
    """Replace the leaves; SCLinears that read the same tensor work together. Raises ValueError for one unknown."""
    for path, module in list(model.named_modules()):
        new = _replacement(path, module, model.sc_knobs)
        if new is not None:
            model.set_submodule(path, new)
    known = (SCLinear, InvariantRMSNorm, InvariantSiLU, InvariantRotary, nn.Embedding)
    if model.config.batch_invariant:
        for path, module in model.named_modules():
            if not list(module.children()) and not isinstance(module, known):
                raise ValueError(f"module {path} ({type(module).__name__}): has no batch-invariant version")
    for layer in model.model.layers:
        SharedInput.join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        SharedInput.join([layer.mlp.gate_proj, layer.mlp.up_proj])


def _replacement(path: str, module: nn.Module, knobs) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return SCLinear(module, knobs, "sc_lm_head" if path == "lm_head" else "use_sc_linear")
    if not knobs.batch_invariant:
        return None
    kind = type(module).__name__
    if kind == "LlamaRMSNorm":
        return InvariantRMSNorm(module.weight, module.variance_epsilon)
    if kind == "LlamaRotaryEmbedding":
        return InvariantRotary(module.inv_freq, module.attention_scaling, module.max_seq_len_cached)
    if path.endswith(".act_fn"):
        return InvariantSiLU()
    return None


def _replace_attention(model: PreTrainedModel) -> None:
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.layer_idx = index
        attention.scspec_attention = CausalAttention(model.config, model.sc_knobs)
    model.config._attn_implementation = _ATTENTION_NAME


def _attention_function(module, query, key, value, attention_mask, scaling, kv_cache, **_):
    """What transformers calls; the layer's own CausalAttention does the work."""
    store = kv_cache.layers[module.layer_idx]
    return module.scspec_attention(query, key, value, store, kv_cache.lengths, scaling), None


def _no_mask(*_, **__) -> None:
    """Return None: our attention is causal by absolute position and takes no padding."""


AttentionInterface.register(_ATTENTION_NAME, _attention_function)
AttentionMaskInterface.register(_ATTENTION_NAME, _no_mask)


def _new_kv_cache(model: PreTrainedModel, batch: int, capacity: int) -> KVCache:
    """Return an empty cache for `batch` sequences of up to `capacity` tokens."""
    _refresh_knobs(model)
    shape = batch, capacity, model.dtype, model.device
    stores = [layer.self_attn.scspec_attention.new_store(*shape) for layer in model.model.layers]
    if model.sc_knobs.backend in GPU_BACKENDS:
        from scspec import fused

        stores = fused.DeviceLayers(stores, batch, model.device)
    return KVCache(batch, capacity, stores)


def _refresh_knobs(model: PreTrainedModel) -> None:
    """Check the knobs on the config and hand them to the leaves. The switch of the leaves themselves is not one."""
    knobs = knobs_of(model)
    check_knobs(knobs)
    if knobs["batch_invariant"] != model.sc_knobs.batch_invariant:
        raise ValueError("batch_invariant: fixed when the model was patched; load it again with the other value")
    model.sc_knobs.__dict__.update(knobs)


def _forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    kv_cache: KVCache | None = None,
    logits_to_keep: int = 0,
    **refused,
) -> CausalLMOutput:
    """Return logits float32 (B, k, V) of the last k of the new tokens input_ids (B, T); k = 0: of all.

    Row t of sequence b stands at position kv_cache.lengths[b] + t; the cache is written and advanced.
    """
    _refresh_knobs(model)
    if refused:
        raise ValueError(
            f"{next(iter(refused))}: not supported; every row of input_ids is a token, the cache is kv_cache"
        )
    batch, steps = input_ids.shape
    cache = model.new_kv_cache(batch, steps) if kv_cache is None else kv_cache
    if batch != cache.batch:
        raise ValueError(f"input_ids has {batch} sequences; the KV cache was made for {cache.batch}")
    if max(cache.lengths) + steps > cache.capacity:
        raise ValueError(f"KV cache: {max(cache.lengths)} + {steps} tokens; its capacity is {cache.capacity}")
    logits = _logits(model, input_ids, cache, logits_to_keep)
    cache.advance(steps)
    return CausalLMOutput(logits=logits)


def _logits(model: PreTrainedModel, input_ids: torch.Tensor, cache: KVCache, logits_to_keep: int) -> torch.Tensor:
    forward = _fused_forward(model)
    if forward is not None:
        return forward(model, input_ids, cache, logits_to_keep)
    device = input_ids.device
    positions = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(input_ids.shape[1], device=device)
    options = {"position_ids": positions, "use_cache": False, "kv_cache": cache, "logits_to_keep": logits_to_keep}
    return type(model).forward(model, input_ids, **options).logits


def _fused_forward(model: PreTrainedModel) -> Callable | None:
    """Return the forward that skips the module tree, None where knobs, or a module put in by hand, need the tree."""
    if model.sc_knobs.backend in GPU_BACKENDS:
        from scspec import fused as fast
    else:
        fast = fused_cpu
    norms = (norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    ours = all(isinstance(norm, InvariantRMSNorm) for norm in norms)
    return fast.forward if ours and fast.fits(model) else None
