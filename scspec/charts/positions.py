"""Acceptance by position in the block."""

import altair as alt
import pandas as pd

from scspec.charts.parts import fields, interval_texts, legend_above, one_kind, panels, records, subject, tooltips
from scspec.charts.picks import dropdowns, length_color, picked
from scspec.charts.points import lengths_of, point_table
from scspec.stats import NO_INTERVAL

_DODGE = 0.06  # of a position, between neighbouring lengths, so that their intervals stay apart

_TOOLTIP = [
    *tooltips("target_stoc_len", "draft", "sc_prec", "gamma"),
    alt.Tooltip("i:Q", title="position in the block"),
    alt.Tooltip("alpha_i:Q", title="alpha_i", format=".4f"),
    alt.Tooltip("alpha_i_text:N", title="alpha_i, 95 % interval"),
    alt.Tooltip("p_accepted:Q", title="P(accepted >= i)", format=".4f"),
    alt.Tooltip("p_accepted_text:N", title="P(accepted >= i), 95 % interval"),
    alt.Tooltip("at_risk:Q", title="blocks at risk", format=",.0f"),
    alt.Tooltip("prompts:Q", title="prompts with a block at risk"),
]


def _position_table(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """A row per cell and position at which a block was at risk, in the order of `point_table`."""
    points, _ = point_table(cells)
    columns = ["cell_id", "target_stoc_len", "draft", "sc_prec", "gamma", "curve"]
    table = points[columns].merge(table[table["alpha_i"].notna()], on="cell_id")
    lengths = lengths_of(cells)
    shift = table["target_stoc_len"].map(lengths.index) - (len(lengths) - 1) / 2
    texts = {f"{name}_text": interval_texts(table, name, f"{name}_interval") for name in ("alpha_i", "p_accepted")}
    return table.assign(x=table["i"] + _DODGE * shift, **texts)


def positions_chart(table: pd.DataFrame, cells: pd.DataFrame) -> alt.FacetChart:
    """alpha_i against the position i in the block, a line per target stoc_len, a panel per gamma; dropdowns pick the
    draft and sc_prec where there are several.

    table: `stats.positions`; cells: summary rows of one pair, arm sc_sc, which pick the rows of the table. Raises
    ValueError as `alpha_chart` does.
    """
    one_kind(cells)
    table = _position_table(table, cells)
    x = alt.X(
        "x:Q",
        title="position i in the block",
        scale=alt.Scale(domain=[0.7, int(cells["gamma"].max()) + 0.3], nice=False),
        axis=alt.Axis(values=list(range(1, int(cells["gamma"].max()) + 1)), format="d", grid=False),
    )
    scale = alt.Scale(domain=[0, 1])
    y = alt.Y("alpha_i:Q", title="alpha_i (accepted of those at risk)", scale=scale)
    base = alt.Chart().encode(x=x, color=length_color(lengths_of(cells)))
    lines = base.mark_line(strokeWidth=1.2, opacity=0.6).encode(y=y, detail="curve:N")
    bars = base.transform_filter(alt.datum.alpha_i_interval != NO_INTERVAL).mark_rule(strokeWidth=2)
    bars = bars.encode(y=alt.Y("alpha_i_lo:Q", scale=scale), y2="alpha_i_hi:Q")
    points = base.mark_circle(size=60, opacity=1).encode(y=y, tooltip=_TOOLTIP)
    known = (table["alpha_i_interval"] != NO_INTERVAL).any()
    layered = alt.layer(lines, *([bars] if known else []), points, width=235, height=220)
    columns = [*fields(_TOOLTIP), "x", "curve", "alpha_i_lo", "alpha_i_hi", "alpha_i_interval"]
    picks = dropdowns(table, {"draft": "draft's streams", "sc_prec": "sc_prec (bits)"})
    about = f"Acceptance alpha_i by position in the block and stream length, {subject(cells)}, a panel per gamma"
    properties = {"config": legend_above(), "description": about, **picked(picks)}
    return panels(layered, cells, records(table[columns], decimals=6), **properties)
