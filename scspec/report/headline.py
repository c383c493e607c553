"""What a card of the index says first: the best modelled speedup at an acceptable quality, and how far streams shrink.

Both are of one pair, way of decoding and platform.
"""

from typing import Any

import numpy as np
import pandas as pd

from scspec.charts import draft_labels, number
from scspec.hardware import best_setting
from scspec.jobs import GRID_ARM
from scspec.report.run import Run, comparable
from scspec.stats import KEPT_SHARE, MIN_PROMPTS, shortest_streams

FLOAT_ARM = "float_float"

ShortestTexts = dict[tuple[str, bool, str], list[dict[str, str]]]  # by pair, do_sample, computed_on


def best_speedups(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """The best setting of some grid cells for each quality loss that would admit more of them, in ascending order.

    cells: rows of the summary. A dict per step: "loss", the largest rise of perplexity that is accepted there (a
    fraction); "speedup" over plain decoding at the shortest acceptable length, which is "plain_stoc_len";
    "same_length_speedup"; "draft", what sets the draft apart; "cell", the row of the summary; and "speedup_with_head",
    that of the setting that is best where the MACs of the LM heads count too. All rows of a target pass at once. Empty
    where no target's quality is known or nothing is costed.
    """
    cells = cells.assign(draft=draft_labels(cells))
    with_head = cells.assign(**{name: cells[f"{name}_with_head"] for name in ("c", "target_cycles")})
    losses = cells.loc[cells["target_cycles"].notna(), "quality_loss"].dropna().clip(lower=0)
    steps = []
    for loss in np.unique(losses):
        best = best_setting(cells, loss)
        if best is not None:
            head = best_setting(with_head, loss)
            assert head is not None  # what has costs without the LM head has them with it
            own = {name: best[name] for name in ("speedup", "plain_stoc_len", "draft")}
            own |= {"same_length_speedup": best["speedup_at_once"], "cell": best}
            steps.append({"loss": float(loss), **own, "speedup_with_head": head["speedup"]})
    return steps


def at_loss(steps: list[dict[str, Any]], loss: float) -> int:
    """The index of the last step of `best_speedups` that a loss admits, -1 where it admits none."""
    return sum(bool(step["loss"] <= loss) for step in steps) - 1


def speedup_text(step: dict[str, Any]) -> dict[str, str]:
    """A step in words, for the card and its slider."""
    cell = step["cell"]
    pays = "" if step["speedup"] > 1 else "Speculation does not pay here. "
    return {
        "loss": f"{step['loss']:+.1%}",
        "speedup": f"{step['speedup']:.3f}\u00a0\u00d7",
        "sentence": f"{pays}Over plain SC decoding at the shortest acceptable length, {step['plain_stoc_len']} cycles; "
        f"{step['same_length_speedup']:.3f}\u00a0\u00d7 over plain decoding at the same length; where LM heads count "
        f"too, {step['speedup_with_head']:.3f}\u00a0\u00d7 at best. Target "
        f"{cell['target_stoc_len']} cycles, draft {cell['draft_stoc_len']} cycles ({step['draft']}), gamma "
        f"{cell['gamma']}: alpha {number(cell['alpha'])}, tau {number(cell['tau'])}. The target's perplexity is "
        f"{cell['perplexity']:.3f}, in floating point {cell['float_perplexity']:.3f} ({cell['quality_loss']:+.1%}).",
    }


def all_shortest_texts(run: Run) -> ShortestTexts:
    """`shortest_texts` of all groups of comparable cells."""
    return {
        (*values, computed_on): shortest_texts(run, cells)
        for values, computed_on, cells in comparable(run.summary, "pair", "do_sample")
    }


def shortest_texts(run: Run, group: pd.DataFrame) -> list[dict[str, str]]:
    """For each draft of a group of cells, in words, the shortest target streams that keep KEPT_SHARE of floating point.

    A dict per draft: "draft", "length" with its interval, "alpha". Empty where the pair was not run in floating point.
    """
    reference = group.loc[group["arm"] == FLOAT_ARM, "cell_id"].tolist()
    grid = group[group["arm"] == GRID_ARM]
    if not reference or grid.empty:
        return []
    texts, tally = [], run.tally_of(group)
    for draft, cells in grid.assign(draft=draft_labels(grid)).groupby("draft", sort=False):
        lengths = dict(zip(cells["cell_id"], cells["target_stoc_len"].astype(int), strict=True))
        found = shortest_streams(tally, run.metadata, lengths, reference)
        texts.append({"draft": draft, "length": _length_text(found), "alpha": _alpha_text(found)})
    return texts


def _cycles(length: float) -> str:
    return f"{length:.0f} cycles" if np.isfinite(length) else "not reached"


def _length_text(found: dict[str, float | int]) -> str:
    if not found["reference_alpha"]:
        return "nothing to keep"
    if found["prompts"] < MIN_PROMPTS:
        return f"{_cycles(found['length'])} (no interval: fewer than {MIN_PROMPTS} prompts)"
    low, high = (_cycles(found[name]) for name in ("length_lo", "length_hi"))
    return f"{_cycles(found['length'])} (95\u00a0%: {low if low == high else f'{low} to {high}'})"


def _alpha_text(found: dict[str, float | int]) -> str:
    if not found["reference_alpha"]:
        return f"{number(found['reference_alpha'])} in floating point"
    missed = f"below {KEPT_SHARE:.0%} of {number(found['reference_alpha'])}"
    return missed if np.isnan(found["alpha"]) else f"{number(found['alpha'])} of {number(found['reference_alpha'])}"
