"""Rewire ONE model instance to stochastic computing: Hugging Face's module tree stays, its leaves are replaced.

Linear -> SCLinear, RMSNorm / SiLU / rotary -> batch-invariant ones, attention -> ours through transformers' attention
interface. The knobs live on `model.config`. Nothing of another instance, even of the same class, changes.

Not covered: where weights come from (`models`). Models of no family in `families` are refused.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from scspec import fused_cpu
from scspec.attention import CausalAttention
from scspec.decoding.cache import KVCache
from scspec.families import FAMILIES, Family, check_config
from scspec.invariant import InvariantRMSNorm, InvariantRotary, InvariantSiLU
from scspec.placement import Placement, check_dtype, layer_devices, model_backend, on_device, resolve_devices
from scspec.sc.knobs import (
    SC_CONFIG_DEFAULTS,
    Modules,
    Override,
    check_knobs,
    deciding_patterns,
    frozen_modules,
    resolve_knobs,
)
from scspec.sc.linear import SCLinear, SharedInput
from scspec.sc.matmul import GPU_BACKENDS

if TYPE_CHECKING:

    class PatchedModel(PreTrainedModel):
        """What `patch_model` makes of a model: no class of its own, but attributes more (Seam 1) and these parts."""

        model: Any  # the decoder, of a class of its family
        lm_head: Any
        new_kv_cache: Callable[[int, int], KVCache]
        sc_knobs: SimpleNamespace
        sc_module_knobs: dict[Override, SimpleNamespace]
        attentions: list[CausalAttention]
        wiring: "_Wiring"


_ATTENTION_NAME = "scspec"
#: Linears of a decoder layer that read one tensor.
_SHARED_INPUTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def knobs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the knobs now set on a patched model's config."""
    return {name: getattr(model.config, name) for name in SC_CONFIG_DEFAULTS}


def patch_model(
    model: PreTrainedModel,
    overrides: dict[str, Any] | str | None = None,
    *,
    device: Placement | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    keep_float_weights: bool = False,
) -> "PatchedModel":
    """Return `model`, rewired in place. Afterwards it obeys the seam of docs/architecture.md (`new_kv_cache`, ...).

    overrides: SC knobs (`SC_CONFIG_DEFAULTS`) or a preset's name. device, dtype: where the model goes, and as what;
    None for what it is. Of several devices the first has the embeddings, the last the LM head, and each its share of
    layers. Layers are moved, rounded and packed one after the other, so that no second copy of the float weights ever
    exists. backend: of every SC matmul, None for the device's default. keep_float_weights: knobs that need the weights
    again (sc_prec, the linear scopes, switching SC on or off) stay free; costs the float copy's memory. Raises
    ValueError for a model, knob or device that is not modelled.
    """
    knobs = resolve_knobs(overrides)
    available = resolve_devices(model.device if device is None else device)
    dtype = dtype or model.dtype
    backend = model_backend(backend, available[0])
    check_dtype(dtype, backend)
    _check_supported(model)
    _deciding_patterns(model, knobs["sc_modules"])
    model = cast("PatchedModel", model)  # which it becomes from here on
    devices = layer_devices(len(model.model.layers), available)
    for name, value in knobs.items():
        setattr(model.config, name, value)
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]  # transformers annotates no `eval`
    # What the leaves read; refreshed from the config before each forward.
    model.sc_knobs = SimpleNamespace(**{**knobs, "sc_modules": ()}, backend=backend)
    model.sc_module_knobs = {}  # the same with what `sc_modules` sets on top, by the items of what it sets
    spread = len(set(devices)) > 1
    if spread:  # tied weights part: each end has its own
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach(), requires_grad=False)
    _replace_leaves(model)
    _replace_attention(model, devices)
    _hand_out(model, knobs)
    model.forward = MethodType(_forward, model)
    model.new_kv_cache = MethodType(_new_kv_cache, model)
    decoder = model.model
    for part in (decoder.embed_tokens, decoder.rotary_emb):
        _settle(part, devices[0], dtype, keep_float_weights)
    for part, device in zip((*decoder.layers, decoder.norm, model.lm_head), (*devices, *devices[-1:] * 2), strict=True):
        _settle(part, device, dtype, keep_float_weights)
        if spread:
            part.forward = partial(on_device, part.forward, device)
    model.config.dtype = dtype
    model.wiring = _Wiring(model)
    return model


class _Wiring:
    """The module tree as `patch_model` left it; `holds` is asked before each forward, so it compares dicts at once."""

    def __init__(self, model: PreTrainedModel):
        modules = list(model.modules())
        self._children = [module._modules for module in modules]
        self._wired = [dict(children) for children in self._children]
        self._hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._modules = modules[1:]
        self._forwards = self._present_forwards()

    def holds(self) -> bool:
        """Return whether every module is the one put there, with the forward it had, and without a forward hook."""
        same = self._children == self._wired and self._present_forwards() == self._forwards
        return same and not any(self._hooks)

    def _present_forwards(self) -> list[Any]:
        return [vars(module).get("forward") for module in self._modules]


