"""Cells resampled jointly: which may be, and alpha and tau of each under the same draws of prompts.

They must be of one platform (PLATFORM_COLUMNS), since logits of different platforms may differ in the last bit, and SC
turns that into other tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from scspec.stats.bootstrap import resampled_chunks
from scspec.stats.cells import PLATFORM_COLUMNS, with_platforms
from scspec.stats.sums import alpha, tau
from scspec.stats.tally import Tally


@dataclass(frozen=True)
class ResampledCell:
    """alpha and tau of one cell, and of its resamples, (R,): the same draws of prompts in every cell with these."""

    gamma: int
    prompts: int
    alpha: float
    alphas: np.ndarray
    tau: float
    taus: np.ndarray


def resampled_cells(tally: Tally, resamples: int, seed: int) -> dict[str, ResampledCell]:
    """cell_id -> the cell, of a tally."""
    cells = {}
    for chunk in resampled_chunks(tally, resamples, seed):
        total = chunk.sums.total()
        columns = alpha(total), alpha(chunk.drawn), tau(total), tau(chunk.drawn)
        for unit, *its in zip(chunk.units, *columns, strict=True):
            cells[unit] = ResampledCell(chunk.gamma, chunk.prompts, *its)
    return cells


def check_alike(cell_ids: Sequence[str], facts: Mapping[str, dict[str, Any]]) -> None:
    """Raises ValueError naming two cells that differ in what must be the same in cells that are paired or pooled."""
    first, *others = cell_ids
    for other, (name, value) in product(others, facts[first].items()):
        if facts[other][name] != value:
            how = f"{value} and {facts[other][name]}"
            if name == "prompts":
                _, alone = min(value ^ facts[other][name])
                how = f"{len(value)} and {len(facts[other][name])}, {alone!r} in one of them alone"
            raise ValueError(f"cells {first!r} and {other!r} must have the same {name} to be compared, not {how}")


def cell_facts(tally: Tally, metadata: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """cell_id -> what must be the same in cells that are paired: platform, way of decoding, prompts."""
    cells, prompts = with_platforms(tally, metadata), tally.prompts
    return {
        cell["cell_id"]: {
            **{name: cell[name] for name in (*PLATFORM_COLUMNS, "do_sample")},
            "sampling settings": metadata[cell["cell_id"]]["cell"]["sampling"],
            "max_new_tokens": metadata[cell["cell_id"]]["cell"]["max_new_tokens"],
            "prompt file (sha256)": metadata[cell["cell_id"]]["prompts"]["sha256"],
            "prompts": prompts[cell["cell_id"]],
        }
        for cell in cells.to_dict("records")
    }
