"""What cells, drafts and numbers are called in charts and tables."""

import json
from fractions import Fraction

import pandas as pd

from scspec.jobs import AUDIT_ARM, GRID_ARM
from scspec.stats import MIN_PROMPTS, NO_INTERVAL, ONE_SIDED

ARM_LABELS = {
    GRID_ARM: "SC target, SC draft",
    "identity": "identity: draft = target",
    "reseed": "reseed: independent streams",
    "float_float": "float target, float draft",
    "sc_float": "SC target, float draft",
    "float_sc": "float target, SC draft",
    AUDIT_ARM: "audit of the replay: a loop",
}


def number(value: float) -> str:
    """Three decimals, but more where they would show 0 or 1 for a number that is neither."""
    shown = f"{value:.3f}"
    if pd.isna(value):
        return "undefined"
    if float(shown) in (0, 1) and value not in (0, 1):
        return f"{value:.1e}" if value < 0.5 else f"1 - {1 - value:.1e}"
    return shown


def interval_text(estimate: float, low: float, high: float, kind: str) -> str:
    """A 95 % interval in words: "0.310 to 0.460", "at least 0.830", "none (fewer than 8 prompts)"."""
    if kind == NO_INTERVAL:
        return f"none (fewer than {MIN_PROMPTS} prompts)"
    if kind == ONE_SIDED:
        return f"at least {low:.3f}" if estimate == high else f"at most {high:.3f}"
    return f"{low:.3f} to {high:.3f}"


def decoding(do_sample: bool) -> str:
    """How a cell was decoded, in a word: "sampled" or "greedy"."""
    return "sampled" if do_sample else "greedy"


def _ratio_label(draft: int, target: int) -> str:
    return "same length" if draft == target else f"{Fraction(int(draft), int(target))} as long"


def _streams(cells: pd.DataFrame) -> list[str]:
    """The draft's streams: by ratio to the target's, or by length if that takes fewer labels."""
    sides = list(zip(cells["draft_stoc_len"], cells["target_stoc_len"], strict=True))
    fixed = ["float" if pd.isna(draft) else f"{draft} cycles" for draft, _ in sides]
    if cells[["draft_stoc_len", "target_stoc_len"]].isna().any(axis=None):
        return fixed
    ratios = [_ratio_label(draft, target) for draft, target in sides]
    return fixed if len(set(fixed)) < len(set(ratios)) else ratios


def draft_labels(cells: pd.DataFrame) -> list[str]:
    """What sets each draft of one pair apart: its streams, its precision if not the target's, its skipped layers."""
    return [
        ", ".join([streams, *_traits(cell)]) for streams, cell in zip(_streams(cells), cells.itertuples(), strict=True)
    ]


def trait_labels(cells: pd.DataFrame) -> list[str]:
    """What sets each draft of one pair apart beside the length of its streams; "nothing" if that is all."""
    return [", ".join(_traits(cell)) or "nothing" for cell in cells.itertuples()]


def _traits(cell) -> list[str]:
    traits = []
    if pd.notna(cell.draft_sc_prec) and pd.notna(cell.target_sc_prec) and cell.draft_sc_prec != cell.target_sc_prec:
        traits.append(f"{cell.draft_sc_prec} bit")
    if skipped := json.loads(cell.draft_settings).get("skip_layers"):
        traits.append(f"{len(skipped)} layers skipped")
    return [*traits, *_modules_labels(cell)]


def _modules_labels(cell) -> list[str]:
    """Which modules have streams of their own, and of which side if not of both alike: "*.mlp.* 64 cycles 6 bit"."""
    target, draft = (json.loads(text).get("sc_modules") for text in (cell.target_settings, cell.draft_settings))
    sides = {"": target} if target == draft else {"target's ": target, "draft's ": draft}
    texts = {"sc_stoc_len": "{} cycles", "sc_prec": "{} bit"}
    return [
        " ".join([f"{side}{pattern}", *(text.format(own[name]) for name, text in texts.items() if name in own)])
        for side, modules in sides.items()
        for pattern, own in (modules or {}).items()
    ]


def unscrambled(cells: pd.DataFrame) -> pd.Series:
    """Where the target's streams are the bare Sobol sequence: stoc_len = 2**sc_prec, without halving."""
    halved = cells["target_settings"].map(lambda text: json.loads(text).get("sc_halve_bipolar", False))
    whole = cells["target_stoc_len"] == 2 ** cells["target_sc_prec"]
    return whole.fillna(False).astype(bool) & ~halved.astype(bool)
