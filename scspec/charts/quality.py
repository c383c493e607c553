"""Acceptance against what SC costs the target as a language model."""

import altair as alt
import pandas as pd

from scspec.charts.parts import (
    TOOLTIP,
    TOOLTIP_FIELDS,
    alpha_title,
    legend_above,
    one_kind,
    records,
    subject,
)
from scspec.charts.picks import draft_color, draft_pick, faded
from scspec.charts.points import point_table, quality_axis, with_ratio

_QUALITY = ("perplexity", "float_perplexity", "target_tv", "target_kl")


def quality_chart(cells: pd.DataFrame) -> alt.LayerChart:
    """alpha against what SC does to the target's perplexity, from summary rows of one pair whose targets' quality is
    known; over the points of a target stands its stoc_len. Raises ValueError as `alpha_chart` does."""
    one_kind(cells)
    table, drafts = point_table(with_ratio(cells))
    tooltip = [*TOOLTIP, alt.Tooltip("quality_loss:Q", title="rise of the target's perplexity", format=".1%")]
    tooltip += [alt.Tooltip(f"{name}:Q", title=name.replace("_", " "), format=".3f") for name in _QUALITY]
    y = alt.Y("alpha:Q", title=alpha_title(cells), scale=alt.Scale(domain=[0, 1]))
    pick = draft_pick()
    x = quality_axis()
    points = alt.Chart().mark_circle(size=75).encode(x=x, y=y, color=draft_color(drafts), tooltip=tooltip)
    points = points.encode(opacity=faded(pick)).add_params(pick)
    labels = alt.Chart().mark_text(dy=-12, fontSize=10).encode(x=x, y="max(alpha):Q", text="target_stoc_len:N")
    columns = sorted({*TOOLTIP_FIELDS, "draft", "quality_loss", "perplexity_ratio", *_QUALITY})
    about = f"Acceptance alpha against the target's quality, {subject(cells)}"
    properties = {"width": 520, "height": 260, "config": legend_above(), "description": about}
    return alt.layer(points, labels, data=alt.InlineData(values=records(table[columns])), **properties)
