"""Differences between two cells that share their prompts."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from scspec.stats.bootstrap import MIN_PROMPTS
from scspec.stats.intervals import BOOTSTRAP, NO_INTERVAL, ROUNDING, UNANIMOUS, mixed_tau, one_sided_share, percentiles
from scspec.stats.joint import ResampledCell, cell_facts, check_alike, resampled_cells
from scspec.stats.tally import Tally

DIFFERENCE_COLUMNS = (
    *("cell_id_a", "cell_id_b", "prompts"),
    *(f"{name}{end}" for name in ("alpha", "tau") for end in ("_a", "_b", "_diff", "_diff_lo", "_diff_hi")),
    *("interval", "tau_interval"),
)


def paired_differences(
    tally: Tally,
    metadata: Mapping[str, dict[str, Any]],
    pairs: Iterable[tuple[str, str]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per pair of cell ids (a, b), in their order: DIFFERENCE_COLUMNS; _diff is b's estimate minus a's.

    tally: of the blocks, and metadata, of `read_cells`. Each resample draws the same prompts for both cells, so what
    makes a prompt hard for both cancels (the paired bootstrap; Efron & Tibshirani 1993, An Introduction to the
    Bootstrap, section 8.3); _lo and _hi are 95 % percentiles over draws, strata as in `summarise`. `interval` (of
    alpha's) and `tau_interval` are "bootstrap"; "none" below MIN_PROMPTS prompts, or for tau where one is undefined;
    or "unanimous" where no resample differs from the estimate, as between identical cells, whose difference is 0.
    Then a share of 1 - `one_sided_share` of prompts may still deviate, in either direction and as far as can be, on
    which both bounds rest: of alpha 0 and 1, of tau 1 and gamma + 1.

    Raises ValueError naming the cells if one is unknown, or if the two differ in platform (PLATFORM_COLUMNS), way of
    decoding (sampling settings, token budget) or prompts.
    """
    pairs = list(pairs)
    if unknown := sorted({cell_id for pair in pairs for cell_id in pair} - set(tally.cells["cell_id"])):
        raise ValueError(f"pairs: no blocks of cell {unknown[0]!r}; allowed: the cell ids of `tally`")
    if not pairs:
        return pd.DataFrame(columns=DIFFERENCE_COLUMNS)
    tally = tally.only({cell_id for pair in pairs for cell_id in pair})
    facts = cell_facts(tally, metadata)
    for pair in pairs:
        check_alike(pair, facts)
    cells = resampled_cells(tally, resamples, seed)
    return pd.DataFrame([_difference_row(*pair, cells) for pair in pairs], columns=DIFFERENCE_COLUMNS)


def _difference_row(cell_id_a: str, cell_id_b: str, cells: Mapping[str, ResampledCell]) -> tuple[Any, ...]:
    a, b = cells[cell_id_a], cells[cell_id_b]
    share = one_sided_share(a.prompts)
    worst = share * (b.alpha - a.alpha)
    alpha_low, alpha_high, interval = _difference_interval(
        b.alphas - a.alphas, a.prompts, (worst - (1 - share), worst + (1 - share))
    )
    least = mixed_tau(share, b.tau, 1) - mixed_tau(share, a.tau, a.gamma + 1)
    most = mixed_tau(share, b.tau, b.gamma + 1) - mixed_tau(share, a.tau, 1)
    tau_low, tau_high, tau_interval = _difference_interval(b.taus - a.taus, a.prompts, (least, most))
    alphas = a.alpha, b.alpha, b.alpha - a.alpha, alpha_low, alpha_high
    taus = a.tau, b.tau, b.tau - a.tau, tau_low, tau_high
    return cell_id_a, cell_id_b, a.prompts, *alphas, *taus, interval, tau_interval


def _difference_interval(
    resampled: np.ndarray, prompts: int, unanimous: tuple[float, float]
) -> tuple[float, float, str]:
    if prompts < MIN_PROMPTS or np.isnan(unanimous).any():
        return np.nan, np.nan, NO_INTERVAL
    if np.nanmax(resampled) - np.nanmin(resampled) < ROUNDING:
        return *unanimous, UNANIMOUS
    return *percentiles(resampled), BOOTSTRAP
