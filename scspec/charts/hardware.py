"""Modelled speedup and energy, at the gamma, the rows at once and the MACs that a reader sets.

The formulas are those of `scspec.hardware`, as Vega expressions, since a page computes them anew at each move.
"""

import altair as alt
import pandas as pd

from scspec.charts.parts import REFERENCE, fields, legend_above, one_kind, records, subject, tooltips
from scspec.charts.picks import draft_color, draft_pick, dropdowns, faded, filters
from scspec.charts.points import length_axis, lengths_of, point_table
from scspec.stats import NO_INTERVAL

_LARGEST_GAMMA, _LARGEST_ROWS = 16, 32

_TARGET_PASSES = "ceil((gamma_slider + 1) / rows_at_once)"
_PREDICTED_TAU = "datum.alpha === 1 ? gamma_slider + 1 : (1 - pow(datum.alpha, gamma_slider + 1)) / (1 - datum.alpha)"
_HEADS = ("without LM head", "with LM head")
_RELATIVE_COST = f"lm_head_macs === '{_HEADS[1]}' ? datum.c_with_head : datum.c"
_TIME = f"(gamma_slider * datum.cost + {_TARGET_PASSES})"  # of a block, in plain passes of one row
_WORK = "(gamma_slider * datum.cost + gamma_slider + 1)"

_SETTING = [
    *tooltips("target_stoc_len", "draft_stoc_len", "sc_prec"),
    alt.Tooltip("cost:Q", title="c (a draft token in target tokens)", format=".3f"),
]
_RESULTS = [
    alt.Tooltip("speedup:Q", title="speedup", format=".3f"),
    alt.Tooltip("energy:Q", title="energy per token", format=".3f"),
]
_PREDICTED = [
    *_SETTING,
    alt.Tooltip("alpha:Q", title="alpha, weighted by tokens", format=".4f"),
    alt.Tooltip("alphas:N", title="alpha, lowest to highest cell"),
    alt.Tooltip("cells:Q", title="cells"),
    alt.Tooltip("predicted:Q", title="predicted tau", format=".3f"),
    *_RESULTS,
]
_MEASURED = [
    *_SETTING,
    *tooltips("gamma"),
    alt.Tooltip("tau:Q", title="measured tau", format=".3f"),
    *tooltips("tau_interval_text"),
    *_RESULTS,
    *tooltips("cell_id"),
]


def _pooled(table: pd.DataFrame) -> pd.DataFrame:
    """A row per draft, target length and sc_prec: alpha of its cells, which differ in gamma or seeds, by tokens.

    alpha estimates the same number whatever gamma is (docs/method.md), so cells of all gammas say what it is.
    """
    table = table.assign(agreed=table["alpha"] * table["tokens"])
    groups = table.groupby(["draft", "target_stoc_len", "draft_stoc_len", "sc_prec"], sort=False)
    first = {name: (name, "first") for name in ("c", "c_with_head", "x")}
    sums = {name: (name, "sum") for name in ("agreed", "tokens")}
    ends = {"low": ("alpha", "min"), "high": ("alpha", "max"), "cells": ("cell_id", "size")}
    pooled = groups.agg(**first, **sums, **ends).reset_index()
    alphas = [f"{low:.3f} to {high:.3f}" for low, high in zip(pooled["low"], pooled["high"], strict=True)]
    return pooled.assign(alpha=pooled["agreed"] / pooled["tokens"], alphas=alphas)


def _controls(gammas: pd.Series) -> list[alt.Parameter]:
    """gamma, first the grid's largest; P, first so large that it holds all rows of a target pass; and the LM head."""
    largest = int(gammas.max())
    ranges = {
        "gamma_slider": ("gamma ", max(_LARGEST_GAMMA, largest), largest),
        "rows_at_once": ("P, rows at once ", max(_LARGEST_ROWS, largest + 1), max(_LARGEST_ROWS, largest + 1)),
    }
    head = alt.binding_radio(options=list(_HEADS), name="MACs counted ")
    return [
        *(
            alt.param(name=name, value=value, bind=alt.binding_range(min=1, max=most, step=1, name=label))
            for name, (label, most, value) in ranges.items()
        ),
        alt.param(name="lm_head_macs", value=_HEADS[0], bind=head),
    ]


