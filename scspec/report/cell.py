"""The page of a cell: its settings and estimates, its worst and slowest prompts, and the text of these."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from scspec.charts import ARM_LABELS, decoding, draft_labels, interval_text, number
from scspec.config import REPLAY
from scspec.prompt_rows import Prompt
from scspec.prompts import load_prompts
from scspec.provenance import sha256_of
from scspec.report.tables import whole
from scspec.report.transcript import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    REJECTED,
    TRANSCRIPT_COLUMNS,
    tokenizer_here,
    transcript,
    visible,
)
from scspec.stats import TIMES, Tally, alpha

_SIDES = ("target", "draft")
_DRAFT = [f"{side}_{name}" for side in _SIDES for name in ("stoc_len", "sc_prec", "settings")]
_PROMPTS_LISTED = 3
_PROMPT_CHARACTERS = 300
_TOKENS_SHOWN = 160  # of all transcripts together: pages of 8 KB on average, 1000 of which leave room in 20 MB
_TAGS = {ACCEPTED: "", REJECTED: "del", CORRECTION: "ins", BONUS: "b"}  # told apart without colours too


class PromptTotals(NamedTuple):
    """Of a prompt, its turns together: alpha, tokens kept, draft and target times in seconds, NaN where replayed."""

    prompt_id: str
    category: str
    alpha: float
    tokens: float
    time_s: float


def prompt_totals(tally: Tally) -> dict[str, list[PromptTotals]]:
    """cell_id -> the totals of its prompts, in the order of their ids."""
    found: dict[str, list[PromptTotals]] = {cell_id: [] for cell_id in tally.cells["cell_id"]}
    if found:
        sums = tally.sums
        columns = (alpha(sums), sums["tokens"], sum(sums[name] for name in TIMES))
        for (cell_id, category, prompt_id), *its in zip(sums.index, *columns, strict=True):
            found[cell_id].append(PromptTotals(prompt_id, category, *its))
    return {cell_id: sorted(its) for cell_id, its in found.items()}


def cell_page(
    cell: pd.Series, blocks: pd.DataFrame, prompts: list[PromptTotals], metadata: dict[str, Any], root: str
) -> dict[str, Any]:
    """What the template of a cell shows.

    cell: its row of the summary; blocks: its rows of SCHEMA; prompts: its `prompt_totals`; metadata: its file's; root:
    where the index lies, as "../../". Tokens are read with the target's tokenizer, prompts from the file that
    `metadata` names.
    """
    worst = sorted(prompts, key=lambda its: its.alpha)[:_PROMPTS_LISTED]
    timed = [its for its in prompts if not np.isnan(its.time_s)]
    slowest = sorted(timed, key=lambda its: its.time_s, reverse=True)[:_PROMPTS_LISTED]
    expected = cell["method"] == REPLAY and bool(cell["do_sample"])
    tokenizer = None if expected else tokenizer_here(cell["target_model"])
    return {
        "root": root,
        "charts": [],
        "heading": visible(cell["cell_id"]),
        "lead": f"{ARM_LABELS[cell['arm']]}, gamma {cell['gamma']}, {decoding(cell['do_sample'])} decoding",
        "pair": cell["pair"],
        "tables": [
            ("Settings", _settings(cell)),
            ("Estimates", _estimates(cell)),
        ],
        "lists": [
            ("Worst prompts", "alpha", _listed(worst, [number(its.alpha) for its in worst])),
            ("Slowest prompts", "draft and target (s)", _listed(slowest, [f"{its.time_s:.2f}" for its in slowest])),
        ],
        "tags": _TAGS,
        "expected": expected,
        "unread": visible(cell["target_model"]) if tokenizer is None else "",
        "transcripts": [] if expected else _transcripts(worst, slowest, blocks, metadata["prompts"], tokenizer),
    }


def _listed(prompts: list[PromptTotals], values: list[str]) -> list[tuple[str, ...]]:
    return [
        (visible(its.prompt_id), visible(its.category), value, f"{its.tokens:,.0f}")
        for its, value in zip(prompts, values, strict=True)
    ]


def _settings(cell: pd.Series) -> list[tuple[str, str]]:
    def both(name: str) -> str:
        return " / ".join(whole(cell[f"{side}_{name}"], "float") for side in _SIDES)

    models = dict.fromkeys(visible(cell[f"{side}_model"]) for side in _SIDES)
    seeds = [cell[name] for name in ("sampling_seed", "target_sc_seed", "draft_sc_seed")]
    return [
        ("pair, arm", f"{cell['pair']}, {ARM_LABELS[cell['arm']]}"),
        ("stoc_len target / draft", both("stoc_len")),
        ("sc_prec target / draft", both("sc_prec")),
        ("draft's streams", visible(_draft_label(*(cell[name] for name in _DRAFT)))),
        ("gamma", str(cell["gamma"])),
        ("decoding", f"{decoding(cell['do_sample'])}, {cell['method']}"),
        ("seeds: sampling / target / draft", " / ".join(whole(seed, "-") for seed in seeds)),
        ("computed on", visible(f"{cell['device_name']}, {cell['dtype']}, backend {cell['backend']}")),
        ("models" if len(models) > 1 else "model", " / ".join(models)),
    ]


@cache
def _draft_label(*settings: Any) -> str:
    """What `draft_labels` says of one cell, given its columns _DRAFT. That takes 2 ms, and many cells have the same."""
    return draft_labels(pd.DataFrame([dict(zip(_DRAFT, settings, strict=True))]))[0]


def _estimates(cell: pd.Series) -> list[tuple[str, str]]:
    def interval(name: str, kind: str) -> str:
        return interval_text(cell[name], cell[f"{name}_lo"], cell[f"{name}_hi"], cell[kind])

    speed = "none: replayed" if pd.isna(cell["tokens_per_s"]) else f"{cell['tokens_per_s']:.1f}, of the simulation"
    return [
        ("alpha", number(cell["alpha"])),
        ("alpha, 95\u00a0%", interval("alpha", "interval")),
        ("tau", f"{number(cell['tau'])}; predicted from alpha {number(cell['predicted_tau'])}"),
        ("tau, 95\u00a0%", interval("tau", "tau_interval")),
        ("acceptance rate", number(cell["acceptance_rate"])),
        ("tokens", f"{cell['tokens']:,} in {cell['blocks']:,} blocks of {cell['prompts']} prompts"),
        ("tokens/s", speed),
    ]


def _transcripts(
    worst: list[PromptTotals],
    slowest: list[PromptTotals],
    blocks: pd.DataFrame,
    prompt_file: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> list[dict[str, Any]]:
    """The first turn of the worst prompt and of the slowest, which may be one."""
    titles: dict[str, list[str]] = {}
    for title, prompts in (("worst", worst), ("slowest", slowest)):
        for its in prompts[:1]:
            titles.setdefault(its.prompt_id, []).append(title)
    texts = _prompts(prompt_file["file"], prompt_file["sha256"])
    limit = _TOKENS_SHOWN // len(titles)
    return [
        {
            "title": f"The {' and '.join(title)} prompt",
            "prompt_id": visible(prompt_id),
            **_first_turn(blocks, prompt_id, texts.get(prompt_id), tokenizer, limit),
        }
        for prompt_id, title in titles.items()
    ]


def _first_turn(
    blocks: pd.DataFrame, prompt_id: str, prompt: Prompt | None, tokenizer: Tokenizer | None, limit: int
) -> dict[str, Any]:
    rows = np.flatnonzero(blocks["prompt_id"] == prompt_id)
    turns = blocks["turn"].to_numpy()[rows]
    count = len(np.unique(turns))
    first = rows[turns == turns.min()]
    first = first[np.argsort(blocks["block"].to_numpy()[first])]
    return {
        "turns": f", the first of {count} turns" if count > 1 else "",
        "earlier": len(prompt.history) if prompt else 0,
        "prompt": visible(_cut(_said(prompt.turns[turns.min()], tokenizer))) if prompt else "",
        "reference": visible(_cut(" / ".join(filter(str.strip, prompt.reference)))) if prompt else "",
        "text": transcript({name: blocks[name].take(first) for name in TRANSCRIPT_COLUMNS}, tokenizer, limit),
    }


def _said(turn: str | tuple[int, ...], tokenizer: Tokenizer | None) -> str:
    """A turn's text; of token ids what they say, and themselves where that cannot be read."""
    if isinstance(turn, str):
        return turn
    read = tokenizer.decode(list(turn), skip_special_tokens=False) if tokenizer else ""
    return read or " ".join(map(str, turn))


def _cut(text: str) -> str:
    return text if len(text) <= _PROMPT_CHARACTERS else f"{text[:_PROMPT_CHARACTERS].rstrip()}\u2026"


@cache
def _prompts(file: str, sha256: str) -> dict[str, Prompt]:
    """The prompts of a file, by id; none where it is not there, or is not the one with that SHA-256."""
    try:
        same = sha256_of(file) == sha256
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {}
    return {prompt.prompt_id: prompt for prompt in load_prompts(file)} if same else {}
