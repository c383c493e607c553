"""Texts scored in SC and in floating point -> perplexity, its loss, total variation and divergence, with intervals.

The table is that of a quality file (`scspec.results.QUALITY_SCHEMA`).
"""

import numpy as np
import pandas as pd

from scspec.stats.bootstrap import MIN_PROMPTS, bootstrap_draws, stratum_sizes
from scspec.stats.intervals import BOOTSTRAP, NO_INTERVAL, ROUNDING, percentiles, share_interval

# name: (the column whose mean per token it is a function of, the function, which rises)
_ESTIMATES = {
    "perplexity": ("nll", np.exp),
    "float_perplexity": ("float_nll", np.exp),
    "quality_loss": ("excess_nll", np.expm1),
    "tv": ("tv", np.positive),
    "kl": ("kl", np.positive),
}
QUALITY_COLUMNS = (
    *("source", "tokens", "units"),
    *(f"{name}{end}" for name in _ESTIMATES for end in ("", "_lo", "_hi", "_interval")),
)


def summarise_quality(rows: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per source (the prompts' continuations, the text file), in order of appearance: QUALITY_COLUMNS.

    `rows` are those of one quality file. perplexity and float_perplexity are exp of the mean negative log-likelihood
    per token, in SC and in floating point; quality_loss is perplexity / float_perplexity - 1; tv (0..1) and kl (nats)
    are means per token. tokens: scored; units: what is resampled, prompts with all their turns (`text_id` is
    "prompt/turn") or windows of the text file. Neighbouring windows of a text are alike more than these intervals
    assume, so they are rather too narrow there.

    _lo and _hi are 95 % percentiles of a bootstrap over units, strata and draws as in `summarise`: one draw gives
    tokens and sums, in SC and in floating point, so what makes a text hard for both cancels in quality_loss.
    _interval is "bootstrap"; "none" (bounds NaN) below MIN_PROMPTS units, where the estimate is not finite, or where
    no resample differs from it; of tv at 0 or 1 "one-sided", by `one_sided_share`. A target that equals its float has
    the loss 0, and kl 0, in every unit and resample: what the texts that were not seen would add to them knows no
    bound, so they have no interval, rather than one of width 0; tv, which cannot exceed 1, is at most
    1 - `one_sided_share`.
    """
    sources = _unit_sums(rows).groupby(level="source", sort=False)
    summaries = [{"source": source, **_summary(sums, resamples, seed)} for source, sums in sources]
    return pd.DataFrame(summaries, columns=QUALITY_COLUMNS)


def _unit_sums(rows: pd.DataFrame) -> pd.DataFrame:
    """Sums over the tokens per (source, category, unit): sources as they appear, in each the others in order."""
    sums = rows[["tokens", "nll", "float_nll", "tv", "kl"]].astype(np.float64)
    sums["excess_nll"] = rows["nll"] - rows["float_nll"]
    unit = rows["text_id"].str.rsplit("/", n=1).str[0].rename("unit")
    order = pd.Categorical(rows["source"], categories=rows["source"].unique())
    keys = [pd.Series(order, index=rows.index, name="source"), rows["category"], unit]
    return sums.groupby(keys, sort=True, observed=True).sum()


def _summary(sums: pd.DataFrame, resamples: int, seed: int) -> dict[str, float | int | str]:
    """QUALITY_COLUMNS of one source but its name."""
    draws = bootstrap_draws(stratum_sizes(sums.index.get_level_values("category").to_numpy()), resamples, seed)
    summary: dict[str, float | int | str] = {"tokens": int(sums["tokens"].sum()), "units": len(sums)}
    drawn_tokens = draws @ sums["tokens"].to_numpy()
    for name, (column, function) in _ESTIMATES.items():
        mean = sums[column].sum() / sums["tokens"].sum()
        with np.errstate(over="ignore", invalid="ignore"):  # a target that is broken may be infinitely surprised
            drawn = draws @ sums[column].to_numpy() / drawn_tokens
            low, high, kind = _interval(name, mean, drawn, len(sums))
            values = (function(mean), function(low), function(high), kind)
        summary |= dict(zip((name, f"{name}_lo", f"{name}_hi", f"{name}_interval"), values, strict=True))
    return summary


def _interval(name: str, mean: float, drawn: np.ndarray, units: int) -> tuple[float, float, str]:
    """The interval of a mean per token as (low, high, kind)."""
    if name == "tv":
        return share_interval(mean, drawn, units)
    if units < MIN_PROMPTS or not np.isfinite(mean) or np.ptp(drawn) <= ROUNDING * abs(mean):
        return np.nan, np.nan, NO_INTERVAL
    return *percentiles(drawn), BOOTSTRAP
