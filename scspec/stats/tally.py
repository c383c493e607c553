"""Blocks -> what the estimates of their cells are functions of: sums over the blocks of each prompt."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scspec.results import KEY_COLUMNS, list_lengths, padded

_SUMMED = ("cell_id", "category", "prompt_id")


@dataclass(frozen=True)
class Tally:
    """Some cells, counted once for all estimates.

    cells: KEY_COLUMNS and beta_min, the cell's smallest beta; a row per cell in the order in which the cells appear.
    sums: of each prompt, its turns together: SUMS, and at_risk_i, succeeded_i for i = 1..the largest gamma; the index
    (cell_id, category, prompt_id) in ascending order. Times are NaN where no block of the prompt has one, as in
    replayed cells.
    """

    cells: pd.DataFrame
    sums: pd.DataFrame

    @classmethod
    def of(cls, blocks: pd.DataFrame) -> "Tally":
        """The tally of blocks as `read_cells` gives them. Raises ValueError if a cell has two settings."""
        cells = blocks[list(KEY_COLUMNS)].drop_duplicates(ignore_index=True)
        if (twice := cells["cell_id"].duplicated()).any():
            raise ValueError(f"more than one setting in cell {cells['cell_id'][twice].iloc[0]!r}")
        if blocks.empty:
            return cls(cells.assign(beta_min=0.0), pd.DataFrame())
        smallest = pd.Series(padded(blocks["beta"], np.inf).min(axis=1)).groupby(blocks["cell_id"].to_numpy()).min()
        return cls(cells.assign(beta_min=cells["cell_id"].map(smallest)), _prompt_sums(blocks))

    def only(self, cell_ids: Collection[str]) -> "Tally":
        """The tally of some of the cells."""
        own = self.sums.index.get_level_values("cell_id").isin(cell_ids)
        return Tally(self.cells[self.cells["cell_id"].isin(cell_ids)].reset_index(drop=True), self.sums[own])

    @property
    def gammas(self) -> dict[str, int]:
        """cell_id -> gamma."""
        return dict(zip(self.cells["cell_id"], self.cells["gamma"], strict=True))

    @property
    def prompts(self) -> dict[str, set[tuple[str, str]]]:
        """cell_id -> (category, prompt_id) of its prompts."""
        found: dict[str, set[tuple[str, str]]] = {cell_id: set() for cell_id in self.cells["cell_id"]}
        for cell_id, *prompt in self.sums.index:
            found[cell_id].add(tuple(prompt))
        return found


def _block_sums(blocks: pd.DataFrame) -> pd.DataFrame:
    """A row per block with the columns of SUMS and at_risk_i, succeeded_i for i = 1..the largest gamma, each times
    the block's weight."""
    emitted = list_lengths(blocks["beta"])
    gamma, accepted = blocks["gamma"].to_numpy(), blocks["accepted"].to_numpy()
    beta = padded(blocks["beta"], 0.0)
    evaluated = np.arange(beta.shape[1]) < gamma[:, None]  # not the bonus position
    sums = {
        "beta_sum": beta.sum(axis=1),
        "beta_count": emitted,
        "evaluated_sum": (beta * evaluated).sum(axis=1),
        "evaluated_count": np.minimum(emitted, gamma),
        "accepted": accepted,
        "proposed": gamma,
        "blocks": np.ones(len(blocks)),
        "tokens": blocks["kept"].to_numpy(),
        "draft_time_s": blocks["draft_time_s"].to_numpy(),
        "verify_time_s": blocks["verify_time_s"].to_numpy(),
    }
    for i in range(1, gamma.max() + 1):
        sums[f"at_risk_{i}"] = emitted >= i
        sums[f"succeeded_{i}"] = (emitted >= i) & (accepted >= i)
    return pd.DataFrame(sums, dtype=np.float64).mul(blocks["weight"].to_numpy(), axis=0)


def _prompt_sums(blocks: pd.DataFrame) -> pd.DataFrame:
    keys = list(_SUMMED)
    per_block = pd.concat([blocks[keys].reset_index(drop=True), _block_sums(blocks)], axis=1)
    return per_block.groupby(keys, sort=True, observed=True).sum(min_count=1)
