"""What charts share: records, hover texts, titles, and the check that a chart is of one pair, platform and decoding.

A chart of layers or panels is made at once, with all its properties: each of Altair's methods on it copies all layers.
"""

import json
from math import ceil
from typing import Any

import altair as alt
import pandas as pd

from scspec.charts.labels import decoding, interval_text
from scspec.stats import PLATFORM_COLUMNS


def records(table: pd.DataFrame, decimals: int = 15) -> tuple[dict, ...]:
    """Rows as JSON has them, NaN as null. A tuple, since Altair copies a list, rows and all, at nearly every step."""
    return tuple(json.loads(table.to_json(orient="records", double_precision=decimals)))


TOOLTIP = [
    alt.Tooltip("target_stoc_len:Q", title="target stoc_len (cycles)"),
    alt.Tooltip("draft_stoc_len:Q", title="draft stoc_len (cycles)"),
    alt.Tooltip("sc_prec:Q", title="sc_prec (bits)"),
    alt.Tooltip("gamma:Q", title="gamma"),
    alt.Tooltip("alpha:Q", title="alpha", format=".4f"),
    alt.Tooltip("alpha_interval:N", title="alpha, 95 % interval"),
    alt.Tooltip("tau:Q", title="tau (tokens per target pass)", format=".3f"),
    alt.Tooltip("tau_interval_text:N", title="tau, 95 % interval"),
    alt.Tooltip("predicted_tau:Q", title="tau predicted from alpha", format=".3f"),
    alt.Tooltip("prompts:Q", title="prompts"),
    alt.Tooltip("tokens:Q", title="tokens", format=","),
    alt.Tooltip("cell_id:N", title="cell"),
]


def fields(tooltip: list[alt.Tooltip]) -> list[str]:
    """The columns that a hover text shows."""
    return [its.shorthand.split(":")[0] for its in tooltip]


TOOLTIP_FIELDS = fields(TOOLTIP)
DRAFT_TOOLTIP = alt.Tooltip("draft:N", title="draft's streams")
_BY_FIELD = dict(zip([*TOOLTIP_FIELDS, "draft"], [*TOOLTIP, DRAFT_TOOLTIP], strict=True))

REFERENCE = {"strokeDash": [5, 4], "strokeWidth": 1}  # a rule at what values are compared with


def tooltips(*names: str) -> list[alt.Tooltip]:
    """Hover texts of some columns, those of TOOLTIP and "draft"."""
    return [_BY_FIELD[name] for name in names]


def interval_texts(table: pd.DataFrame, name: str, kind: str) -> list[str]:
    """The bounds `name`_lo and `name`_hi in words; `kind`: the column that says of what kind they are."""
    columns = table[[name, f"{name}_lo", f"{name}_hi", kind]]
    return [interval_text(*row) for row in columns.itertuples(index=False)]


def with_texts(cells: pd.DataFrame) -> pd.DataFrame:
    """Summary rows with the intervals of alpha and tau in words."""
    alpha, tau = interval_texts(cells, "alpha", "interval"), interval_texts(cells, "tau", "tau_interval")
    return cells.assign(alpha_interval=alpha, tau_interval_text=tau)


def one_kind(cells: pd.DataFrame) -> None:
    """Raises ValueError where cells of several pairs, platforms or ways of decoding are mixed."""
    for name in ("pair", "do_sample", *PLATFORM_COLUMNS):
        if cells[name].nunique() != 1:
            raise ValueError(f"a chart is of one {name}, got {sorted(cells[name].unique())}")


def alpha_title(cells: pd.DataFrame) -> str:
    """What alpha is: two different quantities (docs/method.md), so a chart holds one of them."""
    return f"alpha ({'mean overlap' if cells['do_sample'].iloc[0] else 'agreement'} per emitted token)"


def subject(cells: pd.DataFrame) -> str:
    return f"pair {cells['pair'].iloc[0]}, {decoding(cells['do_sample'].iloc[0])} decoding"


def description(quantity: str, cells: pd.DataFrame) -> str:
    return f"{quantity} against the target's stream length, {subject(cells)}, a panel per gamma"


def legend_above(**changed: Any) -> alt.Config:
    """The configuration of a chart with its legends in a row over it."""
    return alt.Config(legend=alt.LegendConfig(**{"orient": "top", "direction": "horizontal", "columns": 3, **changed}))


def panels(layered: alt.LayerChart, cells: pd.DataFrame, values: tuple[dict, ...], **properties: Any) -> alt.FacetChart:
    """A panel per gamma of the cells, at most four in a row, and rows as equal as they can be."""
    gammas = cells["gamma"].nunique()
    facet = alt.Facet("gamma:O", header=alt.Header(title=None, labelExpr="'gamma = ' + datum.value"))
    across = ceil(gammas / ceil(gammas / 4))
    return layered.facet(facet, columns=across, data=alt.InlineData(values=values), **properties)
