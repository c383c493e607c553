"""Draws of prompts, and the sums of many cells under them.

Every estimate is a function of sums over prompts, so a bootstrap over prompts is one matrix product of
(how often each prompt was drawn) and (its sums), for many cells at once. Cells with as many prompts in as many strata
share their draws, so what compares or pools cells that share prompts resamples them jointly.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from scspec.stats.sums import RESAMPLED, Sums, sums_of
from scspec.stats.tally import Tally

MIN_PROMPTS = 8  # below, no interval: a handful of prompts does not show how prompts vary
MIN_PROMPTS_PER_STRATUM = 10

_CHUNK_VALUES = 2**23  # resampled sums held at once: 64 MiB, and about three times that in the steps to tau


@lru_cache(maxsize=4)
def bootstrap_draws(stratum_sizes: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, (resamples, prompts): n of n with replacement within each stratum.

    The same for every cell with these sizes, so cells that share their prompts are resampled alike.
    """
    generator = np.random.default_rng(seed)
    strata = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in stratum_sizes]
    return np.concatenate(strata, axis=1).astype(np.float64)


def stratum_sizes(categories: np.ndarray) -> tuple[int, ...]:
    """Prompts per category in the sorted order of the rows, if each has enough; else one stratum of all."""
    sizes = np.unique(categories, return_counts=True)[1]
    return tuple(sizes.tolist()) if sizes.min() >= MIN_PROMPTS_PER_STRATUM else (len(categories),)


@dataclass(frozen=True)
class Chunk:
    """Some cells (or parts of cells) with one gamma and the same strata: their sums, per prompt and resampled.

    units: their labels in the index; sums: (..., C units, N prompts); drawn: (..., C, R resamples), R = 1 and nothing
    drawn below MIN_PROMPTS.
    """

    units: list[Any]
    gamma: int
    prompts: int
    sums: Sums
    drawn: Sums


def resampled_chunks(tally: Tally, resamples: int, seed: int, by: Sequence[str] = ("cell_id",)) -> Iterator[Chunk]:
    """Yields the units of a tally in chunks; `by` ("cell_id", or that and "category") is what a unit is."""
    per_prompt, gammas = tally.sums, tally.gammas
    sizes = per_prompt.groupby(level=list(by), observed=True).size()
    ends = sizes.cumsum().to_numpy()
    categories = per_prompt.index.get_level_values("category").factorize(sort=True)[0]
    alike = defaultdict(list)
    for unit, start, end in zip(sizes.index, ends - sizes.to_numpy(), ends, strict=True):
        gamma = gammas[unit if len(by) == 1 else unit[0]]
        alike[gamma, stratum_sizes(categories[start:end])].append((unit, start))
    values = np.ascontiguousarray(per_prompt.to_numpy().T)
    for (gamma, strata), units in alike.items():
        prompts = sum(strata)
        draws = bootstrap_draws(strata, resamples, seed) if prompts >= MIN_PROMPTS else np.ones((1, prompts))
        at_once = max(1, _CHUNK_VALUES // (len(draws) * (len(RESAMPLED) + 2 * gamma)))
        for first in range(0, len(units), at_once):
            labels, starts = zip(*units[first : first + at_once], strict=True)
            sums = sums_of(per_prompt.columns, values[:, np.array(starts)[:, None] + np.arange(prompts)], gamma)
            yield Chunk(list(labels), gamma, prompts, sums, sums.resampled(draws))
