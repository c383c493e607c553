"""An estimate and its resamples -> bounds, and what kind they are of."""

import numpy as np

from scspec.stats.bootstrap import MIN_PROMPTS

INTERVAL_LEVEL = 0.95

BOOTSTRAP, ONE_SIDED, UNANIMOUS, NO_INTERVAL = "bootstrap", "one-sided", "unanimous", "none"

# Rounding of a ratio of float64 sums over prompts, relative: at most 2**-53 a summand, here of up to 1000 prompts.
ROUNDING = 1e-12


def one_sided_share(prompts: int) -> float:
    """The smallest share of unanimous prompts that n unanimous prompts out of n leave plausible at 95 %.

    h = 0.05**(1/n), about 1 - 3/n, the "rule of three" (Hanley & Lippman-Hand 1983, JAMA 249:1743; Clopper-Pearson
    with no failure). Prompts are the units, since positions within a prompt are not independent. At worst a
    deviating prompt deviates everywhere, and prompts are taken as equally long, so alpha = 1 has the lower bound h
    and alpha = 0 the upper bound 1 - h. A share s of prompts with all proposals accepted and the rest with none
    gives tau = 1 / (s / (gamma + 1) + 1 - s) tokens a pass: s = h bounds tau = gamma + 1 from below, s = 1 - h
    bounds tau = 1 from above.
    """
    share: float = (1 - INTERVAL_LEVEL) ** (1 / prompts)
    return share


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The bounds within which INTERVAL_LEVEL of the resamples (R,) lie, NaN left out."""
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def share_interval(
    estimate: float, resampled: np.ndarray, prompts: int, blocks_of_deviating: float = 1.0
) -> tuple[float, float, str]:
    """The interval of a share (alpha, P(accepted >= i), alpha_i) as (low, high, kind).

    A share of positions takes prompts as equally long. One of blocks does, too: a prompt in which proposals are
    rejected has `blocks_of_deviating` times the blocks of one in which none is, so it weighs more against an estimate
    of 1; against an estimate of 0, one that succeeds weighs less, which is left out.
    """
    if prompts < MIN_PROMPTS or np.isnan(estimate):
        return np.nan, np.nan, NO_INTERVAL
    if estimate in (0, 1):
        share = one_sided_share(prompts)
        low = share / (share + (1 - share) * blocks_of_deviating)
        return (low, 1.0, ONE_SIDED) if estimate == 1 else (0.0, 1 - share, ONE_SIDED)
    return *percentiles(resampled), BOOTSTRAP


def mixed_tau(share: float, tau: float, other_tau: float) -> float:
    """tau where a share of the tokens comes at `tau` tokens a pass and the rest at `other_tau`."""
    return 1 / (share / tau + (1 - share) / other_tau)


def tau_interval(estimate: float, resampled: np.ndarray, prompts: int, gamma: int) -> tuple[float, float, str]:
    """The interval of tau as (low, high, kind); at the ends of its range, 1 and gamma + 1, from `one_sided_share`."""
    if prompts < MIN_PROMPTS or np.isnan(estimate):
        return np.nan, np.nan, NO_INTERVAL
    share = one_sided_share(prompts)
    if estimate == gamma + 1:
        return mixed_tau(share, gamma + 1, 1), estimate, ONE_SIDED
    if estimate == 1:
        return 1.0, mixed_tau(share, 1, gamma + 1), ONE_SIDED
    return *percentiles(resampled), BOOTSTRAP
