"""Experiment -> Cells and what they share: which jobs there are, known before anything runs.

A cell depends on its own point of the grid only, so adding a value to an axis leaves the ids and JSON lines of all
other cells as they are. The same holds of what replayed cells share, and of the quality of a target.

Not covered: what a job is (`scspec.jobs`). Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any

from scspec.config import LOOP, REPLAY, Experiment, Pair, Sampling, SideConfig
from scspec.jobs import AUDIT_ARM, GRID_ARM, PAST_END_STEP, Cell, Quality, Side, manifest_name
from scspec.prompts import load_prompts
from scspec.provenance import sha256_of_setting
from scspec.sc.knobs import resolve_knobs

RESEED_OFFSET = 1000  # independent noise, as in the arm `reseed`: the draft's sc_seed is the target's plus this
GREEDY = Sampling(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)

_SUFFIX = {LOOP: "", REPLAY: "_replay"}  # of an id: a replayed cell and the same one as a loop lie beside each other

Streams = tuple[Fraction, int]  # (stoc_len, sc_prec) of an SC side; the length may turn out not to be whole


@dataclass(frozen=True)
class Invalid:
    """A combination that cannot exist, whatever gamma and the seeds are. It is listed and never run.

    `draft_stoc_len` is None if the target alone is at fault; a length that is not whole stays a fraction's float.
    """

    pair: str
    arm: str
    stoc_len: int
    sc_prec: int
    draft_stoc_len: float | None
    reason: str

    def __str__(self) -> str:
        return f"{self.pair}/{self.arm} stoc_len={self.stoc_len} sc_prec={self.sc_prec}: {self.reason}"


def expand(experiment: Experiment) -> tuple[list[Cell], list[Invalid]]:
    """Return the cells of an experiment, the grid of each pair before its controls, and what cannot exist.

    A replayed experiment has one more, the audit: one of them, as a loop. Combinations that resolve to the same run of
    the same arm are one cell. Raises `FileNotFoundError` if the prompt file cannot be read, and `ValueError` for the
    first row of it that is not understood.
    """
    prompt_sha256 = sha256_of_setting(experiment.prompt_file, "prompt_file")
    load_prompts(experiment.prompt_file)  # else each of the cells would find the fault, once it has been submitted
    cells: dict[Cell, None] = {}
    invalid: dict[Invalid, None] = {}
    for pair, (arm, points, gammas) in product(experiment.pairs, _arms(experiment)):
        streams = product(_streams(pair, arm, points), experiment.sc_modules)
        for ((stoc_len, sc_prec), (target, draft)), modules in streams:
            fault = _fault(target, draft) or _knob_fault(*_sides(pair, arm, target, draft, 0, modules))
            if fault:
                invalid[Invalid(pair.name, arm, stoc_len, sc_prec, *fault)] = None
                continue
            for gamma, seed, draw in product(gammas, experiment.sc_seed, experiment.sampling_seed):
                sides = _sides(pair, arm, target, draft, seed, modules)
                cells[_cell(experiment, pair, arm, gamma, draw, *sides, modules, prompt_sha256)] = None
    audit = [_audit(cells)] if experiment.method == REPLAY and cells else []
    return [*cells, *audit], list(invalid)


def qualities(experiment: Experiment, cells: Iterable[Cell]) -> dict[str, Quality]:
    """Return {cell id: what to measure of its target}, for each cell whose target is in SC; one text for all.

    Raises `FileNotFoundError` if the text file cannot be read.
    """
    text_file = experiment.quality.text_file
    text_sha256 = text_file and sha256_of_setting(text_file, "quality.text_file")
    found = {}
    for cell in cells if experiment.quality.enabled else ():
        if cell.target.sc is not None:
            text = replace(cell, target=replace(cell.target, sc=None), sampling_seed=experiment.sampling_seed[0])
            trajectory = text.trajectory(past_end=PAST_END_STEP)
            found[cell.id] = Quality(trajectory, cell.target, text_file, text_sha256)
    return found


def plan(
    experiment: Experiment, cells: Iterable[Cell], invalid: Iterable[Invalid], quality: dict[str, Quality]
) -> dict[str, Any]:
    """Return what a report needs to know of a run, in plain JSON types.

    Which cells there should be, each with the paths of its log and of its target's quality (or None), and which cannot
    be.
    """
    return {
        "demonstration": experiment.demonstration,
        "settings": experiment.settings,
        "cells": [
            {
                **json.loads(cell.to_json()),
                "path": cell.path().as_posix(),
                "log": f"results/logs/{cell.id}.log",
                "quality": quality[cell.id].path().as_posix() if cell.id in quality else None,
            }
            for cell in cells
        ],
        "invalid": [asdict(combination) for combination in invalid],
    }


def manifest_names(cells: Iterable[Cell]) -> dict[str, str]:
    """Return {file name stem: model} for every model of the cells. Raises `ValueError` if two models share a name."""
    names: dict[str, str] = {}
    for model in sorted({side.model for cell in cells for side in cell.sides}):
        stem = manifest_name(model)
        if stem in names:
            raise ValueError(f"model: {model!r} and {names[stem]!r} would share the manifest {stem}.json")
        names[stem] = model
    return names


def _audit(cells: Iterable[Cell]) -> Cell:
    """Return one of the cells as a loop: of the grid, if it has any, and drawn by hash, so the same one every time."""
    drawn = min(cells, key=lambda cell: (cell.arm != GRID_ARM, cell.digest()))
    stem = drawn.id.split("/")[2].removesuffix(_SUFFIX[REPLAY])
    return replace(drawn, id=f"{drawn.pair}/{AUDIT_ARM}/{stem}", arm=AUDIT_ARM, method=LOOP)


def _arms(experiment: Experiment) -> Iterator[tuple[str, list[tuple[int, int]], tuple[int, ...]]]:
    """Yield (arm, points (stoc_len, sc_prec), gammas): the grid first, then the controls."""
    yield GRID_ARM, list(product(experiment.stoc_len, experiment.sc_prec)), experiment.gamma
    controls = experiment.controls
    for arm in controls.arms if controls.enabled else ():
        yield arm, list(product(controls.stoc_len, controls.sc_prec)), controls.gamma


def _streams(
    pair: Pair, arm: str, points: Iterable[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], tuple[Streams | None, Streams | None]]]:
    """Yield (point, (target's streams, draft's streams)), None for a side in floating point."""
    for stoc_len, sc_prec in points:
        target = None if arm in ("float_float", "float_sc") else (Fraction(stoc_len), sc_prec)
        if arm in ("identity", "reseed"):
            drafts: list[Streams | None] = [target]
        elif arm in ("float_float", "sc_float"):
            drafts = [None]
        else:
            drafts = [(length, pair.draft_sc_prec or sc_prec) for length in _draft_stoc_lens(pair, stoc_len)]
        for draft in drafts:
            yield (stoc_len, sc_prec), (target, draft)


def _draft_stoc_lens(pair: Pair, stoc_len: int) -> list[Fraction]:
    """Return the draft's lengths exactly: a ratio counts as the decimal number that was written."""
    return [Fraction(str(ratio)) * stoc_len for ratio in pair.draft_ratios] + [
        Fraction(length) for length in pair.draft_stoc_lens
    ]


