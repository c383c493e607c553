"""What a report is of: a plan, and those of its cells that exist, read and estimated once for all pages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scspec.hardware import modelled
from scspec.results import CONTINUATIONS, QUALITY_KEYS, QUALITY_SCHEMA, check_identities, read_cells, read_rows
from scspec.stats import PLATFORM_COLUMNS, Tally, summarise, summarise_quality

_QUALITY_COLUMNS = {  # of the summary -> of a target's quality
    **{name: name for name in ("perplexity", "float_perplexity", "quality_loss", "quality_loss_lo", "quality_loss_hi")},
    **{"target_tv": "tv", "target_kl": "kl"},
}


@dataclass(frozen=True)
class Run:
    """`plan` as in `build_report`; `blocks` and `metadata` (cell_id -> metadata) as `read_cells` gives them; `tally` of
    the blocks.

    quality: {path: a row per source of text} (`stats.summarise_quality`) of the quality files that exist.
    summary: a row per cell (`stats.summarise`) with the hardware model, its target's quality, and `computed_on`: the
    platform in words and, if the cells have several, its prompt file.
    """

    plan: dict[str, Any]
    blocks: pd.DataFrame
    tally: Tally
    metadata: dict[str, dict[str, Any]]
    quality: dict[str, pd.DataFrame]
    summary: pd.DataFrame

    def tally_of(self, cells: pd.DataFrame) -> Tally:
        """The tally of some rows of the summary."""
        return self.tally.only(cells["cell_id"])


def read_run(cell_paths: Iterable[Path | str], plan: dict[str, Any]) -> Run:
    """Reads and estimates the cells that exist. Raises as `build_report` does."""
    blocks, metadata = read_cells(path for path in map(Path, cell_paths) if path.exists())
    _check_settings(metadata, plan)
    check_identities(blocks)
    quality, tally = _read_quality(plan), Tally.of(blocks)
    summary = _with_quality(modelled(summarise(tally, metadata), metadata), quality, plan)
    return Run(plan, blocks, tally, metadata, quality, summary.assign(computed_on=_computed_on(summary, metadata)))


def comparable(summary: pd.DataFrame, *names: str) -> Iterator[tuple[tuple[Any, ...], str, pd.DataFrame]]:
    """Yields (values of the columns, `computed_on`, cells): cells that may stand in one chart, table or verdict."""
    for values, cells in summary.groupby([*names, "computed_on"], sort=True):
        yield values[: len(names)], values[-1], cells


def platforms(summary: pd.DataFrame) -> dict[str, int]:
    """What the cells were computed on -> how many of them."""
    counts = summary.groupby(list(PLATFORM_COLUMNS), sort=True).size()
    return {_platform_text(*names): int(count) for names, count in counts.items()}


def _platform_text(device_name: str, dtype: str, backend: str) -> str:
    return f"{device_name}, {dtype}, backend {backend}"


def _computed_on(summary: pd.DataFrame, metadata: dict[str, dict[str, Any]]) -> list[str]:
    texts = [_platform_text(*names) for names in summary[list(PLATFORM_COLUMNS)].itertuples(index=False)]
    prompts = [metadata[cell_id]["prompts"] for cell_id in summary["cell_id"]]
    files = [f"prompts {its['file']} (sha256 {its['sha256'][:8]})" for its in prompts]
    if len(set(files)) < 2:
        return texts
    return [f"{text}, {file}" for text, file in zip(texts, files, strict=True)]


def _read_quality(plan: dict[str, Any]) -> dict[str, pd.DataFrame]:
    planned = dict.fromkeys(cell.get("quality") for cell in plan["cells"])
    paths = [path for path in planned if path and Path(path).exists()]
    return {path: summarise_quality(read_rows(path, QUALITY_SCHEMA, QUALITY_KEYS)[0]) for path in paths}


def _with_quality(summary: pd.DataFrame, quality: dict[str, pd.DataFrame], plan: dict[str, Any]) -> pd.DataFrame:
    """Return a summary with its targets' quality on the continuations of the prompts, NaN where it is not known.

    A target in floating point is what the others are measured against: its quality_loss is 0.
    """
    planned = {cell.get("id"): cell.get("quality") for cell in plan["cells"]}
    rows = [quality.get(planned.get(cell_id, "")) for cell_id in summary["cell_id"]]
    found = [None if its is None else its[its["source"] == CONTINUATIONS].iloc[0] for its in rows]
    columns = {
        name: [float("nan") if row is None else float(row[source]) for row in found]
        for name, source in _QUALITY_COLUMNS.items()
    }
    summary = summary.assign(**columns)
    summary.loc[summary["target_stoc_len"].isna(), "quality_loss"] = 0.0
    return summary


def _check_settings(metadata: dict[str, dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise ValueError for a cell whose file was made with other settings than the plan's.

    Snakemake sees that itself, unless it was killed while the cell ran: then it has no record of the cell.
    """
    for planned in plan["cells"]:
        made = metadata.get(planned.get("id"), {}).get("cell", planned)
        if other := [name for name in made if made[name] != planned[name]]:
            path = planned["path"]
            raise ValueError(
                f"{path}: made with other settings than planned ({', '.join(other)}); again: snakemake -R {path}"
            )
