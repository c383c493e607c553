"""Estimates of single cells: whole, by position, by category."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from scspec.results import KEY_COLUMNS
from scspec.stats.bootstrap import Chunk, resampled_chunks
from scspec.stats.intervals import share_interval, tau_interval
from scspec.stats.sums import (
    ESTIMATES,
    TIMES,
    alpha,
    position_alphas,
    predicted_tau,
    survival,
    tau,
)
from scspec.stats.tally import Tally

PLATFORM_COLUMNS = ("device_name", "dtype", "backend")  # what a cell was computed on and in

INTERVAL_COLUMNS = ("alpha_lo", "alpha_hi", "interval", "tau_lo", "tau_hi", "tau_interval")
SUMMARY_COLUMNS = (
    *("device_name", "dtype"),
    *ESTIMATES,
    *("predicted_tau", "alpha_lo", "alpha_hi", "interval", "tau_lo", "tau_hi", "tau_interval"),
    *("tokens", "blocks", "prompts", *TIMES, *(f"mean_{name}" for name in TIMES), "beta_min"),
)


def with_platforms(tally: Tally, metadata: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """`tally.cells` with device_name and dtype."""
    keys = tally.cells
    its = [metadata[cell_id] for cell_id in keys["cell_id"]]
    return keys.assign(device_name=[i["device"] for i in its], dtype=[i["cell"]["dtype"] for i in its])


def summarise(
    tally: Tally, metadata: Mapping[str, dict[str, Any]], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per cell, in the order of `tally.cells`: keys, platform, estimates, intervals, counts, times.

    tally: of the blocks, and metadata: cell_id -> metadata, of `read_cells`. Columns: KEY_COLUMNS and SUMMARY_COLUMNS:
    device_name (the device, and what its card or processor is called) and dtype; the estimates; 95 % bounds alpha_lo,
    alpha_hi, tau_lo, tau_hi with `interval` (of alpha) and `tau_interval` in {"bootstrap", "one-sided", "none"};
    tokens (kept), blocks, prompts; times in seconds, summed and (mean_...) per block; beta_min, the smallest beta of
    the cell.

    The interval is a percentile bootstrap over prompts, stratified by category if each has at least
    MIN_PROMPTS_PER_STRATUM prompts; "none" below MIN_PROMPTS prompts; `one_sided_share` where the estimate is at
    the end of its range. Draws come from a generator of their own, seeded with `seed`.
    """
    if tally.cells.empty:
        return pd.DataFrame(columns=[*KEY_COLUMNS, *SUMMARY_COLUMNS])
    keys = with_platforms(tally, metadata)
    chunks = resampled_chunks(tally, resamples, seed)
    estimates = pd.concat([_estimates(chunk) for chunk in chunks]).loc[keys["cell_id"]].reset_index(drop=True)
    return pd.concat([keys, estimates], axis=1)[[*KEY_COLUMNS, *SUMMARY_COLUMNS]]


def _estimates(chunk: Chunk) -> pd.DataFrame:
    """Estimates, intervals, counts and times, a row per unit, which is its index."""
    total = chunk.sums.total()
    values = {name: estimate(total) for name, estimate in ESTIMATES.items()}
    table = {
        **values,
        "predicted_tau": predicted_tau(values["alpha"], chunk.gamma),
        **_intervals(chunk),
        # sampled and replayed: expected numbers, so rounded
        **{name: np.rint(total[name]).astype(np.int64) for name in ("tokens", "blocks")},
        "prompts": chunk.prompts,
        **{name: total[name] for name in TIMES},
        **{f"mean_{name}": total[name] / total["blocks"] for name in TIMES},
    }
    return pd.DataFrame(table).set_axis(chunk.units)


def _intervals(chunk: Chunk) -> pd.DataFrame:
    """_INTERVAL_COLUMNS, a row per unit."""
    total = chunk.sums.total()
    alphas, taus = zip(alpha(total), alpha(chunk.drawn), strict=True), zip(tau(total), tau(chunk.drawn), strict=True)
    rows = [
        (*share_interval(*its_alpha, chunk.prompts), *tau_interval(*its_tau, chunk.prompts, chunk.gamma))
        for its_alpha, its_tau in zip(alphas, taus, strict=True)
    ]
    return pd.DataFrame(rows, columns=INTERVAL_COLUMNS)


POSITION_COLUMNS = (
    *("cell_id", "i", "p_accepted", "p_accepted_lo", "p_accepted_hi", "p_accepted_interval"),
    *("alpha_i", "alpha_i_lo", "alpha_i_hi", "alpha_i_interval", "at_risk", "prompts"),
)


def positions(tally: Tally, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per (cell_id, i), i = 1..gamma: POSITION_COLUMNS, cells and positions in ascending order.

    p_accepted is P(accepted >= i) (`survival`), whose sum over i is tau - 1; alpha_i is that of `position_alphas`, NaN
    where no block is at risk. 95 % bounds _lo, _hi and their kind _interval follow the rules and the draws of
    `summarise`; those of alpha_i count the prompts that have a block at risk at i, which are `prompts`. at_risk: such
    blocks, of sampled and replayed cells their expected number.
    """
    if tally.cells.empty:
        return pd.DataFrame(columns=POSITION_COLUMNS)
    rows = [row for chunk in resampled_chunks(tally, resamples, seed) for row in _position_rows(chunk)]
    return pd.DataFrame(rows, columns=POSITION_COLUMNS).sort_values(["cell_id", "i"], ignore_index=True)


def _position_rows(chunk: Chunk) -> Iterator[tuple[Any, ...]]:
    total = chunk.sums.total()
    reached, alphas = survival(total), position_alphas(total)
    drawn_reached, drawn_alphas = survival(chunk.drawn), position_alphas(chunk.drawn)
    prompts = (chunk.sums.at_risk > 0).sum(axis=-1)
    passes = chunk.gamma + 1  # blocks of a prompt that accepts nothing, for one of a prompt that accepts everything
    for c, unit in enumerate(chunk.units):
        for i in range(chunk.gamma):
            its_reached = share_interval(reached[i, c], drawn_reached[i, c], chunk.prompts, passes)
            its_alpha = share_interval(alphas[i, c], drawn_alphas[i, c], prompts[i, c], passes / (i + 1))
            counts = total.at_risk[i, c], prompts[i, c]
            yield unit, i + 1, reached[i, c], *its_reached, alphas[i, c], *its_alpha, *counts


CATEGORY_COLUMNS = ("cell_id", "category", "alpha", "tau", *INTERVAL_COLUMNS, "tokens", "blocks", "prompts")


def by_category(tally: Tally, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per (cell_id, category), in ascending order: CATEGORY_COLUMNS, as in `summarise` for the whole cell."""
    if tally.cells.empty:
        return pd.DataFrame(columns=CATEGORY_COLUMNS)
    chunks = resampled_chunks(tally, resamples, seed, by=("cell_id", "category"))
    table = pd.concat([_estimates(chunk) for chunk in chunks])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["cell_id", "category"])
    return table.sort_index().reset_index()[list(CATEGORY_COLUMNS)]
