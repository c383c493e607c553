"""The SC knobs of a model: names, defaults, presets, and what their values may be.

They live on `model.config` (`patching`), and a pair of `config.yaml` may override them. Imports no torch, so that a
plan can be checked in a moment.
"""

from types import SimpleNamespace

from scspec.sc.streams import GRANULARITIES, StreamSpec, resolve_streams

#: Every knob and its default. `sc_stoc_len` None: 2**(sc_prec - 1) with halving in bipolar mode, else 2**sc_prec.
SC_CONFIG_DEFAULTS = {
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
}

#: The published wiring: attention scales that look at later tokens, and the library's own float arithmetic.
PRESETS = {
    "published": {**SC_CONFIG_DEFAULTS, "sc_granularity": "per_row", "batch_invariant": False},
    "float": {**SC_CONFIG_DEFAULTS, "use_sc_attn": False, "use_sc_linear": False},
}


def resolve_knobs(overrides: dict | str | None) -> dict:
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
    knobs = {**(PRESETS[preset] if preset else SC_CONFIG_DEFAULTS), **overrides}
    check_knobs(knobs)
    return knobs


def check_knobs(knobs: dict) -> None:
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


def stream_spec(knobs) -> StreamSpec:
    """Return the streams that the knobs (as attributes) ask for."""
    return resolve_streams(knobs.sc_mode, knobs.sc_prec, knobs.sc_stoc_len, None, knobs.sc_halve_bipolar, knobs.sc_seed)


def _check_choice(knobs: dict, name: str, allowed: tuple[str, ...]) -> None:
    if knobs[name] not in allowed:
        raise ValueError(f"{name}={knobs[name]!r}: allowed are {', '.join(map(repr, allowed))}")
