"""Tables of blocks -> estimates with intervals (DESIGN section 4).

Every estimate is a function of sums over prompts, so a bootstrap over prompts is one matrix product of
(how often each prompt was drawn) and (its sums), for many cells at once. Cells with as many prompts in as many strata
share their draws, so what compares or pools cells that share prompts resamples them jointly. Such cells must be of
one platform (PLATFORM_COLUMNS), since logits of different platforms may differ in the last bit, and SC turns that into
other tokens. Not covered here: quality of the target, replay, the hardware model.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from scspec.results import KEY_COLUMNS, padded

INTERVAL_LEVEL = 0.95
MIN_PROMPTS = 8  # below, no interval: a handful of prompts does not show how prompts vary
MIN_PROMPTS_PER_STRATUM = 10

PLATFORM_COLUMNS = ("device_name", "dtype", "backend")  # what a cell was computed on and in

BOOTSTRAP, ONE_SIDED, UNANIMOUS, NO_INTERVAL = "bootstrap", "one-sided", "unanimous", "none"

TIMES = ("draft_time_s", "verify_time_s")
_RESAMPLED = ("beta_sum", "beta_count")  # what intervals need, beside the sums of each position
_SUMS = [
    *(*_RESAMPLED, "evaluated_sum", "evaluated_count"),
    *("accepted", "proposed", "blocks", "tokens", *TIMES),
]
_CHUNK_VALUES = 2**23  # resampled sums held at once: 64 MiB, and about three times that in the steps to tau


@dataclass(frozen=True)
class Sums:
    """Sums over blocks: a leading axis of quantities, then any axes: cells, and prompts or resamples.

    columns: (len(_SUMS), ...), of resampled sums (len(_RESAMPLED), ...); at_risk, succeeded: (gamma, ...), blocks that
    emitted at least i tokens, and those of them that accepted at least i proposals, i = 1..gamma.
    """

    columns: np.ndarray
    at_risk: np.ndarray
    succeeded: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[_SUMS.index(name)]

    def total(self) -> "Sums":
        """Sums over the last axis, the prompts."""
        return Sums(self.columns.sum(axis=-1), self.at_risk.sum(axis=-1), self.succeeded.sum(axis=-1))

    def resampled(self, draws: np.ndarray) -> "Sums":
        """Sums with prompt n counted draws[r, n] times: the last axis becomes that of the resamples r."""
        parts = (self.columns[: len(_RESAMPLED)], self.at_risk, self.succeeded)
        return Sums(*(np.tensordot(part, draws, axes=(-1, -1)) for part in parts))


def alpha(sums: Sums) -> np.ndarray:
    """Mean beta over every emitted position, the bonus position included; estimates one number, whatever gamma is."""
    return sums["beta_sum"] / sums["beta_count"]


def alpha_evaluated(sums: Sums) -> np.ndarray:
    """Mean beta without the bonus positions (in-block index <= gamma): depends on gamma, shown second."""
    return sums["evaluated_sum"] / sums["evaluated_count"]


def position_alphas(sums: Sums) -> np.ndarray:
    """alpha_i, (gamma, ...): of the blocks that emitted at least i tokens, the share that accepted at least i.

    A block that EOS cut before i says nothing about i and is not at risk there. NaN where no block is at risk.
    """
    unknown = np.full(sums.at_risk.shape, np.nan)
    return np.divide(sums.succeeded, sums.at_risk, out=unknown, where=sums.at_risk > 0)


def survival(sums: Sums) -> np.ndarray:
    """P(accepted >= i), (gamma, ...): prod_{j<=i} alpha_j. 0 behind an i at which acceptance died out; else NaN behind
    one where no block is at risk."""
    alphas = position_alphas(sums)
    died_out = np.logical_or.accumulate(alphas == 0, axis=0)
    return np.cumprod(np.where(died_out & np.isnan(alphas), 0.0, alphas), axis=0)


def tau(sums: Sums) -> np.ndarray:
    """Block efficiency: emitted tokens per target pass, 1 + sum_i P(accepted >= i) (DESIGN 4)."""
    return 1 + survival(sums).sum(axis=0)


def predicted_tau(alpha: np.ndarray | float, gamma: int) -> np.ndarray:
    """(1 - alpha**(gamma + 1)) / (1 - alpha), gamma + 1 at alpha 1: tau if agreement were independent between
    positions. Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1."""
    return np.sum(np.asarray(alpha)[..., None] ** np.arange(gamma + 1), axis=-1)


def acceptance_rate(sums: Sums) -> np.ndarray:
    """Accepted / proposed proposals: falls with gamma by construction, never to be compared across gamma."""
    return sums["accepted"] / sums["proposed"]


def tokens_per_s(sums: Sums) -> np.ndarray:
    """Kept tokens per second of draft and verify wall time (the simulator's speed); NaN where times are 0 or null."""
    time_s = sums["draft_time_s"] + sums["verify_time_s"]
    return np.divide(sums["tokens"], time_s, out=np.full(time_s.shape, np.nan), where=time_s > 0)


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
    """Sums per (cell_id, category, prompt_id), the turns of a prompt together, in that order of the index.

    Times are NaN where no block of the prompt has one, as in replayed cells."""
    keys = ["cell_id", "category", "prompt_id"]
    per_block = pd.concat([blocks[keys].reset_index(drop=True), _block_sums(blocks)], axis=1)
    return per_block.groupby(keys, sort=True, observed=True).sum(min_count=1)


@lru_cache(maxsize=4)
def _draws(stratum_sizes: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, (resamples, prompts): n of n with replacement within each stratum.

    The same for every cell with these sizes, so cells that share their prompts are resampled alike.
    """
    generator = np.random.default_rng(seed)
    strata = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in stratum_sizes]
    return np.concatenate(strata, axis=1).astype(np.float64)


def _stratum_sizes(categories: np.ndarray) -> tuple[int, ...]:
    """Prompts per category in the sorted order of the rows, if each has enough; else one stratum of all."""
    sizes = np.unique(categories, return_counts=True)[1]
    return tuple(sizes.tolist()) if sizes.min() >= MIN_PROMPTS_PER_STRATUM else (len(categories),)


@dataclass(frozen=True)
class _Chunk:
    """Some cells (or parts of cells) with one gamma and the same strata: their sums, per prompt and resampled.

    units: their labels in the index; sums: (..., C units, N prompts); drawn: (..., C, R resamples), R = 1 and nothing
    drawn below MIN_PROMPTS.
    """

    units: list
    gamma: int
    prompts: int
    sums: Sums
    drawn: Sums


def _bootstrap(
    per_prompt: pd.DataFrame, gammas: Mapping[str, int], resamples: int, seed: int, by: Sequence[str] = ("cell_id",)
) -> Iterator[_Chunk]:
    """Yields the units of `prompt_sums` in chunks; `by` ("cell_id", or that and "category") is what a unit is."""
    sizes = per_prompt.groupby(level=list(by), observed=True).size()
    ends = sizes.cumsum().to_numpy()
    categories = per_prompt.index.get_level_values("category").factorize(sort=True)[0]
    alike = defaultdict(list)
    for unit, start, end in zip(sizes.index, ends - sizes.to_numpy(), ends, strict=True):
        gamma = gammas[unit if len(by) == 1 else unit[0]]
        alike[gamma, _stratum_sizes(categories[start:end])].append((unit, start))
    values = np.ascontiguousarray(per_prompt.to_numpy().T)
    for (gamma, strata), units in alike.items():
        prompts = sum(strata)
        draws = _draws(strata, resamples, seed) if prompts >= MIN_PROMPTS else np.ones((1, prompts))
        at_once = max(1, _CHUNK_VALUES // (len(draws) * (len(_RESAMPLED) + 2 * gamma)))
        for first in range(0, len(units), at_once):
            labels, starts = zip(*units[first : first + at_once], strict=True)
            sums = _sums(per_prompt.columns, values[:, np.array(starts)[:, None] + np.arange(prompts)], gamma)
            yield _Chunk(list(labels), gamma, prompts, sums, sums.resampled(draws))


def _sums(names: pd.Index, values: np.ndarray, gamma: int) -> Sums:
    """`Sums` of the columns of `prompt_sums`, which lie along the first axis."""
    at = {name: [names.get_loc(f"{name}_{i}") for i in range(1, gamma + 1)] for name in ("at_risk", "succeeded")}
    return Sums(values[: len(_SUMS)], **{name: values[rows] for name, rows in at.items()})


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


def _share_interval(
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
    return *_percentiles(resampled), BOOTSTRAP


def _mixed_tau(share: float, tau: float, other_tau: float) -> float:
    """tau where a share of the tokens comes at `tau` tokens a pass and the rest at `other_tau`."""
    return 1 / (share / tau + (1 - share) / other_tau)


def _tau_interval(estimate: float, resampled: np.ndarray, prompts: int, gamma: int) -> tuple[float, float, str]:
    if prompts < MIN_PROMPTS or np.isnan(estimate):
        return np.nan, np.nan, NO_INTERVAL
    share = one_sided_share(prompts)
    if estimate == gamma + 1:
        return _mixed_tau(share, gamma + 1, 1), estimate, ONE_SIDED
    if estimate == 1:
        return 1.0, _mixed_tau(share, 1, gamma + 1), ONE_SIDED
    return *_percentiles(resampled), BOOTSTRAP


_INTERVAL_COLUMNS = ("alpha_lo", "alpha_hi", "interval", "tau_lo", "tau_hi", "tau_interval")


def _intervals(chunk: _Chunk) -> pd.DataFrame:
    """_INTERVAL_COLUMNS, a row per unit."""
    total = chunk.sums.total()
    alphas, taus = zip(alpha(total), alpha(chunk.drawn), strict=True), zip(tau(total), tau(chunk.drawn), strict=True)
    rows = [
        (*_share_interval(*its_alpha, chunk.prompts), *_tau_interval(*its_tau, chunk.prompts, chunk.gamma))
        for its_alpha, its_tau in zip(alphas, taus, strict=True)
    ]
    return pd.DataFrame(rows, columns=_INTERVAL_COLUMNS)


def _estimates(chunk: _Chunk) -> pd.DataFrame:
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


def _keys(blocks: pd.DataFrame) -> pd.DataFrame:
    """KEY_COLUMNS, a row per cell in the order in which the cells appear. Raises ValueError at two settings in one."""
    keys = blocks[list(KEY_COLUMNS)].drop_duplicates(ignore_index=True)
    if keys["cell_id"].duplicated().any():
        raise ValueError(f"more than one setting in cell {keys['cell_id'][keys['cell_id'].duplicated()].iloc[0]!r}")
    return keys


def _gammas(keys: pd.DataFrame) -> dict[str, int]:
    return dict(zip(keys["cell_id"], keys["gamma"], strict=True))


def with_platforms(blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """KEY_COLUMNS, device_name and dtype, a row per cell in the order in which the cells appear."""
    keys = _keys(blocks)
    its = [metadata[cell_id] for cell_id in keys["cell_id"]]
    return keys.assign(device_name=[i["device"] for i in its], dtype=[i["cell"]["dtype"] for i in its])


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
    keys = with_platforms(blocks, metadata)
    chunks = _bootstrap(prompt_sums(blocks), _gammas(keys), resamples, seed)
    estimates = pd.concat([_estimates(chunk) for chunk in chunks]).loc[keys["cell_id"]].reset_index(drop=True)
    summary = pd.concat([keys, estimates], axis=1)
    smallest = pd.Series(padded(blocks["beta"], np.inf).min(axis=1)).groupby(blocks["cell_id"].to_numpy()).min()
    summary["beta_min"] = keys["cell_id"].map(smallest)
    return summary[[*KEY_COLUMNS, *SUMMARY_COLUMNS]]


POSITION_COLUMNS = (
    *("cell_id", "i", "p_accepted", "p_accepted_lo", "p_accepted_hi", "p_accepted_interval"),
    *("alpha_i", "alpha_i_lo", "alpha_i_hi", "alpha_i_interval", "at_risk", "prompts"),
)


def positions(blocks: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per (cell_id, i), i = 1..gamma: POSITION_COLUMNS, cells and positions in ascending order.

    p_accepted is P(accepted >= i) (`survival`), whose sum over i is tau - 1; alpha_i is that of `position_alphas`, NaN
    where no block is at risk. 95 % bounds _lo, _hi and their kind _interval follow the rules and the draws of
    `summarise`; those of alpha_i count the prompts that have a block at risk at i, which are `prompts`. at_risk: such
    blocks, of sampled and replayed cells their expected number. Raises ValueError if a cell has two settings.
    """
    if blocks.empty:
        return pd.DataFrame(columns=POSITION_COLUMNS)
    chunks = _bootstrap(prompt_sums(blocks), _gammas(_keys(blocks)), resamples, seed)
    rows = [row for chunk in chunks for row in _position_rows(chunk)]
    return pd.DataFrame(rows, columns=POSITION_COLUMNS).sort_values(["cell_id", "i"], ignore_index=True)


def _position_rows(chunk: _Chunk) -> Iterator[tuple]:
    total = chunk.sums.total()
    reached, alphas = survival(total), position_alphas(total)
    drawn_reached, drawn_alphas = survival(chunk.drawn), position_alphas(chunk.drawn)
    prompts = (chunk.sums.at_risk > 0).sum(axis=-1)
    passes = chunk.gamma + 1  # blocks of a prompt that accepts nothing, for one of a prompt that accepts everything
    for c, unit in enumerate(chunk.units):
        for i in range(chunk.gamma):
            its_reached = _share_interval(reached[i, c], drawn_reached[i, c], chunk.prompts, passes)
            its_alpha = _share_interval(alphas[i, c], drawn_alphas[i, c], prompts[i, c], passes / (i + 1))
            counts = total.at_risk[i, c], prompts[i, c]
            yield unit, i + 1, reached[i, c], *its_reached, alphas[i, c], *its_alpha, *counts


CATEGORY_COLUMNS = ("cell_id", "category", "alpha", "tau", *_INTERVAL_COLUMNS, "tokens", "blocks", "prompts")


def by_category(blocks: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per (cell_id, category), in ascending order: CATEGORY_COLUMNS, as in `summarise` for the whole cell.

    Raises ValueError if a cell has two settings.
    """
    if blocks.empty:
        return pd.DataFrame(columns=CATEGORY_COLUMNS)
    chunks = _bootstrap(prompt_sums(blocks), _gammas(_keys(blocks)), resamples, seed, by=("cell_id", "category"))
    table = pd.concat([_estimates(chunk) for chunk in chunks])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["cell_id", "category"])
    return table.sort_index().reset_index()[list(CATEGORY_COLUMNS)]


@dataclass(frozen=True)
class _Resampled:
    """alpha and tau of one cell, and of its resamples, (R,): the same draws of prompts in every cell with these."""

    gamma: int
    prompts: int
    alpha: float
    alphas: np.ndarray
    tau: float
    taus: np.ndarray


def _resampled(blocks: pd.DataFrame, resamples: int, seed: int) -> dict[str, _Resampled]:
    cells = {}
    for chunk in _bootstrap(prompt_sums(blocks), _gammas(_keys(blocks)), resamples, seed):
        total = chunk.sums.total()
        columns = alpha(total), alpha(chunk.drawn), tau(total), tau(chunk.drawn)
        for unit, *its in zip(chunk.units, *columns, strict=True):
            cells[unit] = _Resampled(chunk.gamma, chunk.prompts, *its)
    return cells


def _check_alike(cell_ids: Sequence[str], facts: Mapping[str, dict[str, Any]]) -> None:
    """Raises ValueError naming two cells that differ in what must be the same in cells that are paired or pooled."""
    first, *others = cell_ids
    for other, (name, value) in product(others, facts[first].items()):
        if facts[other][name] != value:
            how = f"{value} and {facts[other][name]}"
            if name == "prompts":
                _, alone = min(value ^ facts[other][name])
                how = f"{len(value)} and {len(facts[other][name])}, {alone!r} in one of them alone"
            raise ValueError(f"cells {first!r} and {other!r} must have the same {name} to be compared, not {how}")


def _facts(blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """cell_id -> what must be the same in cells that are paired: platform, way of decoding, prompts."""
    cells = with_platforms(blocks, metadata)
    prompts = blocks[["cell_id", "category", "prompt_id"]].drop_duplicates().groupby("cell_id")
    prompts = {cell_id: set(zip(its["category"], its["prompt_id"], strict=True)) for cell_id, its in prompts}
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


DIFFERENCE_COLUMNS = (
    *("cell_id_a", "cell_id_b", "prompts"),
    *(f"{name}{end}" for name in ("alpha", "tau") for end in ("_a", "_b", "_diff", "_diff_lo", "_diff_hi")),
    *("interval", "tau_interval"),
)


def paired_differences(
    blocks: pd.DataFrame,
    metadata: Mapping[str, dict[str, Any]],
    pairs: Iterable[tuple[str, str]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per pair of cell ids (a, b), in their order: DIFFERENCE_COLUMNS; _diff is b's estimate minus a's.

    `blocks` and `metadata` are those of `read_cells`. Each resample draws the same prompts for both cells, so what
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
    known = set(blocks["cell_id"])
    if unknown := sorted({cell_id for pair in pairs for cell_id in pair} - known):
        raise ValueError(f"pairs: no blocks of cell {unknown[0]!r}; allowed: the cell ids of `blocks`")
    if not pairs:
        return pd.DataFrame(columns=DIFFERENCE_COLUMNS)
    blocks = blocks[blocks["cell_id"].isin({cell_id for pair in pairs for cell_id in pair})]
    facts = _facts(blocks, metadata)
    for pair in pairs:
        _check_alike(pair, facts)
    cells = _resampled(blocks, resamples, seed)
    return pd.DataFrame([_difference_row(*pair, cells) for pair in pairs], columns=DIFFERENCE_COLUMNS)


def _difference_row(cell_id_a: str, cell_id_b: str, cells: Mapping[str, _Resampled]) -> tuple:
    a, b = cells[cell_id_a], cells[cell_id_b]
    share = one_sided_share(a.prompts)
    worst = share * (b.alpha - a.alpha)
    alpha_low, alpha_high, interval = _difference_interval(
        b.alphas - a.alphas, a.prompts, (worst - (1 - share), worst + (1 - share))
    )
    least = _mixed_tau(share, b.tau, 1) - _mixed_tau(share, a.tau, a.gamma + 1)
    most = _mixed_tau(share, b.tau, b.gamma + 1) - _mixed_tau(share, a.tau, 1)
    tau_low, tau_high, tau_interval = _difference_interval(b.taus - a.taus, a.prompts, (least, most))
    alphas = a.alpha, b.alpha, b.alpha - a.alpha, alpha_low, alpha_high
    taus = a.tau, b.tau, b.tau - a.tau, tau_low, tau_high
    return cell_id_a, cell_id_b, a.prompts, *alphas, *taus, interval, tau_interval


# Rounding of a ratio of float64 sums over prompts, relative: at most 2**-53 a summand, here of up to 1000 prompts.
_ROUNDING = 1e-12


def _difference_interval(
    resampled: np.ndarray, prompts: int, unanimous: tuple[float, float]
) -> tuple[float, float, str]:
    if prompts < MIN_PROMPTS or np.isnan(unanimous).any():
        return np.nan, np.nan, NO_INTERVAL
    if np.nanmax(resampled) - np.nanmin(resampled) < _ROUNDING:
        return *unanimous, UNANIMOUS
    return *_percentiles(resampled), BOOTSTRAP


_SEEDS = ("sc_seed", "target_sc_seed", "draft_sc_seed")
_POOL_KEYS = (*(name for name in KEY_COLUMNS if name not in ("cell_id", *_SEEDS)), "device_name", "dtype")
POOLED_COLUMNS = (
    *(*_POOL_KEYS, "alpha", "tau", *_INTERVAL_COLUMNS, "alpha_seed_sd", "tau_seed_sd"),
    *("seeds", "prompts", "cell_ids"),
)


def pool_seeds(
    blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per setting, over cells that differ in their SC seeds only: POOLED_COLUMNS, in order of appearance.

    `blocks` and `metadata` are those of `read_cells`. alpha and tau are means over the seeds of the cells' estimates;
    alpha_seed_sd and tau_seed_sd the standard deviation between seeds (n - 1; NaN of one seed), which holds what seeds
    do to single prompts; seeds, prompts: how many; cell_ids: a tuple. Where a side's seed is the other's plus an
    offset, as in the arm `reseed`, only cells of one offset are pooled.

    Intervals resample prompts and seeds, independently of each other, a (seed, prompt) counted as the product of the
    two draws: the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1:386), whose variance is too large
    rather than too small in what is of a seed and a prompt together. Of S seeds S - 1 are drawn, with replacement, for
    otherwise the share of the seeds is (S - 1) / S too small (McCarthy & Snowden 1985, Vital and Health Statistics
    2(95)). Where few seeds differ by more than prompts do it is still too narrow, as percentiles never leave the range
    of the seeds seen: simulated with normal effects, 48 prompts that differ by 0.2 and three seeds, intervals cover
    97 % where seeds do not differ, 96 % where they differ by 0.03, 93 % at 0.06, 89 % at 0.1. With one seed
    (`seeds` = 1) the interval is over prompts alone: it is that of `summarise`, and says nothing of other seeds.
    Kinds as there.

    Raises ValueError naming the cells if those of one setting have different prompts, sampling settings or token
    budgets, or the same seeds.
    """
    if blocks.empty:
        return pd.DataFrame(columns=POOLED_COLUMNS)
    settings, facts, cells = _settings(blocks, metadata), _facts(blocks, metadata), _resampled(blocks, resamples, seed)
    repeated = settings["cell_id"][settings.duplicated(["setting", *_SEEDS])]
    if len(repeated):
        raise ValueError(f"cell {repeated.iloc[0]!r} has the setting and the seeds of another; pool one of them")
    pools = defaultdict(list)
    for cell in settings.to_dict("records"):
        pools[cell["setting"]].append(cell)
    rows = []
    for pool in pools.values():
        cell_ids = tuple(cell["cell_id"] for cell in pool)
        _check_alike(cell_ids, facts)
        keys = {name: pool[0][name] for name in _POOL_KEYS}
        rows.append({**keys, **_pooled([cells[cell_id] for cell_id in cell_ids], seed), "cell_ids": cell_ids})
    return pd.DataFrame(rows, columns=POOLED_COLUMNS).astype({name: settings[name].dtype for name in _POOL_KEYS})


def _settings(blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """The keys and platform of each cell; `setting` numbers what is the same without the seeds."""
    cells = with_platforms(blocks, metadata)
    for name in ("target_settings", "draft_settings"):
        knobs = cells[name].map(json.loads)
        cells[name] = [json.dumps({k: v for k, v in its.items() if k != "sc_seed"}, sort_keys=True) for its in knobs]
    cells["offset"] = cells["draft_sc_seed"] - cells["target_sc_seed"]
    cells["setting"] = cells.groupby([*_POOL_KEYS, "offset"], dropna=False).ngroup()
    return cells


def _pooled(cells: Sequence[_Resampled], seed: int) -> dict[str, Any]:
    """alpha and tau over the seeds of a setting, a cell for each."""
    drawn = _seed_draws(len(cells), len(cells[0].alphas), seed)
    alphas, taus = (np.array([getattr(cell, name) for cell in cells]) for name in ("alpha", "tau"))
    drawn_alphas = (drawn * [cell.alphas for cell in cells]).sum(axis=0)
    drawn_taus = (drawn * [cell.taus for cell in cells]).sum(axis=0)
    prompts, gamma = cells[0].prompts, cells[0].gamma
    intervals = (
        *_share_interval(alphas.mean(), drawn_alphas, prompts),
        *_tau_interval(taus.mean(), drawn_taus, prompts, gamma),
    )
    spread = [np.std(values, ddof=1) if len(cells) > 1 else np.nan for values in (alphas, taus)]
    return {
        **{"alpha": alphas.mean(), "tau": taus.mean()},
        **dict(zip(_INTERVAL_COLUMNS, intervals, strict=True)),
        **dict(zip(("alpha_seed_sd", "tau_seed_sd"), spread, strict=True)),
        **{"seeds": len(cells), "prompts": prompts},
    }


def _seed_draws(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """The weight of each seed, (seeds, resamples), summing to 1: of S seeds S - 1 are drawn with replacement."""
    if seeds == 1:
        return np.ones((1, resamples))
    generator = np.random.default_rng([seed, 1])  # not the stream of the prompts' draws
    return generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples).T / (seeds - 1)
