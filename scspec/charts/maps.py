"""alpha as heatmaps: the target's stream length by its precision, and by the draft's stream length."""

import altair as alt
import pandas as pd

from scspec.charts.labels import draft_labels, trait_labels
from scspec.charts.parts import alpha_title, fields, legend_above, one_kind, panels, records, subject, with_texts
from scspec.charts.picks import dropdowns, picked

_CELL_PX = (62, 30)
# Above, black has more contrast with viridis than white. tests/test_charts_maps.py measures it.
_BLACK_FROM = 0.44


def _map_table(cells: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A row per value of `names`: the mean alpha of the cells that differ in other things (seeds, say), how many these
    are, and the interval of one or the range of several."""
    groups = with_texts(cells).groupby(names, sort=False)
    table = groups.agg(
        **{"alpha": ("alpha", "mean"), "low": ("alpha", "min"), "high": ("alpha", "max")},
        **{"interval": ("alpha_interval", "first"), "cells": ("cell_id", "size"), "prompts": ("prompts", "min")},
    ).reset_index()
    ranges = [f"{low:.3f} to {high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)]
    one = table["cells"] == 1
    return table.assign(
        interval=table["interval"].where(one), range=pd.Series(ranges, index=table.index).mask(one, "-")
    )


def _tooltip(table: pd.DataFrame, names: dict[str, str]) -> list[alt.Tooltip]:
    several = (table["cells"] > 1).any()
    shown = [alt.Tooltip(f"{name}:N", title=title) for name, title in names.items()]
    shown.append(alt.Tooltip("alpha:Q", title="alpha, mean of the cells" if several else "alpha", format=".4f"))
    shown.append(alt.Tooltip("interval:N", title="alpha, 95 % interval"))
    if several:
        shown += [alt.Tooltip("cells:Q", title="cells"), alt.Tooltip("range:N", title="lowest to highest of them")]
    return [*shown, alt.Tooltip("prompts:Q", title="prompts")]


def _axis(table: pd.DataFrame, name: str, title: str, *, rising: bool) -> dict:
    values = sorted(table[name].unique().tolist(), reverse=not rising)
    return {"shorthand": f"{name}:O", "title": title, "scale": alt.Scale(domain=values), "sort": values}


def _heatmap(
    cells: pd.DataFrame, about: str, table: pd.DataFrame, y: tuple[str, str], choices: dict[str, str]
) -> alt.FacetChart:
    """alpha by the target's stoc_len and `y` (column, title), a panel per gamma; `choices`: columns with dropdowns."""
    names = {"target_stoc_len": "target stoc_len (cycles)", y[0]: y[1], **choices, "gamma": "gamma"}
    tooltip = _tooltip(table, names)
    across = _axis(table, "target_stoc_len", "target stoc_len (clock cycles)", rising=True)
    upwards = _axis(table, *y, rising=False)
    base = alt.Chart().encode(x=alt.X(**across, axis=alt.Axis(labelAngle=0)), y=alt.Y(**upwards))
    color = alt.Color("alpha:Q", title=alpha_title(cells), scale=alt.Scale(scheme="viridis", domain=[0, 1]))
    ink = alt.condition(alt.datum.alpha >= _BLACK_FROM, alt.value("black"), alt.value("white"))
    rects = base.mark_rect().encode(color=color, tooltip=tooltip)
    texts = base.mark_text(fontSize=11).encode(text=alt.Text("alpha:Q", format=".2f"), color=ink, tooltip=tooltip)
    picks = dropdowns(table, choices)
    values = records(table[fields(tooltip)], decimals=6)
    width, height = (
        px * count for px, count in zip(_CELL_PX, (len(across["sort"]), len(upwards["sort"])), strict=True)
    )
    layered = alt.layer(rects, texts, width=max(width, 150), height=max(height, 80))
    config = legend_above(gradientLength=240, titleLimit=400)
    about = f"Acceptance alpha by {about}, {subject(cells)}, a panel per gamma"
    return panels(layered, cells, values, config=config, description=about, **picked(picks))


def precision_map(cells: pd.DataFrame) -> alt.FacetChart:
    """alpha by the target's stoc_len and sc_prec, a panel per gamma; a dropdown picks the draft if there are several.

    cells: summary rows of one pair, arm sc_sc; of those that differ in seeds only the mean. Raises ValueError as
    `alpha_chart` does.
    """
    one_kind(cells)
    cells = cells.assign(draft=draft_labels(cells)).sort_values("draft_stoc_len", ascending=False)
    table = _map_table(cells, ["draft", "target_stoc_len", "sc_prec", "gamma"])
    about, choices = "the target's stream length and precision", {"draft": "draft's streams"}
    return _heatmap(cells, about, table, ("sc_prec", "sc_prec (bits)"), choices)


def length_map(cells: pd.DataFrame) -> alt.FacetChart:
    """alpha by the draft's stoc_len and the target's, a panel per gamma; dropdowns pick sc_prec, and what else sets
    drafts apart (skipped layers, precision, modules), where there are several. cells and errors: `precision_map`."""
    one_kind(cells)
    cells = cells.assign(other=trait_labels(cells)).sort_values(["sc_prec", "other"], ascending=[False, True])
    table = _map_table(cells, ["other", "target_stoc_len", "draft_stoc_len", "sc_prec", "gamma"])
    choices = {"sc_prec": "sc_prec (bits)", "other": "what else sets the draft apart"}
    about, y = "the draft's and the target's stream length", ("draft_stoc_len", "draft stoc_len (clock cycles)")
    return _heatmap(cells, about, table, y, choices)
