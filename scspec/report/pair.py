"""The page of a pair: charts of each way of decoding and platform, its controls, quality, cells and cost."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from scspec.charts import (
    alpha_chart,
    categories_chart,
    controls_chart,
    decoding,
    frontier_chart,
    hardware_chart,
    length_map,
    positions_chart,
    precision_map,
    prediction_chart,
    quality_chart,
    tau_chart,
)
from scspec.hardware import speedup_over_other_length
from scspec.jobs import AUDIT_ARM, GRID_ARM
from scspec.report.headline import ShortestTexts
from scspec.report.render import Chart, chart_entry
from scspec.report.run import Run, comparable
from scspec.report.tables import cell_tables, quality_rows, seed_rows
from scspec.stats import KEPT_SHARE, MIN_PROMPTS, NO_INTERVAL, by_category, positions

_READ_ALPHA = {
    False: "Each point is a cell: the share of emitted tokens on which draft and target choose the same token, so 1 "
    "means that the draft costs no acceptance",
    True: "Each point is a cell: the overlap 1 - TV(p, q) of the target's and the draft's distributions, averaged over "
    "the emitted tokens, so 1 means that the draft costs no acceptance",
}


def pair_page(run: Run, pair: str, stem: str, shortest: ShortestTexts) -> dict[str, Any]:
    """What the template of a pair shows; the pair has cells in the summary, the index and its tables are `stem`."""
    summary = run.summary[run.summary["pair"] == pair]
    sections = list(_sections(run, summary, shortest))
    charts = [chart for section in sections for chart in section["charts"]]
    return {
        "root": "../",
        "stem": stem,
        "heading": pair,
        "lead": f"{len(summary)} cells of draft and target in stochastic computing or floating point",
        "charts": charts,
        "sections": sections,
        "tables": cell_tables(summary),
        "quality": quality_rows(run.quality, [cell for cell in run.plan["cells"] if cell["pair"] == pair]),
        "kept_share": f"{KEPT_SHARE:.0%}",
        "min_prompts": MIN_PROMPTS,
        "costs": _costs(run, summary),
    }


def _sections(run: Run, summary: pd.DataFrame, shortest: ShortestTexts) -> Iterator[dict[str, Any]]:
    """Charts: a section per way of decoding and platform."""
    groups = comparable(summary, "pair", "do_sample")
    for index, ((pair, do_sample), platform, cells) in enumerate(groups):
        yield {
            "decoding": decoding(do_sample),
            "platform": platform,
            "shortest": shortest[pair, do_sample, platform],
            "pooled": seed_rows(run, cells[cells["arm"] == GRID_ARM]),
            "charts": [
                chart_entry(f"{name}-{index}", title, chart, f"{caption}.")
                for name, title, chart, caption in _charts(run, cells[cells["arm"] != AUDIT_ARM], do_sample)
            ],
        }


def _charts(run: Run, cells: pd.DataFrame, do_sample: bool) -> Iterator[tuple[str, str, Chart, str]]:
    """Yields (id, title, chart, caption) of what the cells of one section can show."""
    grid = cells[cells["arm"] == GRID_ARM]
    if len(grid):
        yield from _grid_charts(run, grid, do_sample)
    if (cells["arm"] != GRID_ARM).any():
        yield (
            "controls",
            "Where SC costs acceptance",
            controls_chart(cells),
            "Identity must lie exactly on the mark at 1, reseed shows what two equally good SC models disagree by, and "
            f"the arms with a floating-point side show which side costs acceptance; {_bars(cells)}",
        )


def _grid_charts(run: Run, grid: pd.DataFrame, do_sample: bool) -> Iterator[tuple[str, str, Chart, str]]:
    apart = f"drafts are moved sideways a little to keep them apart, and {_bars(grid)}"
    yield "alpha", "Acceptance", alpha_chart(grid), f"{_READ_ALPHA[do_sample]}; {apart}"
    yield (
        "tau",
        "Block efficiency",
        tau_chart(grid),
        "Each point is a cell: the tokens that one pass of the target yields, from 1 (as without a draft) to the "
        f"dashed line at gamma + 1 (every proposal accepted); {apart}",
    )
    if len(costed := grid[grid["c"].notna()]):
        yield (
            "hardware",
            "Gain in hardware, modelled",
            hardware_chart(costed),
            "Speedup over plain SC decoding at the same target length, and energy of a token relative to it, with tau "
            "predicted from alpha at the gamma of the slider; hollow marks are cells measured at that gamma; P is how "
            "many rows of a target pass the array holds at once, and at P = 1 speculation cannot gain; a small draft's "
            "LM head is large beside it, and may be counted",
        )
    if len(measured := grid[grid["quality_loss"].notna()]):
        yield (
            "quality",
            "Quality beside acceptance",
            quality_chart(measured),
            "Each point is a cell, with its target's stoc_len beside it: far to the right SC has made the target a "
            "worse model, however well its draft agrees with it; perplexity is over the floating-point target's own "
            "continuations of the prompts",
        )
    if len(both := costed[costed["quality_loss"].notna()]):
        yield (
            "frontier",
            "What a loss of quality buys",
            frontier_chart(_over_shortest(both)),
            "Each point is a cell: its modelled speedup, all rows at once, over plain SC decoding at the shortest "
            "target length here, and what SC costs its target; the line is the best that a loss up to there buys",
        )
    yield (
        "precision",
        "Acceptance by length and precision",
        precision_map(grid),
        "alpha of one draft for each stream length and precision of the target",
    )
    yield (
        "lengths",
        "Draft length against target length",
        length_map(grid),
        "alpha for each pair of stream lengths: along a column the draft's streams shrink alone, along a row the "
        "target's",
    )
    tally = run.tally_of(grid)
    yield (
        "positions",
        "Acceptance by position in the block",
        positions_chart(positions(tally), grid),
        "alpha_i is the share of blocks that accepted proposal i among those that could, so that a falling line means "
        f"that the draft strays from the target's text; {_bars(grid)}",
    )
    yield (
        "categories",
        "Acceptance by category of prompt",
        categories_chart(by_category(tally), grid),
        "alpha of the prompts of one category; bars are 95\u00a0% intervals over its prompts, where it has at least "
        f"{MIN_PROMPTS}",
    )
    yield (
        "prediction",
        "Measured against predicted tau",
        prediction_chart(grid),
        "On the diagonal agreement is as if positions were independent; above it agreement comes in runs",
    )


def _over_shortest(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells with speedup_over_shortest: over plain decoding at the target length that takes the fewest cycles."""
    cycles = cells["target_cycles"].to_numpy()
    return cells.assign(
        speedup_over_shortest=speedup_over_other_length(cells["speedup_at_once"].to_numpy(), cycles, cycles.min())
    )


def _bars(cells: pd.DataFrame) -> str:
    """What a caption says of intervals."""
    if (cells["interval"] == NO_INTERVAL).all():
        return f"there are no intervals below {MIN_PROMPTS} prompts, so differences may be chance"
    return "bars are 95\u00a0% intervals over prompts"


def _costs(run: Run, summary: pd.DataFrame) -> list[dict[str, str]]:
    """What the simulation took, a row per device: this is the price of the run, and nothing about SC hardware."""
    rows = []
    for _, platform, cells in comparable(summary):
        times = [run.metadata[cell_id]["wall_time_s"] for cell_id in cells["cell_id"]]
        loops = [time_s for time_s in times if time_s is not None]
        seconds = cells[["draft_time_s", "verify_time_s"]].sum()
        rows.append(
            {
                "computed on": platform,
                "cells": str(len(cells)),
                "run as loops": str(len(loops)),
                "wall time": f"{sum(loops):,.0f} s",
                "draft passes": f"{seconds['draft_time_s']:,.0f} s",
                "target passes": f"{seconds['verify_time_s']:,.0f} s",
                "tokens": f"{cells['tokens'].sum():,}",
            }
        )
    return rows
