"""Tables of blocks -> estimates with intervals (DESIGN section 4).

Every estimate is a function of sums over prompts, so a bootstrap over prompts is one matrix product of
(how often each prompt was drawn) and (its sums). An estimate is of one cell; whatever compares or pools cells must
take them from one platform (PLATFORM_COLUMNS), since logits of different platforms may differ in the last bit, and SC
turns that into other tokens. Not covered here: paired differences between cells, quality of the target, replay, the
hardware model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from scspec.results import KEY_COLUMNS, padded

INTERVAL_LEVEL = 0.95
MIN_PROMPTS = 8  # below, no interval: a handful of prompts does not show how prompts vary
MIN_PROMPTS_PER_STRATUM = 10

PLATFORM_COLUMNS = ("device_name", "dtype", "backend")  # what a cell was computed on and in

BOOTSTRAP, ONE_SIDED, NO_INTERVAL = "bootstrap", "one-sided", "none"

TIMES = ("draft_time_s", "verify_time_s")
_SUMS = [
    *("beta_sum", "beta_count", "evaluated_sum", "evaluated_count"),
    *("accepted", "proposed", "blocks", "tokens", *TIMES),
]


@dataclass(frozen=True)
class Sums:
    """Sums over the blocks of one prompt (or of several): a row per prompt or resample, a column per quantity.

    columns: (R, len(_SUMS)); at_risk, succeeded: (R, gamma), blocks that emitted at least i tokens, and those of
    them that accepted at least i proposals, i = 1..gamma.
    """

    columns: np.ndarray
    at_risk: np.ndarray
    succeeded: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[:, _SUMS.index(name)]

    def weighted(self, weights: np.ndarray) -> "Sums":
        """Sums with prompt r counted weights[b, r] times, a row per b."""
        return Sums(weights @ self.columns, weights @ self.at_risk, weights @ self.succeeded)


def alpha(sums: Sums) -> np.ndarray:
    """Mean beta over every emitted position, the bonus position included; estimates one number, whatever gamma is."""
    return sums["beta_sum"] / sums["beta_count"]


def alpha_evaluated(sums: Sums) -> np.ndarray:
    """Mean beta without the bonus positions (in-block index <= gamma): depends on gamma, shown second."""
    return sums["evaluated_sum"] / sums["evaluated_count"]


def hazards(sums: Sums) -> np.ndarray:
    """alpha_i, (R, gamma): of the blocks that emitted at least i tokens, the share that accepted at least i.

    A block that EOS cut before i says nothing about i and is not at risk there. NaN where no block is at risk,
    unless acceptance had already died out before i: then 0.
    """
    died_out = np.logical_or.accumulate((sums.at_risk > 0) & (sums.succeeded == 0), axis=1)
    unknown = np.where(died_out, 0.0, np.nan)
    return np.divide(sums.succeeded, sums.at_risk, out=unknown, where=sums.at_risk > 0)


def tau(sums: Sums) -> np.ndarray:
    """Block efficiency: emitted tokens per target pass, 1 + sum_i prod_{j<=i} alpha_j (DESIGN 4)."""
    return 1 + np.cumprod(hazards(sums), axis=1).sum(axis=1)


def predicted_tau(alpha: np.ndarray | float, gamma: int) -> np.ndarray:
    """(1 - alpha**(gamma + 1)) / (1 - alpha), gamma + 1 at alpha 1: tau if agreement were independent between
    positions. Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1."""
    return np.sum(np.asarray(alpha)[..., None] ** np.arange(gamma + 1), axis=-1)


def acceptance_rate(sums: Sums) -> np.ndarray:
    """Accepted / proposed proposals: falls with gamma by construction, never to be compared across gamma."""
    return sums["accepted"] / sums["proposed"]


def tokens_per_s(sums: Sums) -> np.ndarray:
    """Kept tokens per second of draft and verify wall time (the simulator's speed); NaN if no time was taken."""
    time_s = sums["draft_time_s"] + sums["verify_time_s"]
    return np.divide(sums["tokens"], time_s, out=np.full(len(time_s), np.nan), where=time_s > 0)


ESTIMATES = {
    "alpha": alpha,
    "alpha_evaluated": alpha_evaluated,
    "tau": tau,
    "acceptance_rate": acceptance_rate,
    "tokens_per_s": tokens_per_s,
}
SUMMARY_COLUMNS = (
    *("device_name", "dtype"),
    *ESTIMATES,
    *("predicted_tau", "alpha_lo", "alpha_hi", "interval", "tau_lo", "tau_hi", "tau_interval"),
    *("tokens", "blocks", "prompts", *TIMES, *(f"mean_{name}" for name in TIMES), "beta_min"),
)


def _block_sums(blocks: pd.DataFrame) -> pd.DataFrame:
    """A row per block with the columns of _SUMS and at_risk_i, succeeded_i for i = 1..the largest gamma, each times
    the block's weight."""
    emitted = blocks["beta"].map(len).to_numpy()
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


def prompt_sums(blocks: pd.DataFrame) -> pd.DataFrame:
    """Sums per (cell_id, category, prompt_id), the turns of a prompt together, in that order of the index."""
    keys = ["cell_id", "category", "prompt_id"]
    per_block = pd.concat([blocks[keys].reset_index(drop=True), _block_sums(blocks)], axis=1)
    return per_block.groupby(keys, sort=True, observed=True).sum()


@lru_cache(maxsize=4)
def _draws(stratum_sizes: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, (resamples, prompts): n of n with replacement within each stratum.

    The same for every cell with these sizes, so cells that share their prompts are resampled alike.
    """
    generator = np.random.default_rng(seed)
    strata = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in stratum_sizes]
    return np.concatenate(strata, axis=1).astype(np.float64)


def _stratum_sizes(categories: pd.Index) -> tuple[int, ...]:
    """Prompts per category in the sorted order of the rows, if each has enough; else one stratum of all."""
    sizes = categories.value_counts(sort=False).sort_index()
    return tuple(sizes) if sizes.min() >= MIN_PROMPTS_PER_STRATUM else (len(categories),)


def one_sided_share(prompts: int) -> float:
    """The smallest share of unanimous prompts that n unanimous prompts out of n leave plausible at 95 %.

    h = 0.05**(1/n), about 1 - 3/n, the "rule of three" (Hanley & Lippman-Hand 1983, JAMA 249:1743; Clopper-Pearson
    with no failure). Prompts are the units, since positions within a prompt are not independent. At worst a
    deviating prompt deviates everywhere, and prompts are taken as equally long, so alpha = 1 has the lower bound h
    and alpha = 0 the upper bound 1 - h. A share s of prompts with all proposals accepted and the rest with none
    gives tau = 1 / (s / (gamma + 1) + 1 - s) tokens a pass: s = h bounds tau = gamma + 1 from below, s = 1 - h
    bounds tau = 1 from above.
    """
    return (1 - INTERVAL_LEVEL) ** (1 / prompts)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _alpha_interval(estimate: float, resampled: np.ndarray, prompts: int) -> tuple[float, float, str]:
    if prompts < MIN_PROMPTS:
        return np.nan, np.nan, NO_INTERVAL
    if estimate in (0, 1):
        share = one_sided_share(prompts)
        return (share, 1.0, ONE_SIDED) if estimate == 1 else (0.0, 1 - share, ONE_SIDED)
    return *_percentiles(resampled), BOOTSTRAP


def _tau_interval(estimate: float, resampled: np.ndarray, prompts: int, gamma: int) -> tuple[float, float, str]:
    if prompts < MIN_PROMPTS or np.isnan(estimate):
        return np.nan, np.nan, NO_INTERVAL
    if estimate in (1, gamma + 1):
        share = one_sided_share(prompts)
        share = share if estimate > 1 else 1 - share
        bound = 1 / (share / (gamma + 1) + 1 - share)
        return (bound, estimate, ONE_SIDED) if estimate > 1 else (1.0, bound, ONE_SIDED)
    return *_percentiles(resampled), BOOTSTRAP


def _sums_of_cell(per_prompt: pd.DataFrame, gamma: int) -> Sums:
    def at(name: str) -> np.ndarray:
        return per_prompt[[f"{name}_{i}" for i in range(1, gamma + 1)]].to_numpy()

    return Sums(per_prompt[_SUMS].to_numpy(), at("at_risk"), at("succeeded"))


def _estimates(per_prompt: pd.DataFrame, gamma: int, resamples: int, seed: int) -> dict[str, float | str]:
    prompts = len(per_prompt)
    sums = _sums_of_cell(per_prompt, gamma)
    total = sums.weighted(np.ones((1, prompts)))
    values = {name: float(estimate(total)[0]) for name, estimate in ESTIMATES.items()}
    drawn = total
    if prompts >= MIN_PROMPTS:
        categories = per_prompt.index.get_level_values("category")
        drawn = sums.weighted(_draws(_stratum_sizes(categories), resamples, seed))
    alpha_interval = _alpha_interval(values["alpha"], alpha(drawn), prompts)
    tau_interval = _tau_interval(values["tau"], tau(drawn), prompts, gamma)
    return {
        **values,
        "predicted_tau": float(predicted_tau(values["alpha"], gamma)),
        **dict(zip(("alpha_lo", "alpha_hi", "interval"), alpha_interval, strict=True)),
        **dict(zip(("tau_lo", "tau_hi", "tau_interval"), tau_interval, strict=True)),
        **{name: round(total[name][0]) for name in ("tokens", "blocks")},  # sampled and replayed: expected numbers
        "prompts": prompts,
        **{name: total[name][0] for name in TIMES},
        **{f"mean_{name}": total[name][0] / total["blocks"][0] for name in TIMES},
    }


def _platforms(cell_ids: pd.Series, metadata: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    its = [metadata[cell_id] for cell_id in cell_ids]
    return pd.DataFrame({"device_name": [i["device"] for i in its], "dtype": [i["cell"]["dtype"] for i in its]})


def summarise(
    blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per cell, in the order in which the cells appear: keys, platform, estimates, intervals, counts, times.

    `blocks` and `metadata` (cell_id -> metadata) are those of `read_cells`. Columns: KEY_COLUMNS and SUMMARY_COLUMNS:
    device_name (the device, and what its card or processor is called) and dtype; the estimates; 95 % bounds alpha_lo,
    alpha_hi, tau_lo, tau_hi with `interval` (of alpha) and `tau_interval` in {"bootstrap", "one-sided", "none"};
    tokens (kept), blocks, prompts; times in seconds, summed and (mean_...) per block; beta_min, the smallest beta of
    the cell.

    The interval is a percentile bootstrap over prompts, stratified by category if each has at least
    MIN_PROMPTS_PER_STRATUM prompts; "none" below MIN_PROMPTS prompts; `one_sided_share` where the estimate is at
    the end of its range. Draws come from a generator of their own, seeded with `seed`.
    """
    if blocks.empty:
        return pd.DataFrame(columns=[*KEY_COLUMNS, *SUMMARY_COLUMNS])
    per_prompt = prompt_sums(blocks)
    keys = blocks[list(KEY_COLUMNS)].drop_duplicates(ignore_index=True)
    if keys["cell_id"].duplicated().any():
        raise ValueError(f"more than one setting in cell {keys['cell_id'][keys['cell_id'].duplicated()].iloc[0]!r}")
    rows = [
        _estimates(per_prompt.loc[cell_id], gamma, resamples, seed)
        for cell_id, gamma in zip(keys["cell_id"], keys["gamma"], strict=True)
    ]
    smallest = blocks["beta"].map(np.min).groupby(blocks["cell_id"]).min()
    summary = pd.concat([keys, _platforms(keys["cell_id"], metadata), pd.DataFrame(rows)], axis=1)
    summary["beta_min"] = keys["cell_id"].map(smallest)
    return summary[[*KEY_COLUMNS, *SUMMARY_COLUMNS]]