def _fault(target: Streams | None, draft: Streams | None) -> tuple[float | None, str] | None:
    """Return (draft's length or None, reason) if the combination cannot exist, else None."""
    if target and target[0] > 2 ** target[1]:
        return None, f"target stoc_len {target[0]} is above 2**sc_prec = {2 ** target[1]}"
    if draft is None:
        return None
    length, sc_prec = draft
    shown = int(length) if length.denominator == 1 else float(length)
    if length.denominator != 1:
        return shown, f"draft stoc_len {shown} is not a whole number"
    if length > 2**sc_prec:
        return shown, f"draft stoc_len {shown} is above 2**sc_prec = {2**sc_prec}"
    return None


def _knob_fault(target: Side, draft: Side) -> tuple[float | None, str] | None:
    """Return the same if a length does not go with a side's knobs: some modules may have a precision of their own."""
    for name, side in (("target", target), ("draft", draft)):
        try:
            resolve_knobs(side.sc)
        except ValueError as error:
            return (side.sc["sc_stoc_len"] if side.sc and name == "draft" else None), f"{name} {error}"
    return None


def _sides(
    pair: Pair, arm: str, target: Streams | None, draft: Streams | None, sc_seed: int, modules: dict[str, Any]
) -> tuple[Side, Side]:
    """Return the resolved target and draft; `modules` are those of the grid, on top of what a side has of its own."""
    same_model = arm in ("identity", "reseed")
    independent = arm == "reseed" if same_model else pair.draft_noise == "independent"
    draft_config, draft_seed = pair.target if same_model else pair.draft, sc_seed + RESEED_OFFSET * independent
    return _side(pair.target, target, sc_seed, modules), _side(draft_config, draft, draft_seed, modules)


