"""Measured tau against the tau that alpha predicts if positions agree independently."""

import altair as alt
import pandas as pd

from scspec.charts.parts import REFERENCE, TOOLTIP, TOOLTIP_FIELDS, legend_above, one_kind, panels, records, subject
from scspec.charts.picks import draft_color, draft_pick, faded
from scspec.charts.points import point_table
from scspec.stats import NO_INTERVAL


def prediction_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """tau, measured, against `predicted_tau`, a panel per gamma with axes of its own, from 1 to gamma + 1, and the
    diagonal; from summary rows of one pair, arm sc_sc. Raises ValueError as `alpha_chart` does."""
    one_kind(cells)
    table, drafts = point_table(cells)
    pick, scale = draft_pick(), alt.Scale(zero=False, nice=False)
    x = alt.X("predicted_tau:Q", title="tau predicted from alpha", scale=scale, axis=alt.Axis(tickCount=5))
    y = alt.Y("tau:Q", title="measured tau", scale=scale, axis=alt.Axis(tickCount=5))
    ends = alt.Chart().transform_aggregate(end="max(ceiling)").transform_calculate(start="1")
    diagonal = ends.mark_rule(**REFERENCE)
    diagonal = diagonal.encode(x=alt.X("start:Q", scale=scale), y=alt.Y("start:Q", scale=scale), x2="end:Q", y2="end:Q")
    base = alt.Chart().encode(x=x, color=draft_color(drafts), opacity=faded(pick))
    points = base.mark_circle(size=75).encode(y=y, tooltip=TOOLTIP).add_params(pick)
    bars = base.transform_filter(alt.datum.tau_interval != NO_INTERVAL).mark_rule(strokeWidth=2)
    bars = bars.encode(y=alt.Y("tau_lo:Q", scale=scale), y2="tau_hi:Q")
    known = (table["tau_interval"] != NO_INTERVAL).any()
    layered = alt.layer(diagonal, *([bars] if known else []), points, width=220, height=220)
    columns = sorted({*TOOLTIP_FIELDS, "draft", "ceiling", "tau_interval", "tau_lo", "tau_hi"})
    about = f"Measured tau against tau predicted from alpha, {subject(cells)}, a panel per gamma"
    resolve = alt.Resolve(scale=alt.ScaleResolveMap(x="independent", y="independent"))
    properties = {"resolve": resolve, "config": legend_above(), "description": about}
    return panels(layered, cells, records(table[columns]), **properties)
