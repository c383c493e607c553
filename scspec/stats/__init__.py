"""Tables of blocks -> estimates with intervals (docs/method.md); tables of texts -> quality of the target.

    tally.py      blocks -> sums over the blocks of each prompt, once for all that follows
    sums.py       the estimators, functions of sums
    bootstrap.py  draws of prompts, and the sums of many cells under them
    intervals.py  an estimate and its resamples -> bounds, and what kind they are of
    cells.py      estimates of single cells: whole, by position, by category
    joint.py      cells resampled jointly: which may be, and alpha and tau of each under the same draws
    pairs.py      differences between two cells that share their prompts
    seeds.py      cells that differ in their SC seeds only, pooled
    shortest.py   the shortest streams that keep most of the acceptance of floating point
    quality.py    perplexity of a target in SC, and its distance from itself in floating point

Not covered here: replay, the hardware model.
"""

from scspec.stats.bootstrap import MIN_PROMPTS, MIN_PROMPTS_PER_STRATUM
from scspec.stats.cells import (
    CATEGORY_COLUMNS,
    PLATFORM_COLUMNS,
    POSITION_COLUMNS,
    SUMMARY_COLUMNS,
    by_category,
    positions,
    summarise,
    with_platforms,
)
from scspec.stats.intervals import BOOTSTRAP, INTERVAL_LEVEL, NO_INTERVAL, ONE_SIDED, UNANIMOUS, one_sided_share
from scspec.stats.pairs import DIFFERENCE_COLUMNS, paired_differences
from scspec.stats.quality import QUALITY_COLUMNS, summarise_quality
from scspec.stats.seeds import POOLED_COLUMNS, pool_seeds
from scspec.stats.shortest import KEPT_SHARE, shortest_streams
from scspec.stats.sums import (
    ESTIMATES,
    TIMES,
    Sums,
    acceptance_rate,
    alpha,
    alpha_evaluated,
    position_alphas,
    predicted_tau,
    survival,
    tau,
    tokens_per_s,
)
from scspec.stats.tally import Tally

__all__ = [
    "BOOTSTRAP",
    "CATEGORY_COLUMNS",
    "DIFFERENCE_COLUMNS",
    "ESTIMATES",
    "INTERVAL_LEVEL",
    "KEPT_SHARE",
    "MIN_PROMPTS",
    "MIN_PROMPTS_PER_STRATUM",
    "NO_INTERVAL",
    "ONE_SIDED",
    "PLATFORM_COLUMNS",
    "POOLED_COLUMNS",
    "POSITION_COLUMNS",
    "QUALITY_COLUMNS",
    "SUMMARY_COLUMNS",
    "TIMES",
    "UNANIMOUS",
    "Sums",
    "Tally",
    "acceptance_rate",
    "alpha",
    "alpha_evaluated",
    "by_category",
    "one_sided_share",
    "paired_differences",
    "pool_seeds",
    "position_alphas",
    "positions",
    "predicted_tau",
    "shortest_streams",
    "summarise",
    "summarise_quality",
    "survival",
    "tau",
    "tokens_per_s",
    "with_platforms",
]
