"""alpha and tau against the target's stream length, a colour per draft, a panel per gamma."""

import altair as alt
import pandas as pd

from scspec.charts.parts import (
    REFERENCE,
    TOOLTIP,
    TOOLTIP_FIELDS,
    alpha_title,
    description,
    legend_above,
    one_kind,
    panels,
    records,
)
from scspec.charts.picks import draft_color, draft_pick, dropdowns, faded, picked
from scspec.charts.points import SCRAMBLED, UNSCRAMBLED, length_axis, lengths_of, point_table
from scspec.stats import NO_INTERVAL

_BAND_OPACITY = 0.12


def _curve_layers(table: pd.DataFrame, drafts: list[str], quantity: str, interval: str, y: dict) -> list[alt.Chart]:
    """Points, and bands, lines and bars for the cells that have intervals."""
    shape = alt.Shape(
        "streams:N",
        title="target's streams",
        scale=alt.Scale(domain=[SCRAMBLED, UNSCRAMBLED], range=["circle", "diamond"]),
        legend=alt.Legend() if (table["streams"] == UNSCRAMBLED).any() else None,
    )
    pick, y_axis = draft_pick(), alt.Y(f"{quantity}:Q", **y)
    base = alt.Chart().encode(x=length_axis(lengths_of(table)), color=draft_color(drafts))
    points = base.mark_point(filled=True, size=75).encode(y=y_axis, shape=shape, opacity=faded(pick), tooltip=TOOLTIP)
    points = points.add_params(pick)
    if (table[interval] == NO_INTERVAL).all():
        return [points]
    known = base.transform_filter(alt.datum[interval] != NO_INTERVAL)
    bounds = known.encode(y=alt.Y(f"{quantity}_lo:Q", **y), y2=f"{quantity}_hi:Q")
    bands = bounds.mark_area().encode(opacity=faded(pick, _BAND_OPACITY), detail="curve:N")
    lines = known.mark_line(strokeWidth=1.2).encode(y=y_axis, opacity=faded(pick, 0.6), detail="curve:N")
    bars = bounds.mark_rule(strokeWidth=2).encode(opacity=faded(pick))
    return [bands, lines, bars, points]


def _curves(
    cells: pd.DataFrame, about: str, quantity: str, interval: str, y: dict, *references: alt.Chart
) -> alt.FacetChart:
    """`quantity` per length with its bounds, a colour per draft, a panel per gamma, a dropdown that picks sc_prec;
    `references` behind."""
    one_kind(cells)
    table, drafts = point_table(cells)
    layers = _curve_layers(table, drafts, quantity, interval, y)
    columns = {*TOOLTIP_FIELDS, "x", "draft", "streams", "curve", "ceiling", interval}
    columns |= {quantity, f"{quantity}_lo", f"{quantity}_hi"}
    picks = dropdowns(table, {"sc_prec": "sc_prec (bits)"})
    layered = alt.layer(*references, *layers, width=290, height=240)
    properties = {"config": legend_above(), "description": description(about, cells), **picked(picks)}
    return panels(layered, cells, records(table[sorted(columns)]), **properties)


def alpha_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """alpha against the target's stoc_len with 95 % intervals, from summary rows of one pair, arm sc_sc, greedy or
    sampled. Raises ValueError if pairs, platforms (PLATFORM_COLUMNS), or greedy and sampled cells are mixed."""
    y = {"title": alpha_title(cells), "scale": alt.Scale(domain=[0, 1])}
    return _curves(cells, "Acceptance alpha", "alpha", "interval", y)


def tau_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """tau against the target's stoc_len, as `alpha_chart`; dashed: gamma + 1, where every proposal is accepted."""
    y = {
        "title": "tau (tokens per target pass)",
        "scale": alt.Scale(domain=[1, int(cells["gamma"].max()) + 1]),
    }
    ceiling = alt.Chart().mark_rule(**REFERENCE).encode(y=alt.Y("max(ceiling):Q", **y))
    return _curves(cells, "Block efficiency tau", "tau", "tau_interval", y, ceiling)
