"""The shortest streams that keep most of the acceptance of the same pair in floating point."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scspec.stats.bootstrap import MIN_PROMPTS
from scspec.stats.intervals import INTERVAL_LEVEL, ROUNDING
from scspec.stats.joint import cell_facts, check_alike, resampled_cells
from scspec.stats.tally import Tally

KEPT_SHARE = 0.95  # of alpha in floating point


def shortest_streams(
    tally: Tally,
    metadata: Mapping[str, dict[str, Any]],
    lengths: Mapping[str, int],
    reference: Sequence[str],
    *,
    share: float = KEPT_SHARE,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float | int]:
    """Return the shortest stream length whose alpha is at least `share` of the reference's.

    lengths: cell_id -> its stream length in clock cycles. reference: the cell ids of the pair in floating point. Cells
    of one length, which differ in seeds and gamma, count with their mean alpha, as do those of the reference.
    "length", "length_lo", "length_hi": lengths of those given, infinity where none keeps that much. The bounds are
    95 % percentiles of the same choice in a bootstrap over prompts, one draw for all cells, strata as in `summarise`,
    taken outwards to a length of the grid (no interpolation); NaN below MIN_PROMPTS prompts. "alpha": that of the
    chosen length, NaN where there is none; "reference_alpha"; "prompts": how many are resampled. Raises ValueError for
    cells that do not share platform, way of decoding and prompts, and for an unknown cell.
    """
    wanted = [*reference, *lengths]
    if unknown := sorted(set(wanted) - set(tally.cells["cell_id"])):
        raise ValueError(f"lengths: no blocks of cell {unknown[0]!r}; allowed: the cell ids of `tally`")
    tally = tally.only(wanted)
    check_alike(wanted, cell_facts(tally, metadata))
    cells = resampled_cells(tally, resamples, seed)
    prompts = cells[wanted[0]].prompts
    of_length = {length: [cell_id for cell_id in lengths if lengths[cell_id] == length] for length in lengths.values()}
    ordered = sorted(of_length)
    groups = [reference, *(of_length[length] for length in ordered)]
    whole, *alphas = [float(np.mean([cells[cell_id].alpha for cell_id in group])) for group in groups]
    drawn_whole, *drawn = [np.mean([cells[cell_id].alphas for cell_id in group], axis=0) for group in groups]
    choices = np.array([*ordered, np.inf])
    length = float(choices[_first_kept(np.array(alphas)[:, None], whole, share)[0]])
    low = high = np.nan
    if prompts >= MIN_PROMPTS:
        chosen = choices[_first_kept(np.array(drawn), drawn_whole, share)]
        tail = (1 - INTERVAL_LEVEL) / 2
        low = np.quantile(chosen, tail, method="lower")
        high = np.quantile(chosen, 1 - tail, method="higher")
    alpha = alphas[ordered.index(int(length))] if np.isfinite(length) else np.nan
    return {
        **{"length": length, "length_lo": low, "length_hi": high},
        **{"alpha": alpha, "reference_alpha": whole, "prompts": prompts},
    }


def _first_kept(alphas: np.ndarray, reference: np.ndarray | float, share: float) -> np.ndarray:
    """The index of the first row, (lengths, R), that keeps the share; the number of rows where none does."""
    kept = alphas >= share * reference * (1 - ROUNDING)
    return np.where(kept.any(axis=0), kept.argmax(axis=0), len(kept))