def _settle(part: nn.Module, device: torch.device, dtype: torch.dtype, keep_float_weights: bool) -> None:
    """Move a part of the model to `device`, its parameters as `dtype`, in place, so that tied ones stay tied.

    What is not an SCLinear's weight is copied even where it could stay: a norm that lies in a mapped file would keep
    the whole file in memory. Buffers keep their dtype: Hugging Face's rotary frequencies are float32 in every model.
    """
    linears = [module for module in part.modules() if isinstance(module, SCLinear)]
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (isinstance(module, SCLinear) and name == "weight"):
                parameter.data = parameter.data.to(device, dtype, copy=True)
    for shared in dict.fromkeys(linear.shared for linear in linears):
        shared.settle(device, dtype, keep_float_weights)
    part.to(device)


def _check_supported(model: PreTrainedModel) -> None:
    name = f"model class {type(model).__name__}"
    check_config(name, model.config)
    if not hasattr(model, "lm_head"):
        raise ValueError(f"{name}: has no LM head; modelled is {FAMILIES[model.config.model_type].causal_lm}")
    if getattr(model.config, "_attn_implementation", None) == _ATTENTION_NAME:
        raise ValueError(f"{name}: already patched; change the knobs on model.config instead")
    for path, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if own and list(module.children()):  # such as attention sinks, which our attention would leave out
            raise ValueError(
                f"{name}: parameter {path}.{own[0]} is not modelled; modelled are linears, norms and embeddings"
            )


def _replace_leaves(model: "PatchedModel") -> None:
    """Replace the leaves; SCLinears that read the same tensor work together. Raises ValueError for one unknown."""
    family = FAMILIES[model.config.model_type]
    for path, module in list(model.named_modules()):
        new = _replacement(path, module, model.sc_knobs, family)
        if new is not None:
            model.set_submodule(path, new)
    known = (SCLinear, InvariantRMSNorm, InvariantSiLU, InvariantRotary, nn.Embedding)
    if model.config.batch_invariant:
        for path, module in model.named_modules():
            if not list(module.children()) and not isinstance(module, known):
                raise ValueError(f"module {path} ({type(module).__name__}): has no batch-invariant version")
    for layer in model.model.layers:
        for names in _SHARED_INPUTS:
            SharedInput.join([layer.get_submodule(name) for name in names])


def _replacement(path: str, module: Any, knobs: SimpleNamespace, family: Family) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return SCLinear(module, knobs, "sc_lm_head" if path == "lm_head" else "use_sc_linear")
    if not knobs.batch_invariant:
        return None
    kind = type(module).__name__
    if kind == family.norm:
        return InvariantRMSNorm(module.weight, module.variance_epsilon)
    if kind == family.rotary:
        return InvariantRotary(module.inv_freq, module.attention_scaling, module.max_seq_len_cached)
    if path.endswith(".act_fn"):
        return InvariantSiLU()
    return None


def _replace_attention(model: "PatchedModel", devices: list[torch.device]) -> None:
    model.attentions = [CausalAttention(model.config, model.sc_knobs, device) for device in devices]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
        layer.self_attn.scspec_attention = model.attentions[index]
    model.config._attn_implementation = _ATTENTION_NAME


def _attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    kv_cache: KVCache,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; the layer's own CausalAttention does the work."""
    store = kv_cache.layers[module.layer_idx]
    return module.scspec_attention(query, key, value, store, kv_cache.lengths, scaling), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Return None: our attention is causal by absolute position and takes no padding."""


AttentionInterface.register(_ATTENTION_NAME, _attention_function)
AttentionMaskInterface.register(_ATTENTION_NAME, _no_mask)


def _new_kv_cache(model: "PatchedModel", batch: int, capacity: int) -> KVCache:
    """Return an empty cache for `batch` sequences of up to `capacity` tokens, at most the model's positions."""
    limit = model.config.max_position_embeddings
    if capacity > limit:
        raise ValueError(f"KV cache: capacity {capacity}; the model has {limit} positions (max_position_embeddings)")
    _refresh_knobs(model)
    stores = [attention.new_store(batch, capacity, model.dtype) for attention in model.attentions]
    if model.sc_knobs.backend in GPU_BACKENDS:
        from scspec import fused

        stores = fused.DeviceLayers(stores, batch, [attention.device for attention in model.attentions])
    return KVCache(batch, capacity, stores, owner=model)


def _refresh_knobs(model: "PatchedModel") -> None:
    """Check the knobs on the config and hand them to the leaves. The switch of the leaves themselves is not one."""
    knobs = knobs_of(model)
    check_knobs(knobs)
    if knobs["batch_invariant"] != model.sc_knobs.batch_invariant:
        raise ValueError("batch_invariant: fixed when the model was patched; load it again with the other value")
    _hand_out(model, knobs)


