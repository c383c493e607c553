"""YAML -> a validated, frozen `Experiment`: every setting of a run, with defaults filled in.

`workflow/config.schema.yaml` is the only copy of the schema and the only place of the defaults. It is read relative
to this file: scspec runs from its repository (a clone or an editable install), which holds the Snakefile and the
prompts too, so packaging a second copy would only make two that can differ.

Not covered: which combinations of the grid can exist (`scspec.cells`). Imports no torch.
"""

import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from scspec.sc.knobs import resolve_knobs

#: How a cell is made: draft and target take turns, or from the target's text and the draft's predictions on it.
LOOP, REPLAY = "loop", "replay"
#: What replay needs of a side in SC: rows that do not depend on later ones or on how many come along.
_REPLAYABLE = {"batch_invariant": True, "sc_granularity": "causal", "sc_linear_granularity": "per_row"}
#: What each device computes with.
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "float16", "bfloat16")}
SCHEMA_PATH = Path(__file__).resolve().parents[1] / "workflow" / "config.schema.yaml"


@dataclass(frozen=True)
class SideConfig:
    """Target or draft of a pair: a model, the SC knobs that were overridden, and the layers left out (sorted)."""

    model: str
    sc: dict[str, Any] = field(hash=False)
    skip_layers: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A pair of models. The draft's stream lengths are `draft_ratios` times the target's, or `draft_stoc_lens`.

    One of the two is empty; `same` in the YAML is the ratio 1. `draft_sc_prec` is None for the target's. `draft_noise`
    is "shared" (the shorter streams are a prefix of the longer) or "independent" (another scramble).
    """

    name: str
    dtype: str
    target: SideConfig
    draft: SideConfig
    draft_ratios: tuple[float, ...]
    draft_stoc_lens: tuple[int, ...]
    draft_sc_prec: int | None
    draft_noise: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Greedy if `do_sample` is False; then the other three have no effect."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Controls:
    """Which control arms run and where: the axes of the controls, taken from the grid where the YAML says null."""

    enabled: bool
    arms: tuple[str, ...]
    stoc_len: tuple[int, ...]
    sc_prec: tuple[int, ...]
    gamma: tuple[int, ...]


@dataclass(frozen=True)
class QualityConfig:
    """Whether the targets' quality is measured, and on which text file beside the continuations of the prompts."""

    enabled: bool
    text_file: str | None


@dataclass(frozen=True)
class Experiment:
    """Everything `config.yaml` says, checked. `pairs` holds the enabled ones; `settings` is the YAML with defaults."""

    pairs: tuple[Pair, ...]
    stoc_len: tuple[int, ...]
    sc_prec: tuple[int, ...]
    sc_modules: tuple[dict[str, Any], ...] = field(hash=False)
    gamma: tuple[int, ...]
    sc_seed: tuple[int, ...]
    sampling_seed: tuple[int, ...]
    prompt_file: str
    prompt_limit: int | None
    max_new_tokens: int
    sampling: Sampling
    controls: Controls
    quality: QualityConfig
    device: str
    dtype: str
    backend: str
    method: str
    threads_per_cell: int
    prompts_per_batch: int
    gpus: int
    cells_per_gpu: int
    demonstration: bool
    settings: dict[str, Any] = field(hash=False)


def load_experiment(mapping: Mapping[str, Any]) -> Experiment:
    """Return the experiment that a parsed `config.yaml` describes.

    Strings stand for the value they spell wherever the schema wants no string, because `snakemake --config
    gamma='[1,2]'` hands over `["1", "2"]`. Raises `ValueError` with one line that names the key, its value and what
    is allowed.
    """
    settings = _normalise(mapping, _schema())
    _check_schema(settings)
    _check_finite(settings)
    _check_across(settings)
    plain = (
        *("prompt_file", "prompt_limit", "max_new_tokens", "device", "dtype", "backend", "method"),
        *("threads_per_cell", "prompts_per_batch", "gpus", "cells_per_gpu", "demonstration"),
    )
    axes = ("stoc_len", "sc_prec", "sc_modules", "gamma", "sc_seed", "sampling_seed")
    values: dict[str, Any] = {key: settings[key] for key in plain} | {axis: tuple(settings[axis]) for axis in axes}
    return Experiment(
        pairs=tuple(
            _pair(name, pair, settings["dtype"], settings["method"])
            for name, pair in settings["pairs"].items()
            if pair["enabled"]
        ),
        sampling=Sampling(**settings["sampling"]),
        controls=_controls(settings),
        quality=QualityConfig(**settings["quality"]),
        settings=settings,
        **values,
    )


def read_config(path: str | Path) -> Any:
    """Return what a YAML file says, not yet checked. Raises one-line `FileNotFoundError` or `ValueError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"config file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def read_layered(path: str | Path) -> Any:
    """Return what `snakemake --configfile` makes of a file: `config.yaml` of the working directory, if there is one,
    with the file laid over it. Not yet checked; raises as `read_config`."""
    from snakemake.utils import update_config

    config, base = read_config(path), Path("config.yaml")
    if not isinstance(config, dict) or not base.exists() or base.samefile(path):
        return config
    layered = read_config(base) or {}
    update_config(layered, config)
    return layered


@functools.cache
def _schema() -> dict[str, Any]:
    """Return the schema. Callers must not change it."""
    schema: dict[str, Any] = yaml.safe_load(SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


def _normalise(value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a copy of `value` in the schema's types and with its defaults; what does not fit stays as it is."""
    for branch in schema.get("anyOf", ()):
        candidate = _normalise(value, branch)
        if jsonschema.Draft202012Validator(branch).is_valid(candidate):
            return candidate
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    if isinstance(value, str) and types and "string" not in types:
        value = _parse(value)
    if isinstance(value, Mapping):
        return _normalise_mapping(value, schema)
    if isinstance(value, list | tuple):
        return [_normalise(item, schema.get("items", {})) for item in value]
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and "number" in types:
        return float(value)
    return value


