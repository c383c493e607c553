"""Two cells or two grids side by side: differences with intervals, and where greedy texts part.

Each side is cells as `results.read_cells` gives them. What both have in common is compared, the rest is listed.
Not covered: sampled texts, which part by chance as soon as one probability differs; charts.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scspec.results import read_cells
from scspec.stats import BOOTSTRAP, NO_INTERVAL, Tally, paired_differences, with_platforms

# What says that a cell of one grid and a cell of another are one point. `method` is not in it: a replayed cell and a
# loop of the same settings must give the same. Cells of another platform have no partner, since no table mixes them.
MATCH_COLUMNS = (
    *("pair", "arm", "target_stoc_len", "draft_stoc_len", "target_sc_prec", "draft_sc_prec", "gamma"),
    *("target_modules", "draft_modules"),  # those with streams of their own; of other settings two grids may differ
    *("sampling_seed", "target_sc_seed", "draft_sc_seed", "do_sample", "device_name", "dtype", "backend"),
)
TEXT_COLUMNS = (
    *("cell_id_a", "cell_id_b", "prompt_id", "equal", "turn", "position"),
    *("token_a", "token_b", "margin_a", "margin_b"),
)
UNMATCHED_COLUMNS = ("side", "cell_id", *MATCH_COLUMNS)
_TEXT_TYPES = dict.fromkeys(("turn", "position", "token_a", "token_b"), "Int64")

Cells = tuple[pd.DataFrame, Mapping[str, dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """differences: a row per pair of cells, `stats.DIFFERENCE_COLUMNS`, texts (prompts whose texts were compared) and
    equal_texts; texts: a row per pair and prompt, TEXT_COLUMNS; unmatched: a row per cell without a partner,
    UNMATCHED_COLUMNS, side "a" or "b"."""

    differences: pd.DataFrame
    texts: pd.DataFrame
    unmatched: pd.DataFrame


def read_side(path: Path | str) -> Cells:
    """Returns (blocks, cell_id -> metadata) of one Parquet file, or of all those in a folder and its subfolders.

    Raises FileNotFoundError if there is no such path, ValueError if a folder has no Parquet file or a file is no cell.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; needed: a cell's Parquet file, or a folder of them")
    paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path}: no Parquet file in this folder; needed: a cell's Parquet file, or a folder of them")
    return read_cells(paths)


