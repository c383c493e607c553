"""Acceptance by category of prompt."""

import altair as alt
import pandas as pd

from scspec.charts.parts import alpha_title, fields, legend_above, one_kind, records, subject, tooltips, with_texts
from scspec.charts.picks import dropdowns, length_color, picked
from scspec.charts.points import lengths_of, point_table
from scspec.stats import NO_INTERVAL

_ROW_PX, _GAP_PX = 15, 8

_TOOLTIP = [
    alt.Tooltip("category:N", title="category"),
    *tooltips("target_stoc_len", "draft", "sc_prec", "gamma"),
    *tooltips("alpha", "alpha_interval", "tau", "tau_interval_text", "prompts", "tokens"),
]


def categories_chart(table: pd.DataFrame, cells: pd.DataFrame) -> alt.LayerChart:
    """alpha of each category of prompts, a colour per target stoc_len; dropdowns pick the draft, gamma and sc_prec
    where there are several.

    table: `stats.by_category`; cells: summary rows of one pair, arm sc_sc, which pick the rows of the table. Raises
    ValueError as `alpha_chart` does.
    """
    one_kind(cells)
    points, _ = point_table(cells)
    table = points[["cell_id", "target_stoc_len", "draft", "sc_prec", "gamma"]].merge(with_texts(table), on="cell_id")
    lengths = lengths_of(cells)
    categories = sorted(table["category"].unique())
    y = alt.Y("category:N", title=None, sort=categories, axis=alt.Axis(labelLimit=240, grid=True, tickBand="extent"))
    scale = alt.Scale(domain=[0, 1])
    base = alt.Chart().encode(
        y=y,
        yOffset=alt.YOffset("target_stoc_len:O", sort=lengths, scale=alt.Scale(domain=lengths, paddingOuter=0.4)),
        color=length_color(lengths),
    )
    bars = base.transform_filter(alt.datum.interval != NO_INTERVAL).mark_rule(strokeWidth=2)
    bars = bars.encode(x=alt.X("alpha_lo:Q", scale=scale), x2="alpha_hi:Q")
    dots = base.mark_circle(size=60, opacity=1)
    dots = dots.encode(x=alt.X("alpha:Q", title=alpha_title(cells), scale=scale), tooltip=_TOOLTIP)
    layers = [bars, dots] if (table["interval"] != NO_INTERVAL).any() else [dots]
    columns = [*fields(_TOOLTIP), "interval", "alpha_lo", "alpha_hi"]
    values = records(table[columns], decimals=6)
    picks = dropdowns(table, {"draft": "draft's streams", "gamma": "gamma", "sc_prec": "sc_prec (bits)"})
    size = {"width": 420, "height": len(categories) * (len(lengths) * _ROW_PX + _GAP_PX)}
    about = f"Acceptance alpha by category of prompt and stream length, {subject(cells)}"
    properties = {**size, "config": legend_above(), "description": about, **picked(picks)}
    return alt.layer(*layers, data=alt.InlineData(values=values), **properties)
