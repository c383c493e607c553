"""Sums over blocks, and the estimates that are functions of them (docs/method.md)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TIMES = ("draft_time_s", "verify_time_s")
RESAMPLED = ("beta_sum", "beta_count")  # what intervals need, beside the sums of each position
SUMS = [
    *(*RESAMPLED, "evaluated_sum", "evaluated_count"),
    *("accepted", "proposed", "blocks", "tokens", *TIMES),
]


@dataclass(frozen=True)
class Sums:
    """Sums over blocks: a leading axis of quantities, then any axes: cells, and prompts or resamples.

    columns: (len(SUMS), ...), of resampled sums (len(RESAMPLED), ...); at_risk, succeeded: (gamma, ...), blocks that
    emitted at least i tokens, and those of them that accepted at least i proposals, i = 1..gamma.
    """

    columns: Floats
    at_risk: Floats
    succeeded: Floats

    def __getitem__(self, name: str) -> Floats:
        column: Floats = self.columns[SUMS.index(name)]
        return column

    def total(self) -> "Sums":
        """Sums over the last axis, the prompts."""
        return Sums(self.columns.sum(axis=-1), self.at_risk.sum(axis=-1), self.succeeded.sum(axis=-1))

    def resampled(self, draws: Floats) -> "Sums":
        """Sums with prompt n counted draws[r, n] times: the last axis becomes that of the resamples r."""
        parts = (self.columns[: len(RESAMPLED)], self.at_risk, self.succeeded)
        return Sums(*(np.tensordot(part, draws, axes=(-1, -1)) for part in parts))


def alpha(sums: Sums) -> Floats:
    """Mean beta over every emitted position, the bonus position included; estimates one number, whatever gamma is."""
    return sums["beta_sum"] / sums["beta_count"]


def alpha_evaluated(sums: Sums) -> Floats:
    """Mean beta without the bonus positions (in-block index <= gamma): depends on gamma, shown second."""
    return sums["evaluated_sum"] / sums["evaluated_count"]


def position_alphas(sums: Sums) -> Floats:
    """alpha_i, (gamma, ...): of the blocks that emitted at least i tokens, the share that accepted at least i.

    A block that EOS cut before i says nothing about i and is not at risk there. NaN where no block is at risk.
    """
    unknown = np.full(sums.at_risk.shape, np.nan)
    alphas: Floats = np.divide(sums.succeeded, sums.at_risk, out=unknown, where=sums.at_risk > 0)
    return alphas


def survival(sums: Sums) -> Floats:
    """P(accepted >= i), (gamma, ...): prod_{j<=i} alpha_j. 0 behind an i at which acceptance died out; else NaN behind
    one where no block is at risk."""
    alphas = position_alphas(sums)
    died_out = np.logical_or.accumulate(alphas == 0, axis=0)
    known: Floats = np.where(died_out & np.isnan(alphas), 0.0, alphas)
    return known.cumprod(axis=0)


def tau(sums: Sums) -> Floats:
    """Block efficiency: emitted tokens per target pass, 1 + sum_i P(accepted >= i) (docs/method.md)."""
    emitted: Floats = 1 + survival(sums).sum(axis=0)
    return emitted


def predicted_tau(alpha: Floats | float, gamma: int) -> Floats:
    """(1 - alpha**(gamma + 1)) / (1 - alpha), gamma + 1 at alpha 1: tau if agreement were independent between
    positions. Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1."""
    predicted: Floats = np.sum(np.asarray(alpha)[..., None] ** np.arange(gamma + 1), axis=-1)
    return predicted


def acceptance_rate(sums: Sums) -> Floats:
    """Accepted / proposed proposals: falls with gamma by construction, never to be compared across gamma."""
    return sums["accepted"] / sums["proposed"]


def tokens_per_s(sums: Sums) -> Floats:
    """Kept tokens per second of draft and verify wall time (the simulator's speed); NaN where times are 0 or null."""
    time_s = sums["draft_time_s"] + sums["verify_time_s"]
    rate: Floats = np.divide(sums["tokens"], time_s, out=np.full(time_s.shape, np.nan), where=time_s > 0)
    return rate


ESTIMATES = {
    "alpha": alpha,
    "alpha_evaluated": alpha_evaluated,
    "tau": tau,
    "acceptance_rate": acceptance_rate,
    "tokens_per_s": tokens_per_s,
}


def sums_of(names: pd.Index, values: Floats, gamma: int) -> Sums:
    """`Sums` of the columns of `Tally.sums`, which lie along the first axis."""
    by_position = ([f"{name}_{i}" for i in range(1, gamma + 1)] for name in ("at_risk", "succeeded"))
    return Sums(*(values[[names.get_loc(name) for name in rows]] for rows in (SUMS, *by_position)))