def _normalise_mapping(value: Mapping[Any, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with string keys; unknown keys stay, for the schema to refuse."""
    known = schema.get("properties", {})
    other = schema.get("additionalProperties") or {}
    result = {str(key): _normalise(item, known.get(str(key), other)) for key, item in value.items()}
    for key, sub in known.items():
        if key not in result and "default" in sub:
            result[key] = _normalise(deepcopy(sub["default"]), sub)
    return result


def _parse(text: str) -> Any:
    """Return what a string spells in YAML, or the string itself."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check_schema(settings: Any) -> None:
    """Raise `ValueError` for what the schema refuses: an unknown key if there is one, as it explains the rest."""
    errors = list(jsonschema.Draft202012Validator(_schema()).iter_errors(settings))
    if errors:
        error = min(errors, key=lambda error: (error.validator != "additionalProperties", len(error.path)))
        raise ValueError(_message(error))


def _message(error: jsonschema.ValidationError) -> str:
    """Return one line: where, which value, what is allowed."""
    where = _key_path(error.absolute_path)
    schema: Any = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        allowed = list(schema["properties"])
        unknown = next(key for key in instance if key not in allowed)
        close = difflib.get_close_matches(unknown, allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{where}: unknown key {unknown!r}{hint}; allowed: {', '.join(allowed)}"
    if error.validator == "required":
        missing = next(key for key in schema["required"] if key not in instance)
        return f"{where}: missing key {missing!r}; needed: {', '.join(schema['required'])}"
    return f"{where}: {_short(instance)} is not allowed; allowed: {schema['description']}"


def _key_path(parts: Iterable[str | int]) -> str:
    """Return for example `pairs.mine.draft.skip_layers[0]`; `config` for the top."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "config"


def _short(value: Any) -> str:
    """Return the value on one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_finite(value: Any, path: tuple[str | int, ...] = ()) -> None:
    """Raise `ValueError` for NaN and infinity, which slip through a schema's bounds."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{_key_path(path)}: {value} is not allowed; allowed: a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _check_finite(item, (*path, key))


def _check_across(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for settings that are allowed alone but not together."""
    if not any(pair["enabled"] for pair in settings["pairs"].values()):
        raise ValueError(
            f"pairs: none of {', '.join(settings['pairs'])} is enabled; allowed: at least one with enabled: true"
        )
    seeds = settings["sampling_seed"]
    if len(seeds) > 1 and not settings["sampling"]["do_sample"]:
        raise ValueError(
            f"sampling_seed: {seeds} repeats the same tokens with sampling.do_sample: false; allowed: one seed"
        )
    device = settings["device"]
    if settings["backend"] not in BACKENDS[device]:
        allowed = ", ".join(BACKENDS[device])
        raise ValueError(f"backend: {settings['backend']!r} is not allowed with device: {device!r}; allowed: {allowed}")
    for key in ("gpus", "cells_per_gpu"):
        if settings[key] > 1 and device != "cuda":
            raise ValueError(f"{key}: {settings[key]} is not allowed with device: {device!r}; allowed: 1")
    for name, pair in settings["pairs"].items():
        dtype = pair["dtype"] or settings["dtype"]
        if pair["enabled"] and dtype not in DTYPES[device]:
            allowed = ", ".join(DTYPES[device])
            raise ValueError(
                f"pairs.{name}: dtype {dtype!r} is not allowed with device: {device!r}; allowed: {allowed}"
            )


def _pair(name: str, pair: Mapping[str, Any], dtype: str, method: str) -> Pair:
    """Return a checked pair; `dtype` and `method` are the experiment's.

    Raises `ValueError` for SC knobs that do not go together, or not with the method.
    """
    for side in ("target", "draft"):
        try:
            knobs = resolve_knobs(pair[side]["sc"])
        except ValueError as error:
            raise ValueError(f"pairs.{name}.{side}.sc: {error}") from None
        for knob, allowed in _REPLAYABLE.items() if method == REPLAY else ():
            if knobs[knob] != allowed:
                wrong = f"{knob}={knobs[knob]!r} is not allowed with method: replay"
                raise ValueError(f"pairs.{name}.{side}.sc: {wrong}; allowed: {allowed!r}")
    length = pair["draft"]["stoc_len"]
    if length == "same":
        length = {"ratio": 1.0}
    ratios = _listed(length["ratio"]) if isinstance(length, dict) else []
    lengths = [] if isinstance(length, dict) else _listed(length)
    return Pair(
        name=name,
        dtype=pair["dtype"] or dtype,
        target=_side(pair["target"]),
        draft=_side(pair["draft"]),
        draft_ratios=tuple(ratios),
        draft_stoc_lens=tuple(lengths),
        draft_sc_prec=pair["draft"]["sc_prec"],
        draft_noise=pair["draft"]["noise"],
    )


def _listed(value: Any) -> list[Any]:
    """Return a list as it is and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _side(side: Mapping[str, Any]) -> SideConfig:
    """Return one side of a pair; the order in which layers are listed means nothing."""
    return SideConfig(side["model"], dict(side["sc"]), tuple(sorted(side["skip_layers"])))


def _controls(settings: Mapping[str, Any]) -> Controls:
    """Return the controls with each null axis replaced by the grid's."""
    controls = settings["controls"]
    axes = {
        axis: tuple(controls[axis] if controls[axis] is not None else settings[axis])
        for axis in ("stoc_len", "sc_prec", "gamma")
    }
    return Controls(enabled=controls["enabled"], arms=tuple(controls["arms"]), **axes)
