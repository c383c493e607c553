"""Where SC costs acceptance: alpha of the control arms and of the grid at the same points, beside what it must be."""

import altair as alt
import pandas as pd

from scspec.charts.labels import ARM_LABELS, draft_labels
from scspec.charts.parts import TOOLTIP, TOOLTIP_FIELDS, alpha_title, one_kind, records, subject, with_texts
from scspec.jobs import GRID_ARM
from scspec.stats import NO_INTERVAL

IDENTITY_ALPHA = 1.0
_ORDER = ["float_float", "sc_float", "float_sc", GRID_ARM, "identity", "reseed"]
_POINT = ["stoc_len", "sc_prec", "gamma", "sampling_seed", "sc_seed", "target_settings"]
_SETTINGS = {  # column -> how a row's label says it, where controls differ in it
    "length": "{} cycles",
    "sc_prec": "{} bit",
    "gamma": "gamma {}",
    "sampling_seed": "sampling_seed {}",
    "sc_seed": "sc_seed {}",
}


def _at_the_points_of_controls(cells: pd.DataFrame) -> pd.DataFrame:
    """The controls, and those cells of the grid at whose point (_POINT) a control with an SC target was run."""
    controls = cells[cells["arm"] != GRID_ARM]
    points = set(controls.loc[controls["target_stoc_len"].notna(), _POINT].itertuples(index=False, name=None))
    rows = zip(cells["arm"], cells[_POINT].itertuples(index=False, name=None), strict=True)
    return cells[[arm != GRID_ARM or point in points for arm, point in rows]]


def _controls_table(cells: pd.DataFrame) -> pd.DataFrame:
    """With a `label` per row of the chart: the arm, the draft of a grid cell, and the settings in which controls
    differ."""
    table = with_texts(_at_the_points_of_controls(cells))
    table["length"] = table["target_stoc_len"].fillna(table["draft_stoc_len"])
    table["label"] = table["arm"].map(ARM_LABELS)
    in_grid = table["arm"] == GRID_ARM
    table.loc[in_grid, "label"] = [f"{ARM_LABELS[GRID_ARM]}, {draft}" for draft in draft_labels(table[in_grid])]
    for name, text in _SETTINGS.items():
        if table.loc[~in_grid, name].nunique() > 1:
            table["label"] += ["" if pd.isna(value) else f", {text.format(int(value))}" for value in table[name]]
    table["expected"] = table["arm"].map({"identity": IDENTITY_ALPHA})
    table["rank"] = table["arm"].map(_ORDER.index)
    shorter_last = -table["draft_stoc_len"].astype("Float64").where(in_grid)
    return table.assign(shorter_last=shorter_last).sort_values(["rank", *_SETTINGS, "shorter_last"])


def controls_chart(cells: pd.DataFrame) -> alt.LayerChart:
    """alpha of the control arms and of the grid cells at their points (same lengths, sc_prec, gamma and seeds), with a
    tick where `identity` must lie; from summary rows of one pair: all its controls, and its grid (arm sc_sc) if there
    is one. Raises ValueError if pairs, platforms (PLATFORM_COLUMNS), or greedy and sampled cells are mixed."""
    one_kind(cells)
    table = _controls_table(cells)
    y = alt.Y(
        "label:N",
        title=None,
        sort=list(dict.fromkeys(table["label"])),
        axis=alt.Axis(labelLimit=400, grid=True),
    )
    x = alt.X("alpha:Q", title=alpha_title(cells), scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=10))
    color = alt.Color("measured:N", legend=None)
    base = alt.Chart().encode(y=y).transform_calculate(measured="'measured'")
    layers = [
        base.transform_filter("datum.expected !== null").mark_tick(thickness=3, size=22).encode(x="expected:Q"),
        # identity is exact or broken, not an estimate: no interval
        base.transform_filter(f"datum.interval !== '{NO_INTERVAL}' && datum.expected === null")
        .mark_rule(strokeWidth=2)
        .encode(x="alpha_lo:Q", x2="alpha_hi:Q", color=color),
        base.mark_circle(size=75, opacity=1).encode(x=x, color=color, tooltip=TOOLTIP),
    ]
    columns = [*TOOLTIP_FIELDS, "label", "expected", "interval", "alpha_lo", "alpha_hi"]
    about = f"Acceptance alpha with SC on both sides, on either and on none, and of the controls, {subject(cells)}"
    properties = {"width": 330, "height": alt.Step(28), "description": about}
    return alt.layer(*layers, data=alt.InlineData(values=records(table[columns])), **properties)
