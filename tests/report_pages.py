"""Pages of a report as tests read them."""

import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
from fake_cells import as_blocks, fake_metadata, write_fake_grid

from scspec.provenance import sha256_of
from scspec.report import build_report
from scspec.report.cell import cell_page, prompt_totals
from scspec.report.render import write_page
from scspec.results import QUALITY_KEYS, QUALITY_SCHEMA, write_rows
from scspec.stats import Tally, summarise

SMALL = {"prompts": 8, "max_new_tokens": 12}


class Page(HTMLParser):
    """Text outside scripts and styles, the texts of scripts, and every tag with its attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.scripts, self._texts, self._inside = [], [], [], None
        self.feed(self.source)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self._texts.append(data)

    @property
    def specs(self):
        """chart id -> Vega-Lite specification; none without a chart."""
        return json.loads(self.scripts[0]) if len(self.scripts) > 1 else {}

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@dataclass(frozen=True)
class Report:
    folder: Path
    summary: pd.DataFrame

    @property
    def index(self) -> Page:
        return Page(self.folder / "index.html")

    def pair(self, name: str = "smollm2-shorter") -> Page:
        return Page(self.folder / "pairs" / f"{name}.html")

    def cell(self, cell_id: str) -> Page:
        return Page(self.folder / "cells" / f"{cell_id}.html")


def report_of(folder: Path, plan: dict) -> Report:
    """Builds the report of a plan in a folder."""
    return Report(folder, build_report([cell["path"] for cell in plan["cells"]], plan, folder / "index.html"))


def write(folder: Path, *cells, **metadata) -> dict:
    """Writes cells (keys, alpha) and returns the plan."""
    return write_fake_grid(folder, cells, metadata=metadata, **SMALL)


def write_measured(folder: Path, *cells, **rows) -> dict:
    """Writes cells (keys, alpha, perplexity of the target or None) and the quality of their targets, whose perplexity
    in floating point is 2; returns the plan."""
    plan = write_fake_grid(folder, [(keys, alpha) for keys, alpha, _ in cells], **{**SMALL, **rows})
    for entry, (keys, _, perplexity) in zip(plan["cells"], cells, strict=True):
        entry |= fake_metadata(keys)["cell"]
        sc = {"sc_stoc_len": keys["target_stoc_len"], "sc_prec": keys["target_sc_prec"], "sc_seed": 0}
        entry["target"] = {"model": "smollm2-135m", "sc": sc}
        path = folder / f"{sc['sc_stoc_len']}-{sc['sc_prec']}-{perplexity}.parquet"
        entry["quality"] = perplexity and str(path)
        if perplexity and not path.exists():
            write_quality(path, keys, perplexity)
    return plan


def write_quality(path: Path, keys: dict, perplexity: float) -> None:
    """Writes a quality file: eight prompts' continuations of 10 tokens, and a text file with perplexity 4."""
    sums = {"tokens": 10, "nll": 10 * math.log(perplexity), "float_nll": 10 * math.log(2), "tv": 2.0, "kl": 1.0}
    row = {"source": "continuations", "category": "maths", **sums}
    rows = [{**row, "text_id": f"{number}/0"} for number in range(8)]
    rows.append({**row, "source": "text_file", "text_id": "0", "nll": 10 * math.log(4)})
    metadata = {**fake_metadata(keys), **dict.fromkeys(QUALITY_KEYS - {"schema_version"}, "")}
    write_rows(path, rows, metadata, QUALITY_SCHEMA, QUALITY_KEYS)


def page_of(folder, rows, **metadata):
    """The page of the only cell of some rows."""
    blocks, keys = as_blocks(rows), rows[0]
    its = fake_metadata(keys, **metadata)
    (cell,) = (row for _, row in summarise(Tally.of(blocks), {keys["cell_id"]: its}).iterrows())
    path = folder / "cell.html"
    write_page(
        path,
        "cell.html.j2",
        cell_page(cell, blocks, prompt_totals(Tally.of(blocks))[keys["cell_id"]], its, "../../../"),
    )
    return Page(path)


def prompt_file(folder, text, ids=("p00",)):
    return file_of([f'{{"id": "{name}", "turns": ["{text}", "another turn"]}}' for name in ids], folder)


def file_of(lines, folder):
    """Write a prompt file to the folder; return what a cell's metadata say of it."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return {"file": str(path), "sha256": sha256_of(path), "token_ids_sha256": ""}
