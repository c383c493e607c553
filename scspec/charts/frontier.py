"""What speedup a loss of quality buys: a point per cell, and the best so far."""

import altair as alt
import pandas as pd

from scspec.charts.parts import (
    DRAFT_TOOLTIP,
    REFERENCE,
    TOOLTIP,
    TOOLTIP_FIELDS,
    legend_above,
    one_kind,
    records,
    subject,
)
from scspec.charts.picks import draft_color, draft_pick, faded
from scspec.charts.points import point_table, quality_axis, with_ratio


def _frontier(table: pd.DataFrame) -> tuple[dict, ...]:
    """The best speedup of all cells whose loss is at most that of a row, a row per loss."""
    best = table.groupby("perplexity_ratio")["speedup_over_shortest"].max().cummax()
    return records(best.reset_index())


def frontier_chart(cells: pd.DataFrame) -> alt.LayerChart:
    """Modelled speedup against what SC costs the target, a point per cell and the best so far as a line.

    cells: summary rows of one pair, arm sc_sc, with quality_loss (a fraction) and speedup_over_shortest, both known:
    the speedup with all rows at once over plain decoding at the shortest acceptable target length, one length for all
    cells, or a line would join what cannot be compared. Raises ValueError as `alpha_chart` does.
    """
    one_kind(cells)
    table, drafts = point_table(with_ratio(cells))
    tooltip = [
        alt.Tooltip("quality_loss:Q", title="rise of the target's perplexity", format=".1%"),
        alt.Tooltip("speedup_over_shortest:Q", title="speedup over the shortest acceptable target", format=".3f"),
        DRAFT_TOOLTIP,
        *TOOLTIP,
    ]
    x = quality_axis()
    y = alt.Y("speedup_over_shortest:Q", title="modelled speedup", scale=alt.Scale(zero=False))
    pick = draft_pick()
    even = alt.Chart().mark_rule(**REFERENCE).encode(y=alt.datum(1))
    best = alt.Chart(alt.InlineData(values=_frontier(table))).mark_line(interpolate="step-after", strokeWidth=1.5)
    best = best.encode(x=x, y=y)
    points = alt.Chart().mark_circle(size=60).encode(x=x, y=y, color=draft_color(drafts), opacity=faded(pick))
    points = points.encode(tooltip=tooltip).add_params(pick)
    columns = sorted({*TOOLTIP_FIELDS, "draft", "quality_loss", "perplexity_ratio", "speedup_over_shortest"})
    about = f"Modelled speedup against the target's loss of quality, {subject(cells)}"
    properties = {"width": 420, "height": 200, "config": legend_above(), "description": about}
    return alt.layer(even, best, points, data=alt.InlineData(values=records(table[columns])), **properties)
