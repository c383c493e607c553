"""Grid cells as points of a chart: their draft, their panel, their place on an axis of stream lengths."""

import altair as alt
import pandas as pd

from scspec.charts.labels import draft_labels, unscrambled
from scspec.charts.parts import with_texts

_DODGE_OCTAVES = 0.045  # between neighbouring drafts, so that their intervals stay apart; below the marker's width
SCRAMBLED, UNSCRAMBLED = "scrambled", "not scrambled (stoc_len = 2^sc_prec)"


def point_table(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Returns (a row per cell, the drafts in the order of the legend).

    Added: draft, x (the target's stoc_len, moved aside by draft), streams, curve (what a line joins), ceiling
    (gamma + 1), and the intervals in words.
    """
    cells = with_texts(cells).assign(draft=draft_labels(cells))
    cells = cells.sort_values(["sc_prec", "gamma", "stoc_len", "draft_stoc_len"], ascending=[True, True, True, False])
    drafts = list(dict.fromkeys(cells["draft"]))
    shift = cells["draft"].map(drafts.index) - (len(drafts) - 1) / 2
    cells["x"] = cells["stoc_len"].astype(float) * 2.0 ** (_DODGE_OCTAVES * shift)
    cells["streams"] = unscrambled(cells).map({True: UNSCRAMBLED, False: SCRAMBLED})
    # One line never joins cells that differ in more than the length.
    cells["curve"] = cells[["draft", "sampling_seed", "sc_seed"]].astype(str).agg("|".join, axis=1)
    cells["ceiling"] = cells["gamma"] + 1
    return cells, drafts


def lengths_of(cells: pd.DataFrame) -> list[int]:
    """The target's stream lengths in ascending order."""
    return sorted(int(length) for length in cells["stoc_len"].unique())


def length_axis(lengths: list[int]) -> alt.X:
    """x of `point_table`, with a tick at each length."""
    margin = 2**0.3
    return alt.X(
        "x:Q",
        title="target stoc_len (clock cycles, log scale)",
        scale=alt.Scale(type="log", base=2, domain=[lengths[0] / margin, lengths[-1] * margin], nice=False),
        axis=alt.Axis(values=lengths, format="d", grid=False, labelOverlap="greedy"),
    )


def with_ratio(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells whose targets' quality is known, with perplexity_ratio: in SC, over in floating point."""
    return cells.assign(perplexity_ratio=1 + cells["quality_loss"])


def quality_axis() -> alt.X:
    """perplexity_ratio of `with_ratio`, of which a short stream can make a hundred."""
    return alt.X(
        "perplexity_ratio:Q",
        title="target's perplexity in SC / in floating point (log scale)",
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(format="~g", tickCount=8),
    )