def _hand_out(model: "PatchedModel", knobs: dict[str, Any]) -> None:
    """Bring what the leaves read up to checked `knobs`. Which object a leaf reads changes with `sc_modules` alone."""
    frozen = frozen_modules(knobs["sc_modules"])
    if frozen != model.sc_knobs.sc_modules:
        _hand_out_overrides(model, knobs["sc_modules"], dict(frozen))
    vars(model.sc_knobs).update(knobs, sc_modules=frozen)
    for override, own in model.sc_module_knobs.items():
        vars(own).update(vars(model.sc_knobs), **dict(override))


def _hand_out_overrides(model: "PatchedModel", sc_modules: Modules, items: dict[str, Override]) -> None:
    """Give each leaf the knobs object it reads: the model's, or that of all leaves with its override.

    items: what each pattern sets. Leaves that share an input share the object.
    """
    patterns = _deciding_patterns(model, sc_modules)
    model.sc_module_knobs = {items[pattern]: SimpleNamespace() for pattern in patterns.values()}
    for name in _matchable(model):
        module = model.get_submodule(name)
        leaf: Any = module if isinstance(module, SCLinear) else module.scspec_attention
        leaf.knobs = model.sc_module_knobs[items[patterns[name]]] if name in patterns else model.sc_knobs


def _matchable(model: Any) -> list[str]:
    """Return the names that patterns of `sc_modules` may match, patched or not."""
    kinds = nn.Linear, SCLinear, type(model.model.layers[0].self_attn)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _deciding_patterns(model: Any, sc_modules: Modules) -> dict[str, str]:
    """Return the pattern that decides for each name. Raises ValueError for one without a module, or a divided group."""
    patterns = deciding_patterns(sc_modules, _matchable(model))
    for layer in range(len(model.model.layers)):
        for group in _SHARED_INPUTS:
            names = [f"model.layers.{layer}.{name}" for name in group]
            for name in names[1:]:
                decides = [patterns.get(each) for each in (names[0], name)]
                settings = [None if pattern is None else sc_modules[pattern] for pattern in decides]
                if settings[0] != settings[1]:
                    raise ValueError(
                        f"sc_modules: {names[0]} is set by {decides[0]!r}, {name} by {decides[1]!r}; "
                        f"{', '.join(group)} share their input's codes and need one setting"
                    )
    return patterns


def _forward(
    model: "PatchedModel",
    input_ids: torch.Tensor,
    *,
    kv_cache: KVCache | None = None,
    logits_to_keep: int = 0,
    **refused: Any,
) -> CausalLMOutput:
    """Return logits float32 (B, k, V) of the last k of the new tokens input_ids (B, T); k = 0: of all.

    Row t of sequence b stands at position kv_cache.lengths[b] + t; the cache is written and advanced.
    """
    _refresh_knobs(model)
    if refused:
        raise ValueError(
            f"{next(iter(refused))}: not supported; every row of input_ids is a token, the cache is kv_cache"
        )
    _check_tokens(model, input_ids, logits_to_keep)
    batch, steps = input_ids.shape
    cache = model.new_kv_cache(batch, steps) if kv_cache is None else kv_cache
    if getattr(cache, "owner", None) is not model:
        raise ValueError("kv_cache: made by another model; a cache is read only by the one whose new_kv_cache made it")
    if batch != cache.batch:
        raise ValueError(f"input_ids has {batch} sequences; the KV cache was made for {cache.batch}")
    if max(cache.lengths) + steps > cache.capacity:
        raise ValueError(f"KV cache: {max(cache.lengths)} + {steps} tokens; its capacity is {cache.capacity}")
    logits = _logits(model, input_ids, cache, logits_to_keep)
    cache.advance(steps)
    return CausalLMOutput(logits=logits)


def _check_tokens(model: "PatchedModel", ids: torch.Tensor, logits_to_keep: int) -> None:
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: {ids.dtype} {tuple(ids.shape)}; must be int64 or int32 (B, T), none of them 0")
    size = model.config.vocab_size
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < size:  # on a GPU it would have to wait
        raise ValueError(f"input_ids: {int(ids.min())} to {int(ids.max())}; the vocabulary has 0..{size - 1}")
    if not 0 <= logits_to_keep <= ids.shape[1]:
        raise ValueError(f"logits_to_keep={logits_to_keep}: must be 0 (all) to {ids.shape[1]}, the tokens of input_ids")


def _logits(model: "PatchedModel", input_ids: torch.Tensor, cache: KVCache, logits_to_keep: int) -> torch.Tensor:
    forward = _fused_forward(model)
    if forward is not None:
        return forward(model, input_ids, cache, logits_to_keep)
    device = input_ids.device
    positions = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(input_ids.shape[1], device=device)
    options = {"position_ids": positions, "use_cache": False, "kv_cache": cache, "logits_to_keep": logits_to_keep}
    logits: torch.Tensor = type(model).forward(model, input_ids, **options).logits
    return logits


def _fused_forward(model: "PatchedModel") -> Callable[..., torch.Tensor] | None:
    """Return the forward that skips the module tree; None where knobs, or what was put in by hand, need the tree."""
    fast: ModuleType = fused_cpu
    if model.sc_knobs.backend in GPU_BACKENDS:
        from scspec import fused

        fast = fused
    return fast.forward if model.wiring.holds() and fast.fits(model) else None