def compare(a: Cells, b: Cells, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Returns what differs between two cells, or between the cells of two grids that have the same MATCH_COLUMNS.

    a, b: (blocks, metadata) of `read_cells`. If each is of one cell, these two are compared, whatever their settings
    are. Differences are b minus a, with the intervals of `stats.paired_differences`.

    Texts are those of greedy cells: `emitted_ids[:kept]` of a turn's blocks in order. `equal` says whether those of
    all turns are; if not, `turn` and `position` (absolute, as a block's `start`) are where they first part, token_a and
    token_b what each has there, and margin_a, margin_b the target's top-1 minus top-2 logit there; null where one text
    has ended. Cells whose prompts have other numbers of tokens (another tokenizer or chat template) have no common
    positions, and no row.

    Raises ValueError, one line, if two cells of a side have the same MATCH_COLUMNS and method, if no cell has a
    partner, or what `paired_differences` raises: then it calls the cells `a: ID` and `b: ID`.
    """
    sides = {name: _named(name, *side) for name, side in (("a", a), ("b", b))}
    blocks = pd.concat([side for side, _ in sides.values()], ignore_index=True)
    tally, metadata = Tally.of(blocks), {**sides["a"][1], **sides["b"][1]}
    keys = {name: _with_modules(with_platforms(tally.only(its), metadata)) for name, (_, its) in sides.items()}
    pairs = _pairs(keys)
    differences = paired_differences(tally, metadata, pairs, resamples=resamples, seed=seed)
    texts = _texts(blocks, pairs)
    found = texts.groupby(["cell_id_a", "cell_id_b"])["equal"].agg(["size", "sum"]).reindex(pairs, fill_value=0)
    differences["texts"], differences["equal_texts"] = found["size"].to_numpy(), found["sum"].to_numpy(dtype=np.int64)
    unmatched = [
        cells[~cells["cell_id"].isin([pair[index] for pair in pairs])].assign(side=name)
        for index, (name, cells) in enumerate(keys.items())
    ]
    return Comparison(*map(_own_ids, (differences, texts, pd.concat(unmatched)[list(UNMATCHED_COLUMNS)])))


def _with_modules(cells: pd.DataFrame) -> pd.DataFrame:
    modules = {
        f"{side}_modules": [
            json.dumps(json.loads(text).get("sc_modules", {}), sort_keys=True) for text in cells[f"{side}_settings"]
        ]
        for side in ("target", "draft")
    }
    return cells.assign(**modules)


def _named(name: str, blocks: pd.DataFrame, metadata: Mapping[str, dict[str, Any]]) -> Cells:
    """The same cells, their ids marked with the side: both sides may have a cell of one id."""
    return blocks.assign(cell_id=f"{name}: " + blocks["cell_id"]), {f"{name}: {k}": v for k, v in metadata.items()}


def _own_ids(table: pd.DataFrame) -> pd.DataFrame:
    ids = {name: table[name].str[3:] for name in table.columns if name.startswith("cell_id")}
    return table.assign(**ids).reset_index(drop=True)


def _pairs(keys: Mapping[str, pd.DataFrame]) -> list[tuple[str, str]]:
    """The cell ids (a, b) that belong together: of one method if there are such, else of whatever method."""
    a, b = keys.values()
    if len(a) == len(b) == 1:
        return [(a["cell_id"].iloc[0], b["cell_id"].iloc[0])]
    for cells in keys.values():
        _check_one_each(cells)
    pairs: dict[str, str] = {}
    for columns in ((*MATCH_COLUMNS, "method"), MATCH_COLUMNS):
        free_a, free_b = a[~a["cell_id"].isin(list(pairs))], b[~b["cell_id"].isin(list(pairs.values()))]
        both = free_a.merge(free_b, on=list(columns), suffixes=("_a", "_b"))  # a null is equal to a null
        pairs.update(zip(both["cell_id_a"], both["cell_id_b"], strict=True))
    if not pairs:
        raise ValueError(f"no cell of a has a partner in b, with the same {', '.join(MATCH_COLUMNS)}")
    return [(cell_id, pairs[cell_id]) for cell_id in a["cell_id"] if cell_id in pairs]


def _check_one_each(cells: pd.DataFrame) -> None:
    columns = [*MATCH_COLUMNS, "method"]
    same = cells.groupby(columns, dropna=False)["cell_id"].agg(list)
    for twice in same[same.map(len) > 1]:
        raise ValueError(f"cells {twice[0]!r} and {twice[1]!r} have the same {', '.join(columns)}: give one of them")


def _texts(blocks: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    ordered = blocks[~blocks["do_sample"]].sort_values(["prompt_id", "turn", "block"], kind="stable")
    cells = dict(iter(ordered.groupby("cell_id")))
    rows = []
    for pair in pairs:
        if all(cell_id in cells for cell_id in pair):
            rows += [(*pair, *row) for row in _text_rows(*(cells[cell_id] for cell_id in pair))]
    return pd.DataFrame(rows, columns=TEXT_COLUMNS).astype({**_TEXT_TYPES, "equal": bool})


def _text_rows(a: pd.DataFrame, b: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rest of TEXT_COLUMNS for each prompt that both have; none if a prompt has another number of tokens."""
    asked_a, asked_b = (cell[cell["turn"] == 0].groupby("prompt_id")["prompt_tokens"].first() for cell in (a, b))
    if not asked_a.equals(asked_b):
        return []
    texts_b = dict(_prompt_texts(b))
    return [(prompt_id, *_parting(text, texts_b[prompt_id])) for prompt_id, text in _prompt_texts(a)]


def _prompt_texts(cell: pd.DataFrame) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Yields (prompt_id, (turn, position, token, margin) of each kept token, in order)."""
    for prompt_id, its in cell.groupby("prompt_id"):
        columns = (its[name] for name in ("turn", "start", "kept", "emitted_ids", "margin"))
        yield (
            prompt_id,
            [
                (turn, start + index, emitted[index], margin[index])
                for turn, start, kept, emitted, margin in zip(*columns, strict=True)
                for index in range(kept)
            ],
        )


def _parting(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """(equal, turn, position, token_a, token_b, margin_a, margin_b) of two texts of a prompt."""
    for its_a, its_b in zip_longest(a, b):
        if its_a is None or its_b is None or its_a[:3] != its_b[:3]:
            where = min(its[:2] for its in (its_a, its_b) if its)  # a turn may have ended in one of them
            (token_a, margin_a), (token_b, margin_b) = (
                its[2:] if its and its[:2] == where else (None, np.nan) for its in (its_a, its_b)
            )
            return False, *where, token_a, token_b, margin_a, margin_b
    return True, None, None, None, None, np.nan, np.nan


def plain_tables(comparison: Comparison) -> str:
    """Returns the comparison as text: the differences; of a single pair, where its texts part; what has no partner."""
    differences, texts = comparison.differences, comparison.texts
    parts = ["b minus a, with 95 % intervals over prompts:", _plain(_shown(differences))]
    if len(differences) == 1 and not texts.empty:
        parted = texts[~texts["equal"]].drop(columns=["cell_id_a", "cell_id_b", "equal"])
        where = f"\n\n{_plain(parted)}" if len(parted) else ""
        parts.append(f"{len(texts) - len(parted)} of {len(texts)} greedy texts are equal.{where}")
    if len(comparison.unmatched):
        parts += [
            "Without a partner:",
            _plain(comparison.unmatched[["side", "cell_id", "device_name", "dtype", "backend"]]),
        ]
    return "\n\n".join(parts)


def _shown(differences: pd.DataFrame) -> pd.DataFrame:
    table = differences[["cell_id_a", "cell_id_b", "prompts"]].copy()
    if (table["cell_id_a"] == table["cell_id_b"]).all():
        table = table.drop(columns="cell_id_b").rename(columns={"cell_id_a": "cell_id"})
    for name, kind in (("alpha", "interval"), ("tau", "tau_interval")):
        table[[f"{name}_a", f"{name}_b", f"{name}_diff"]] = differences[[f"{name}_a", f"{name}_b", f"{name}_diff"]]
        bounds = zip(*(differences[column] for column in (f"{name}_diff_lo", f"{name}_diff_hi", kind)), strict=True)
        table[f"{name}_diff, 95 %"] = [_interval_text(*its) for its in bounds]
    return table.assign(**{"equal texts": [f"{k} of {n}" for k, n in differences[["equal_texts", "texts"]].to_numpy()]})


def _interval_text(low: float, high: float, kind: str) -> str:
    return kind if kind == NO_INTERVAL else f"{low:.4f} to {high:.4f}{'' if kind == BOOTSTRAP else f' ({kind})'}"


def _plain(table: pd.DataFrame) -> str:
    text: str = table.to_string(index=False, float_format="{:.4f}".format, na_rep="-")
    return text
