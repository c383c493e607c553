"""Cells and a plan -> offline HTML: an index, a page per pair, a page per cell, and the table as CSV and Parquet.

    run.py         reads and estimates the cells, once for all pages
    index.py       the first page
    pair.py        the page of a pair
    cell.py        the page of a cell; transcript.py its text
    headline.py    the best modelled speedup; the shortest streams
    verdicts.py    whether a run can be believed
    state.py       what has failed or is missing
    tables.py      tables of text
    provenance.py  where the numbers come from
    render.py      pages -> HTML

Pages with charts hold their own JavaScript, forbid themselves every request, and so open from a file share.
Text from prompts, models and files reaches them escaped: in HTML by the templates, in JSON with < > & as \\u escapes.
Cells of different platforms (device, dtype, backend) share no chart, table or verdict.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scspec.report.cell import cell_page, prompt_totals
from scspec.report.headline import all_shortest_texts
from scspec.report.index import index_page
from scspec.report.pair import pair_page
from scspec.report.render import unvalidated_charts, write_page
from scspec.report.run import Run, read_run
from scspec.results import atomic_file


def build_report(cell_paths: Iterable[Path | str], plan: dict[str, Any], out_path: Path | str) -> pd.DataFrame:
    """Writes the report of the cells that exist; returns the summary, a row per cell.

    `out_path` is the index; beside it lie the table, `pairs/PAIR.html` and `cells/CELL_ID.html`. `plan` has "cells"
    (at least "pair", "arm" and "path" each; those whose path does not exist are listed, as failed with the last line
    of their "log" if it has any) and "invalid" (at least "pair" and "reason" each, the rest as columns). Raises
    ValueError naming the file for a cell that cannot be read or was made with other settings than planned, or the
    block that violates a counter identity.
    """
    run, out_path = read_run(cell_paths, plan), Path(out_path)
    shortest = all_shortest_texts(run)
    with unvalidated_charts():
        for pair in run.summary["pair"].unique():
            page = pair_page(run, pair, out_path.stem, shortest)
            write_page(out_path.parent / "pairs" / f"{pair}.html", "pair.html.j2", page)
    _write_cells(run, out_path.parent)
    write_table(run.summary, out_path.with_suffix(""))
    write_page(out_path, "index.html.j2", index_page(run, out_path.stem, shortest))
    return run.summary


def report_plan(plan_path: Path, out_path: Path) -> None:
    """Writes the report of the cells of a plan's file (`cells.plan`) that have been run; see `build_report`.

    Raises ValueError naming the file if it is no plan or none of its cells has been run, FileNotFoundError without it.
    """
    if not plan_path.exists():
        raise FileNotFoundError(f"{plan_path}: no such file; snakemake writes it: results/plan.json")
    try:
        plan = json.loads(plan_path.read_text(encoding="utf-8"))
        paths = [Path(cell["path"]) for cell in plan["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        again = "again: snakemake --cores 1 results/plan.json"
        raise ValueError(f"{plan_path}: no plan of a run ({type(error).__name__}: {error}); {again}") from None
    done = [path for path in paths if path.exists()]
    if not done:
        raise ValueError(f"{plan_path}: none of its {len(paths)} cells has been run yet; run: snakemake --cores all")
    build_report(done, plan, out_path)


def _write_cells(run: Run, folder: Path) -> None:
    blocks = dict(iter(run.blocks.groupby("cell_id", sort=False)))
    prompts = prompt_totals(run.tally)
    for _, cell in run.summary.iterrows():
        cell_id = cell["cell_id"]
        root = "../" * (1 + cell_id.count("/"))
        page = cell_page(cell, blocks[cell_id], prompts[cell_id], run.metadata[cell_id], root)
        write_page(folder / "cells" / f"{cell_id}.html", "cell.html.j2", page)


def write_table(summary: pd.DataFrame, out_stem: Path | str) -> None:
    """Writes the summary as `out_stem`.csv and `out_stem`.parquet, one row per cell."""
    with atomic_file(f"{out_stem}.csv") as file:
        summary.to_csv(file, index=False)
    with atomic_file(f"{out_stem}.parquet") as file:
        pq.write_table(pa.Table.from_pandas(summary, preserve_index=False), file, compression="zstd")