def _datasets(table: pd.DataFrame) -> dict[str, tuple[dict, ...]]:
    """The rows of the points and of the diamonds."""
    computed = {"cost", "predicted", "speedup", "energy"}
    both = ["draft", "x", "c", "c_with_head"]
    columns = {
        "settings": [*both, *fields(_PREDICTED)],
        "cells": [*both, *fields(_MEASURED), "tau_lo", "tau_hi", "tau_interval"],
    }
    tables = {"settings": _pooled(table), "cells": table}
    return {
        name: records(tables[name][[column for column in its if column not in computed]], decimals=9)
        for name, its in columns.items()
    }


def _predicted(shown: list[alt.FilterTransform]) -> alt.Chart:
    chart = alt.Chart(alt.NamedData("settings"), transform=shown)
    chart = chart.transform_calculate(cost=_RELATIVE_COST, predicted=_PREDICTED_TAU)
    return chart.transform_calculate(speedup=f"datum.predicted / {_TIME}", energy=f"{_WORK} / datum.predicted")


def _measured(shown: list[alt.FilterTransform]) -> alt.Chart:
    chart = alt.Chart(alt.NamedData("cells"), transform=shown).transform_filter("datum.gamma === gamma_slider")
    chart = chart.transform_calculate(cost=_RELATIVE_COST)
    ends = {"": "tau", "_lo": "tau_lo", "_hi": "tau_hi"}
    speedups = {f"speedup{end}": f"datum.{tau} / {_TIME}" for end, tau in ends.items()}
    energies = {f"energy{end}": f"{_WORK} / datum.{tau}" for end, tau in ends.items()}
    return chart.transform_calculate(**speedups, **energies)


def _layers(
    quantity: str, title: str, predicted: alt.Chart, measured: alt.Chart, pick: alt.Parameter
) -> list[alt.Chart]:
    """Predicted points on a line, measured ones as diamonds on top."""
    y = alt.Y(f"{quantity}:Q", title=title, scale=alt.Scale(zero=False))
    lines = predicted.mark_line(strokeWidth=1.2).encode(y=y, opacity=faded(pick, 0.6))
    points = predicted.mark_circle(size=40).encode(y=y, opacity=faded(pick), tooltip=_PREDICTED)
    bars = measured.transform_filter(alt.datum.tau_interval != NO_INTERVAL).mark_rule(strokeWidth=2)
    bars = bars.encode(y=f"{quantity}_lo:Q", y2=f"{quantity}_hi:Q", opacity=faded(pick))
    diamonds = measured.mark_point(shape="diamond", size=110, filled=False, strokeWidth=1.5)
    return [lines, bars, points, diamonds.encode(y=y, opacity=faded(pick), tooltip=_MEASURED)]


def hardware_chart(cells: pd.DataFrame) -> alt.HConcatChart:
    """Speedup and energy of a token relative to plain decoding at the same target length, against the target's
    stoc_len, at the gamma and P (rows of a target pass at once) of two sliders, without the MACs of the LM heads or
    with them; a dropdown picks sc_prec.

    cells: summary rows with c known (`hardware.modelled`) of one pair, arm sc_sc. Points: with tau predicted from the
    alpha of the cells of all gammas and seeds, weighted by tokens. Hollow diamonds: with the tau of cells measured at
    the slider's gamma, bars its interval. Raises ValueError as `alpha_chart` does.
    """
    one_kind(cells)
    table, drafts = point_table(cells)
    picks, pick = dropdowns(table, {"sc_prec": "sc_prec (bits)"}), draft_pick()
    shared = {"x": length_axis(lengths_of(table)), "color": draft_color(drafts)}
    shown = filters(picks)
    marks = *(chart.encode(**shared) for chart in (_predicted(shown), _measured(shown))), pick
    # The legend is of both panels, so one of them holds what is picked by it.
    *speedup, diamonds = _layers("speedup", "speedup over plain decoding", *marks)
    speedup.append(diamonds.add_params(pick))
    energy = _layers("energy", "energy per token, plain decoding = 1", *marks)
    even = alt.Chart().mark_rule(**REFERENCE).encode(y=alt.datum(1))  # nothing is gained
    panels = (alt.layer(even, *layers, width=330, height=240) for layers in (speedup, energy))
    about = f"Modelled speedup and energy against the target's stream length, {subject(cells)}; sliders for gamma and P"
    params = [its.param for its in (*_controls(table["gamma"]), *picks.values())]
    properties = {"config": legend_above(), "description": about, "params": params}
    return alt.hconcat(*panels, datasets=_datasets(table), **properties)
