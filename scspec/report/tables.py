"""The tables of the report, as text: cells with their estimates, alone and pooled, and the quality of targets."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from scspec.charts import ARM_LABELS, decoding, draft_labels, interval_text, number
from scspec.jobs import AUDIT_ARM, GRID_ARM
from scspec.report.run import Run, comparable
from scspec.stats import NO_INTERVAL, pool_seeds

_TABLE_ORDER = ["rank", "sc_prec", "gamma", "stoc_len", "draft_stoc_len", "sc_seed", "sampling_seed"]


def controls_of(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the control arms."""
    return summary[~summary["arm"].isin([GRID_ARM, AUDIT_ARM])]


def cell_tables(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of text per pair, way of decoding and platform, for the grid and for the controls; "links" lead from a
    pair's page to the page of each row."""
    tables = []
    for arms, cells in (
        ("grid", summary[summary["arm"] == GRID_ARM]),
        ("controls", controls_of(summary)),
    ):
        for (pair, do_sample), platform, group in comparable(cells, "pair", "do_sample"):
            group = group.assign(rank=group["arm"].map(list(ARM_LABELS).index)).sort_values(_TABLE_ORDER)
            first = dict(zip(group["cell_id"], draft_labels(group), strict=True)) if arms == "grid" else None
            rows = [_row(cell, first) for cell in group.itertuples()]
            links = [f"../cells/{cell_id}.html" for cell_id in group["cell_id"]]
            title = f"{pair}, {decoding(do_sample)}: {arms}"
            tables.append({"title": title, "platform": platform, "rows": rows, "links": links})
    return tables


def seed_rows(run: Run, grid: pd.DataFrame) -> list[dict[str, str]]:
    """A row of text per setting that several SC seeds have, pooled; `grid`: comparable cells of the summary."""
    if grid["sc_seed"].nunique() < 2:
        return []
    pooled = pool_seeds(run.tally_of(grid), run.metadata)
    pooled = pooled[pooled["seeds"] > 1]
    return [
        {
            "draft's streams": draft,
            **_setting(pool),
            "seeds": str(pool.seeds),
            "prompts": str(pool.prompts),
            **_estimate(pool, "alpha", pool.interval),
            "alpha, sd of seeds": number(pool.alpha_seed_sd),
            **_estimate(pool, "tau", pool.tau_interval),
            "tau, sd of seeds": number(pool.tau_seed_sd),
        }
        for draft, pool in zip(draft_labels(pooled), pooled.itertuples(), strict=True)
    ]


def quality_rows(quality: dict[str, pd.DataFrame], planned: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """A row of text per target setting and source of text; `planned`: cells of the plan."""
    targets = {cell["quality"]: cell["target"] for cell in planned if cell.get("quality") in quality}
    rows = []
    for path, target in targets.items():
        for source in quality[path].itertuples():
            rows.append(
                {
                    "target": target["model"],
                    **{name: str(target["sc"][f"sc_{name}"]) for name in ("stoc_len", "prec", "seed")},
                    "text": source.source.replace("_", " "),
                    "tokens": f"{source.tokens:,}",
                    **{name: number(getattr(source, name)) for name in ("perplexity", "float_perplexity")},
                    "rise": f"{source.quality_loss:+.2%}",
                    "rise, 95\u00a0%": _rise_interval(source),
                    "TV": number(source.tv),
                    "KL (nats)": number(source.kl),
                }
            )
    return rows


def _rise_interval(source: Any) -> str:
    if source.quality_loss_interval == NO_INTERVAL:
        return NO_INTERVAL
    return f"{source.quality_loss_lo:+.2%} to {source.quality_loss_hi:+.2%}"


def _setting(cell: Any) -> dict[str, str]:
    return {
        "stoc_len target / draft": f"{whole(cell.target_stoc_len, 'float')} / {whole(cell.draft_stoc_len, 'float')}",
        "sc_prec": whole(cell.sc_prec, "float"),
        "gamma": str(cell.gamma),
    }


def _estimate(cell: Any, name: str, kind: str) -> dict[str, str]:
    value, low, high = (getattr(cell, column) for column in (name, f"{name}_lo", f"{name}_hi"))
    interval = NO_INTERVAL if kind == NO_INTERVAL else interval_text(value, low, high, kind)
    return {name: number(value), f"{name}, 95\u00a0%": interval}


def _row(cell: Any, drafts: dict[str, str] | None) -> dict[str, str]:
    seeds = (cell.sampling_seed, cell.target_sc_seed, cell.draft_sc_seed)
    return {
        **({"arm": ARM_LABELS[cell.arm]} if drafts is None else {"draft's streams": drafts[cell.cell_id]}),
        **_setting(cell),
        "seeds": " / ".join(whole(seed, "-") for seed in seeds),
        "prompts": str(cell.prompts),
        **_estimate(cell, "alpha", cell.interval),
        **_estimate(cell, "tau", cell.tau_interval),
        "tau predicted": number(cell.predicted_tau),
        "alpha evaluated": number(cell.alpha_evaluated),
        "acceptance rate": number(cell.acceptance_rate),
        "speedup, rows at once": _known(cell.speedup_at_once, "{:.3f}"),
        "speedup, row after row": _known(cell.speedup_in_turn, "{:.3f}"),
        "energy": _known(cell.energy_ratio, "{:.3f}"),
        "target's perplexity": _known(cell.perplexity, "{:.3f}"),
        "its rise": _known(cell.quality_loss, "{:+.1%}"),
        "tokens": f"{cell.tokens:,}",
        "tokens/s": _known(cell.tokens_per_s, "{:.1f}"),
    }


def whole(value: Any, missing: str) -> str:
    """A whole number as text, or what stands where there is none."""
    return missing if pd.isna(value) else str(value)


def _known(value: float, text: str) -> str:
    return "-" if pd.isna(value) else text.format(value)