def _side(config: SideConfig, streams: Streams | None, sc_seed: int, modules: dict[str, Any]) -> Side:
    """Return one side with its streams written into the SC knobs."""
    if streams is None:
        return Side(config.model, None, config.skip_layers)
    sc = {**config.sc, "sc_prec": streams[1], "sc_stoc_len": int(streams[0]), "sc_seed": sc_seed}
    if modules:
        sc["sc_modules"] = {**config.sc.get("sc_modules", {}), **modules}
    return Side(config.model, sc, config.skip_layers)


def _cell(
    experiment: Experiment,
    pair: Pair,
    arm: str,
    gamma: int,
    sampling_seed: int,
    target: Side,
    draft: Side,
    modules: dict[str, Any],
    prompt_sha256: str,
) -> Cell:
    """Return the cell of two resolved sides. Greedy cells do not see the settings of sampling."""
    point = target.sc or draft.sc or {"sc_prec": None, "sc_seed": None}
    stem = _stem(target.sc, draft.sc, gamma, sampling_seed) + _modules_label(target.sc or draft.sc, modules)
    stem += _platform(experiment, pair) + _SUFFIX[experiment.method]
    return Cell(
        id=f"{pair.name}/{arm}/{stem}",
        pair=pair.name,
        arm=arm,
        stoc_len=target.sc["sc_stoc_len"] if target.sc else None,
        sc_prec=point["sc_prec"],
        gamma=gamma,
        sc_seed=point["sc_seed"],
        sampling_seed=sampling_seed,
        target=target,
        draft=draft,
        prompt_file=experiment.prompt_file,
        prompt_sha256=prompt_sha256,
        prompt_limit=experiment.prompt_limit,
        max_new_tokens=experiment.max_new_tokens,
        sampling=experiment.sampling if experiment.sampling.do_sample else GREEDY,
        device=experiment.device,
        dtype=pair.dtype,
        backend=experiment.backend,
        method=experiment.method,
    )


def _stem(target: dict[str, Any] | None, draft: dict[str, Any] | None, gamma: int, sampling_seed: int) -> str:
    """Return the last part of an id, for example `L128_d96_p8_g4_s0_n0`; `f` stands for floating point."""
    nothing = {"sc_stoc_len": "f", "sc_prec": "f", "sc_seed": "f"}
    point = target or draft or nothing
    lengths = f"L{(target or nothing)['sc_stoc_len']}_d{(draft or nothing)['sc_stoc_len']}"
    return f"{lengths}_p{point['sc_prec']}_g{gamma}_s{sampling_seed}_n{point['sc_seed']}"


def _modules_label(sc: dict[str, Any] | None, modules: dict[str, Any]) -> str:
    """Return what an id says of the grid's `sc_modules`: a hash of them, and nothing without or in floating point."""
    if not sc or not modules:
        return ""
    return f"_m{hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()[:6]}"


def _platform(experiment: Experiment, pair: Pair) -> str:
    """Return the end of an id, for example `_cuda-float16` (backend and dtype): nothing for float32 on the CPU.

    So the cells of another device, backend or dtype lie beside each other. The backend tells the device.
    """
    return "" if experiment.device == "cpu" else f"_{experiment.backend}-{pair.dtype}"
