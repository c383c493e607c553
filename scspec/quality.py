"""Quality of a target in SC: how well it predicts a fixed text, and how far it is from itself in floating point.

Acceptance compares two models; two broken ones may agree. So each target setting is scored on one text that depends on
none of them, the float target's own continuations of the prompts (a `Trajectory`), and on a text file if one is named.
Both models run over the same tokens, teacher-forced; distributions are the plain softmax, at temperature 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scspec.checkpoint import FinishedPrompt
from scspec.decoding import CachedScorer
from scspec.jobs import Quality
from scspec.preflight import check_planned
from scspec.prompt_rows import Prompt
from scspec.provenance import sha256_of
from scspec.replay import check_alike, read_trajectory, teacher_forced
from scspec.results import CONTINUATIONS, QUALITY_KEYS, QUALITY_SCHEMA, TEXT_FILE, write_rows
from scspec.task import Save, Task

#: Tokens of a text file that are scored with one context: the first of each window is only read.
WINDOW_TOKENS = 512

#: Of the target, and of the same model in floating point.
Scorers = tuple[CachedScorer, CachedScorer]


def run_quality(quality: Quality, trajectory_path: Path, output: Path, *, threads: int = 1, gpus: int = 1) -> None:
    """Score the target on the texts of a trajectory's file and on the text file; write a row per text to `output`.

    All else is as in `run_cell`; also raises ValueError if the file is of another trajectory, the text file is not the
    planned one, or it has no two tokens.
    """
    texts, origin = read_trajectory(trajectory_path, quality.trajectory)
    text = _text(quality)
    sides = {"target": quality.target, "float": quality.trajectory.target}
    task = Task.load(quality.trajectory, sides, output, beyond=1, threads=threads, gpus=gpus)
    metadata = {"quality": json.loads(quality.to_json()), "trajectory_file_sha256": sha256_of(trajectory_path)}
    metadata |= task.metadata()
    check_alike(trajectory_path, origin, "this run", metadata)
    windows = list(_windows(task, text))
    longest = max([*(texts["prompt_ids"].map(len) + texts["tokens"]), *map(len, windows)])
    scorers = CachedScorer(task.models["target"], int(longest)), CachedScorer(task.models["float"], int(longest))

    def score(prompts: list[Prompt], save: Save) -> None:
        for prompt in prompts:
            turns = list(texts[texts["prompt_id"] == prompt.prompt_id].itertuples())
            rows = [_continuation_row(scorers, turn) for turn in turns]
            save(FinishedPrompt(prompt.prompt_id, [turn.prompt_ids.tolist() for turn in turns], rows))

    def write(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
        rows += [_window_row(scorers, number, window) for number, window in enumerate(windows)]
        write_rows(output, rows, metadata, QUALITY_SCHEMA, QUALITY_KEYS)

    task.complete(metadata, score, write)


def _text(quality: Quality) -> str:
    if quality.text_file is None:
        return ""
    check_planned(quality.text_file, quality.text_sha256, "quality.text_file", "quality")
    try:
        return Path(quality.text_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"quality.text_file {quality.text_file}: {error}; allowed: text in UTF-8") from None


def _windows(task: Task, text: str) -> Iterator[np.ndarray]:
    """Yield the text's tokens, (n,) int64, at most WINDOW_TOKENS at a time and at least two."""
    if not text:
        return
    ids = np.array(task.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    size = min(WINDOW_TOKENS, task.limit)
    windows = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    if len(ids) < 2:
        raise ValueError(f"quality.text_file: {len(ids)} tokens; allowed: at least 2")
    yield from (window for window in windows if len(window) > 1)


def _continuation_row(scorers: Scorers, turn: Any) -> dict[str, Any]:
    where = {"source": CONTINUATIONS, "text_id": f"{turn.prompt_id}/{turn.turn}", "category": turn.category}
    return {**where, **score_text(*scorers, turn.prompt_ids, turn.text_ids[: turn.tokens])}


def _window_row(scorers: Scorers, number: int, ids: np.ndarray) -> dict[str, Any]:
    where = {"source": TEXT_FILE, "text_id": str(number), "category": TEXT_FILE}
    return {**where, **score_text(*scorers, ids[:1], ids[1:])}


def score_text(
    target: CachedScorer, float_target: CachedScorer, prompt_ids: np.ndarray, text_ids: np.ndarray
) -> dict[str, Any]:
    """Return the sums over the tokens of a text (n,) after a prompt (m,), as columns of QUALITY_SCHEMA."""
    sums, ids = np.zeros(4), iter(text_ids)
    passes = (teacher_forced(scorer, prompt_ids, text_ids) for scorer in (target, float_target))
    for pair in zip(*passes, strict=True):
        for rows in zip(*(logits.cpu().numpy() for logits in pair), strict=True):
            own, reference = (log_softmax(row) for row in rows)
            token, p = next(ids), np.exp(reference)
            tv = np.abs(np.exp(own) - p).sum() / 2
            possible = p > 0
            kl = (p[possible] * (reference[possible] - own[possible])).sum()
            sums += (-own[token], -reference[token], tv, kl)
    return {"tokens": len(text_ids), **dict(zip(("nll", "float_nll", "tv", "kl"), sums.tolist(), strict=True))}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (V,) float64 of logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return log_probs
