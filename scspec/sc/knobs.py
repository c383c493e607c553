"""The SC knobs of a model: names, defaults, presets, and what their values may be.

They live on `model.config` (`patching`), and a pair of `config.yaml` may override them. Imports no torch, so that a
plan can be checked in a moment.
"""

from collections.abc import Iterable
from copy import deepcopy
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from scspec.sc.streams import GRANULARITIES, StreamSpec, resolve_streams

#: The knobs that `sc_modules` may set for some modules alone.
MODULE_KNOBS = ("sc_stoc_len", "sc_prec")

#: `sc_modules`, and what it sets for one pattern, as a value.
Modules = dict[str, dict[str, int]]
Override = tuple[tuple[str, int], ...]

#: Every knob and its default. `sc_stoc_len` None: 2**(sc_prec - 1) with halving in bipolar mode, else 2**sc_prec.
#:
#: `sc_modules`: {pattern: {"sc_stoc_len": int, "sc_prec": int}}, either or both; what a pattern leaves out is the
#: model's. Patterns are those of `fnmatch` ("*" matches dots too) over Hugging Face's names: "lm_head",
#: "model.layers.3.mlp.up_proj"; "model.layers.3.self_attn" stands for both products of that layer's attention, and not
#: for its projections. Patterns that match one module must agree, since a mapping has no order. q, k and v of a layer,
#: and its gate and up, need one setting. Of a model that was loaded without some layers, those that remain count from 0
#: in these names.
SC_CONFIG_DEFAULTS: dict[str, Any] = {
    "use_sc_attn": True,
    "use_sc_linear": True,
    "sc_prec": 8,
    "sc_stoc_len": None,
    "sc_mode": "bipolar",
    "sc_granularity": "causal",
    "sc_linear_granularity": "per_row",
    "sc_linear_chunk_d": 128,
    "sc_halve_bipolar": True,
    "sc_lm_head": False,
    "sc_seed": 0,
    "batch_invariant": True,
    "sc_modules": {},
}

#: The published wiring: attention scales that look at later tokens, and the library's own float arithmetic.
PRESETS = {
    "published": {**SC_CONFIG_DEFAULTS, "sc_granularity": "per_row", "batch_invariant": False},
    "float": {**SC_CONFIG_DEFAULTS, "use_sc_attn": False, "use_sc_linear": False},
}


def resolve_knobs(overrides: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return all knobs: defaults with `overrides` (a dict, the name of a preset, or a dict with a "preset" key).

    Raises ValueError naming an unknown knob or preset, or a value that is not allowed.
    """
    overrides = {"preset": overrides} if isinstance(overrides, str) else dict(overrides or {})
    preset = overrides.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: allowed are {', '.join(PRESETS)}")
    unknown = sorted(set(overrides) - set(SC_CONFIG_DEFAULTS))
    if unknown:
        raise ValueError(f"unknown SC knob {unknown[0]!r}; allowed are {', '.join(SC_CONFIG_DEFAULTS)}")
    knobs = deepcopy({**(PRESETS[preset] if preset else SC_CONFIG_DEFAULTS), **overrides})
    check_knobs(knobs)
    return knobs


def check_knobs(knobs: dict[str, Any]) -> None:
    """Raise ValueError naming the knob, its value and what is allowed."""
    for name in ("use_sc_attn", "use_sc_linear", "sc_halve_bipolar", "sc_lm_head", "batch_invariant"):
        if not isinstance(knobs[name], bool):
            raise ValueError(f"{name}={knobs[name]!r}: must be true or false")
    _check_choice(knobs, "sc_granularity", GRANULARITIES)
    _check_choice(knobs, "sc_linear_granularity", ("per_row", "per_tensor"))
    chunk = knobs["sc_linear_chunk_d"]
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0:
        raise ValueError(f"sc_linear_chunk_d={chunk!r}: must be an int, 0 (off) or more")
    stream_spec(SimpleNamespace(**knobs))
    if knobs["use_sc_attn"] and knobs["sc_mode"] == "unipolar" and knobs["sc_granularity"] in ("causal", "per_head"):
        raise ValueError(
            f"sc_granularity={knobs['sc_granularity']!r}: with sc_mode='unipolar' allowed are 'per_row', 'per_tensor'"
        )
    _check_modules(knobs)


def stream_spec(knobs: Any) -> StreamSpec:
    """Return the streams that the knobs (as attributes) ask for."""
    return resolve_streams(knobs.sc_mode, knobs.sc_prec, knobs.sc_stoc_len, None, knobs.sc_halve_bipolar, knobs.sc_seed)


def frozen_modules(sc_modules: Modules) -> tuple[tuple[str, Override], ...]:
    """Return `sc_modules` as a value: (pattern, items of what it sets), sorted."""
    return tuple(sorted((pattern, tuple(sorted(override.items()))) for pattern, override in sc_modules.items()))


def deciding_patterns(sc_modules: Modules, names: Iterable[str]) -> dict[str, str]:
    """Return {name: a pattern that matches it}, without the names that none matches.

    Raises ValueError naming a pattern that matches no name, or two that match one and set different values.
    """
    names = list(names)
    found: dict[str, str] = {}
    for pattern in sc_modules:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"sc_modules: {pattern!r} matches no module; names are {names[0]!r} to {names[-1]!r}")
        for name in matched:
            other = found.setdefault(name, pattern)
            if sc_modules[other] != sc_modules[pattern]:
                both = f"{other!r} and {pattern!r} both match {name}"
                raise ValueError(f"sc_modules: {both} and set different values; allowed: patterns that agree there")
    return found


def _check_modules(knobs: dict[str, Any]) -> None:
    if not isinstance(knobs["sc_modules"], dict):
        raise ValueError(f"sc_modules={knobs['sc_modules']!r}: must be a mapping of patterns")
    for pattern, override in knobs["sc_modules"].items():
        if not isinstance(pattern, str) or not _is_override(override):
            raise ValueError(
                f"sc_modules[{pattern!r}]={override!r}: must map {' or '.join(MODULE_KNOBS)}, or both, to ints"
            )
    patterns = {override: pattern for pattern, override in frozen_modules(knobs["sc_modules"])}
    for override, pattern in patterns.items():  # each setting once, however many patterns have it: before each forward
        try:
            stream_spec(SimpleNamespace(**{**knobs, **dict(override)}))
        except ValueError as error:
            raise ValueError(f"sc_modules[{pattern!r}]: {error}") from None


def _is_override(value: object) -> bool:
    if not isinstance(value, dict) or not value or not set(value) <= set(MODULE_KNOBS):
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) for number in value.values())


def _check_choice(knobs: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    if knobs[name] not in allowed:
        raise ValueError(f"{name}={knobs[name]!r}: allowed are {', '.join(map(repr, allowed))}")
