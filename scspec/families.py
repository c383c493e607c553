"""Which models are modelled: families of decoders that are alike but for a few parts, and what no family may have.

A family is what transformers calls its classes; `patching` replaces them by name. All have RMSNorm before attention and
MLP, rotary positions, grouped-query attention over all earlier positions and a gated SiLU MLP. Biases on projections,
tied and untied LM heads, and a norm of each head's queries and keys (Qwen3) come as the modules have them.

Not covered: what only the weights tell (`patching` looks at the modules).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """The names of transformers' classes."""

    causal_lm: str
    norm: str
    rotary: str

    @classmethod
    def named(cls, prefix: str) -> "Family":
        """Return the family whose classes begin with `prefix`."""
        return cls(f"{prefix}ForCausalLM", f"{prefix}RMSNorm", f"{prefix}RotaryEmbedding")


#: By `model_type`. SmolLM and SmolLM2 are Llamas, Qwen2.5 is Qwen2.
FAMILIES = {
    "llama": Family.named("Llama"),
    "mistral": Family.named("Mistral"),
    "qwen2": Family.named("Qwen2"),
    "qwen3": Family.named("Qwen3"),
}

_ROPE_TYPES = ("default", "linear", "llama3")
_FULL_ATTENTION, _DENSE, _PLAIN_SCORES = "attention to all earlier positions", "a dense MLP", "scores as they are"
#: Field of a configuration that is set where a model has what is not modelled -> what that is, and what is modelled.
#: Qwen's configurations have `sliding_window` unset unless `use_sliding_window` says otherwise.
_NOT_MODELLED = {
    "sliding_window": ("sliding-window attention", _FULL_ATTENTION),
    "attention_chunk_size": ("chunked attention", _FULL_ATTENTION),
    "attn_logit_softcapping": ("soft-capping", _PLAIN_SCORES),
    "final_logit_softcapping": ("soft-capping", _PLAIN_SCORES),
    "num_local_experts": ("mixture of experts", _DENSE),
    "num_experts": ("mixture of experts", _DENSE),
    "n_routed_experts": ("mixture of experts", _DENSE),
}


def head_dim(config: Any) -> int:
    """Return the width of an attention head; a configuration may leave it to the hidden size (Qwen2)."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def check_stored_config(model: str, stored: Mapping[str, Any]) -> None:
    """Raise ValueError for a config.json of no modelled family, or that asks for code of the repository instead.

    Comes before transformers reads the file: it cannot read unknown types, and asks on the terminal about code.
    model: what to call it, such as "model 'NAME'".
    """
    family = FAMILIES.get(str(stored.get("model_type")))  # a broken file may have any JSON there
    classes = stored.get("architectures") or []
    own_code = "auto_map" in stored
    if family is None or (own_code and classes != [family.causal_lm]):
        kind = f"model_type={stored.get('model_type')!r} ({', '.join(classes) or 'no class named'})"
        code = " with code of its own (auto_map), which is never run" if own_code else ""
        raise ValueError(f"{model}: {kind}{code}: not modelled; modelled are {_families()}")


def check_config(model: str, config: Any) -> None:
    """Raise ValueError, naming field and value, if a configuration has what is not modelled.

    model: what to call it. config: transformers' object, which has every field of its class.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"{model}: model_type={config.model_type!r}: not modelled; modelled are {_families()}")
    _check_rotary(model, config.rope_parameters)
    if config.hidden_act != "silu":
        raise ValueError(f"{model}: hidden_act={config.hidden_act!r}: not modelled; modelled is 'silu'")
    for field, (feature, modelled) in _NOT_MODELLED.items():
        if value := getattr(config, field, None):
            raise ValueError(f"{model}: {field}={value!r}: {feature} is not modelled; modelled is {modelled}")
    for kind in getattr(config, "layer_types", None) or ():
        if kind != "full_attention":
            raise ValueError(f"{model}: layer_types has {kind!r}: not modelled; modelled is {_FULL_ATTENTION}")


def _check_rotary(model: str, rope: Mapping[str, Any]) -> None:
    kind, part = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    if kind not in _ROPE_TYPES:
        raise ValueError(f"{model}: rope_type={kind!r}: not modelled; modelled are {', '.join(_ROPE_TYPES)}")
    if part != 1.0:
        raise ValueError(f"{model}: partial_rotary_factor={part!r}: not modelled; modelled is 1.0, all of a head")


def _families() -> str:
    return ", ".join(f"{name} ({family.causal_lm})" for name, family in FAMILIES.items())
