"""Replay: the blocks that draft and target would decode, from the target's text and what the draft predicts on it.

With exactness a greedy text of the target depends on neither gamma nor the draft. So one text per target setting
(`run_trajectory`) and one teacher-forced pass per draft setting (`run_predictions`) give every gamma's blocks exactly
(`replay_cell`, which loads no model). A sampled text is one draw from the target's distribution, which is also that of
speculative decoding, and given the text a token y was accepted with probability min(1, q(y) / p(y)), independently of
the others (Leviathan et al. 2023, arXiv 2211.17192, appendix A.1: a token is proposed and accepted with probability
min(p, q), and emitted with probability p). Then a block that could be has an expected number, found by going through
the text once; it is the `weight` of its row.

Replay needs rows that depend on nothing after them and not on how many rows come along: `config` refuses other knobs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from scspec.checkpoint import FinishedPrompt
from scspec.config import REPLAY
from scspec.decoding import Block, CachedScorer, SamplingConfig, greedy_ids, sampling
from scspec.jobs import POSITIONS_PER_PASS, Cell, Predictions, Trajectory
from scspec.prompt_rows import Prompt
from scspec.provenance import sha256_of
from scspec.results import METADATA_KEYS, read_rows, write_cell, write_rows
from scspec.run import key_columns
from scspec.task import Save, Task

_IDS, _TEXT = pa.list_(pa.int32()), [pa.field("prompt_id", pa.string(), False), pa.field("turn", pa.int32(), False)]
#: A row per prompt and turn. `text_ids`: the text, `tokens` long, and what the target says past its end; `margin`: the
#: target's largest logit minus the second at each of them.
TRAJECTORY_SCHEMA = pa.schema(
    [
        *_TEXT,
        pa.field("category", pa.string(), False),
        pa.field("prompt_ids", _IDS, False),
        pa.field("text_ids", _IDS, False),
        pa.field("tokens", pa.int32(), False),
        pa.field("stop", pa.string(), False),
        pa.field("margin", pa.list_(pa.float32()), False),
    ]
)
#: A row per prompt and turn, lists as long as `text_ids`. `draft_ids`: the draft's choice, null where tokens are
#: sampled; `acceptance`: how likely the token was accepted, if it was proposed; `beta`: 1 - TV(p, q).
PREDICTIONS_SCHEMA = pa.schema(
    [
        *_TEXT,
        pa.field("draft_ids", _IDS),
        pa.field("acceptance", pa.list_(pa.float64()), False),
        pa.field("beta", pa.list_(pa.float64()), False),
    ]
)
_SHARED_KEYS = METADATA_KEYS - {"cell"} | {"sources", "settings"}
TRAJECTORY_KEYS = _SHARED_KEYS | {"trajectory", "eos_token_ids"}
PREDICTIONS_KEYS = _SHARED_KEYS | {"predictions", "trajectory_file_sha256"}
#: What a trajectory and predictions on it must have been made with alike: else a last bit may differ, and SC turns that
#: into other tokens.
_ALIKE = ("device", "backend", "versions", "sources")


def run_trajectory(
    trajectory: Trajectory, output: Path, *, threads: int = 1, prompts_per_batch: int = 1, gpus: int = 1
) -> None:
    """Decode the target's own texts and write them to `output` (TRAJECTORY_SCHEMA). All else is as in `run_cell`."""
    beyond = trajectory.past_end + 1
    task = Task.load(trajectory, {"target": trajectory.target}, output, beyond=beyond, threads=threads, gpus=gpus)
    metadata = {"trajectory": json.loads(trajectory.to_json()), "eos_token_ids": sorted(task.eos_token_ids)}

    def decode(prompts: list[Prompt], save: Save) -> None:
        options = {"gamma": 0, "slots": prompts_per_batch, "past_end": trajectory.past_end}
        task.decode(prompts, save, _text_rows, **options)

    def write(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
        write_rows(output, rows, metadata, TRAJECTORY_SCHEMA, TRAJECTORY_KEYS)

    task.complete({**metadata, **task.metadata()}, decode, write)


def _text_rows(prompt_ids: list[int], blocks: list[Block]) -> list[dict[str, Any]]:
    """The one row of a turn, whose blocks are a token each."""
    text = {
        "prompt_ids": prompt_ids,
        "text_ids": [block.emitted[0] for block in blocks],
        "tokens": sum(block.kept for block in blocks),
        "stop": blocks[-1].stop,
        "margin": [block.margin[0] for block in blocks],
    }
    return [text]


def run_predictions(
    predictions: Predictions, trajectory_path: Path, output: Path, *, threads: int = 1, gpus: int = 1
) -> None:
    """Run the draft over the texts of a trajectory's file and write what it predicts (PREDICTIONS_SCHEMA) to `output`.

    Of sampled texts the target's distributions are needed too: it runs over them again. Options and errors:
    `run_cell`'s; also raises ValueError if the file is of another trajectory.
    """
    trajectory = predictions.trajectory
    texts, origin = read_trajectory(trajectory_path, trajectory)
    sides = {"target": trajectory.target, "draft": predictions.draft}
    if not trajectory.sampling.do_sample:
        del sides["target"]
    task = Task.load(trajectory, sides, output, beyond=trajectory.past_end + 1, threads=threads, gpus=gpus)
    metadata = {"predictions": json.loads(predictions.to_json()), "trajectory_file_sha256": sha256_of(trajectory_path)}
    metadata |= task.metadata()
    check_alike(trajectory_path, origin, "this run", metadata)

    def predict(prompts: list[Prompt], save: Save) -> None:
        for prompt in prompts:
            turns = texts[texts["prompt_id"] == prompt.prompt_id]
            rows = [_prediction_row(task, scorers, text) for text in turns.itertuples()]
            save(FinishedPrompt(prompt.prompt_id, [text.prompt_ids.tolist() for text in turns.itertuples()], rows))

    capacity = int((texts["prompt_ids"].map(len) + texts["text_ids"].map(len)).max())
    scorers = {name: CachedScorer(model, capacity) for name, model in task.models.items()}

    def write(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
        write_rows(output, rows, metadata, PREDICTIONS_SCHEMA, PREDICTIONS_KEYS)

    task.complete(metadata, predict, write)


def _prediction_row(task: Task, scorers: dict[str, CachedScorer], text: Any) -> dict[str, Any]:
    passes = {name: teacher_forced(scorer, text.prompt_ids, text.text_ids) for name, scorer in scorers.items()}
    where = {"prompt_id": text.prompt_id, "turn": text.turn}
    if not task.spec.sampling.do_sample:
        draft_ids = [token for logits in passes["draft"] for token in greedy_ids(logits)]
        agreement = [float(token == own) for token, own in zip(draft_ids, text.text_ids, strict=True)]
        return {**where, "draft_ids": draft_ids, "acceptance": agreement, "beta": agreement}
    config, ids, acceptance, beta = SamplingConfig(**vars(task.spec.sampling)), iter(text.text_ids), [], []
    for pair in zip(passes["target"], passes["draft"], strict=True):
        for row in zip(*(logits.cpu().numpy() for logits in pair), strict=True):
            p, q = (sampling.warp(logits, config) for logits in row)
            token = next(ids)
            acceptance.append(min(1.0, float(q[token]) / float(p[token])))
            beta.append(float(sampling.beta(p, q)))
    return {**where, "draft_ids": None, "acceptance": acceptance, "beta": beta}


def teacher_forced(scorer: CachedScorer, prompt_ids: np.ndarray, text_ids: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the logits (n, V) float32 that predict each of `text_ids`, some at a time, in order: those of a decoder.

    The scorer has one slot and room for both.
    """
    fed = [*prompt_ids[-1:].tolist(), *text_ids[:-1].tolist()]
    scorer.prefill(0, prompt_ids[:-1].tolist())
    for begin in range(0, len(fed), POSITIONS_PER_PASS):
        ids = torch.tensor([fed[begin : begin + POSITIONS_PER_PASS]])
        yield scorer.feed(ids, ids.shape[1])[0]


def replay_cell(cell: Cell, trajectory_path: Path, predictions_path: Path, output: Path) -> None:
    """Derive a cell's blocks from the files of its trajectory and of its predictions, and write its Parquet file.

    Raises ValueError for a cell of method "loop", and if a file is of other settings, or the two were made on different
    devices or backends, with different package versions or sources, or not one from the other.
    """
    if cell.method != REPLAY:
        raise ValueError(f"method={cell.method!r} of cell {cell.id}: replay derives cells of method 'replay' alone")
    wanted = cell.predictions()
    texts, origin = read_trajectory(trajectory_path, wanted.trajectory)
    predicted, metadata = read_rows(predictions_path, PREDICTIONS_SCHEMA, PREDICTIONS_KEYS)
    if metadata["predictions"] != json.loads(wanted.to_json()):
        raise ValueError(
            f"{predictions_path}: made with other settings than planned; again: {_again(predictions_path)}"
        )
    if metadata["trajectory_file_sha256"] != sha256_of(trajectory_path):
        raise ValueError(f"{predictions_path}: made from another {trajectory_path}; again: {_again(predictions_path)}")
    check_alike(trajectory_path, origin, predictions_path, metadata)
    metadata = _cell_metadata(cell, origin, metadata)
    keys, rows = key_columns(cell, metadata), []
    for text, prediction in zip(texts.itertuples(), predicted.itertuples(), strict=True):
        where = {"prompt_id": text.prompt_id, "category": text.category, "turn": text.turn}
        found = blocks_of(Text.of(text, prediction), cell.gamma, frozenset(origin["eos_token_ids"]))
        rows += [{**keys, **where, "block": number, **block} for number, block in enumerate(found)]
    write_cell(output, rows, metadata)


def read_trajectory(path: Path, trajectory: Trajectory) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return (a row per prompt and turn, metadata) of a trajectory's file; ValueError if it is of another one."""
    texts, metadata = read_rows(path, TRAJECTORY_SCHEMA, TRAJECTORY_KEYS)
    if metadata["trajectory"] != json.loads(trajectory.to_json()):
        raise ValueError(f"{path}: made with other settings than planned; {_again(path)}")
    return texts, metadata


def _again(path: Path) -> str:
    return f"again: snakemake -R {path}"


def check_alike(path: Path, found: dict[str, Any], other: Path | str, wanted: dict[str, Any]) -> None:
    """Raise ValueError if a trajectory (its path and metadata) and what it is to be used with are of two platforms."""
    if different := [name for name in _ALIKE if found[name] != wanted[name]]:
        ours, theirs = ({name: its[name] for name in different} for its in (wanted, found))
        raise ValueError(
            f"{path} and {other} were made with different {', '.join(different)}: {theirs} and {ours}; "
            f"needed: both from one platform; {_again(path)}"
        )


def _cell_metadata(cell: Cell, origin: dict[str, Any], predictions: dict[str, Any]) -> dict[str, Any]:
    """Return the cell's metadata: what both files came from. A replay takes no times."""
    merged = ("models", "sc_mac_share", "cost", "weights_note", "settings")
    return {
        **{name: predictions[name] for name in METADATA_KEYS - {"cell"} | {"sources"}},
        **{name: {**predictions[name], **origin[name]} for name in merged},
        "cell": json.loads(cell.to_json()),
        "wall_time_s": None,
        "replayed_from": {
            name: {key: metadata[key] for key in ("commit", "dirty", "started_at", "wall_time_s", "attempts")}
            for name, metadata in (("trajectory", origin), ("predictions", predictions))
        },
    }


@dataclass(frozen=True)
class Text:
    """A target's text with a draft's predictions, lists of equal length: `tokens` of the text, and some past its end.

    `draft_ids` is None where tokens are sampled. `margin`, `acceptance`, `beta`: as in the schemas.
    """

    prompt_tokens: int
    text_ids: list[int]
    tokens: int
    stop: str
    margin: list[float]
    draft_ids: list[int] | None
    acceptance: list[float]
    beta: list[float]

    @classmethod
    def of(cls, text: Any, prediction: Any) -> "Text":
        """Return the row of a trajectory and that of its predictions as one. Raises ValueError if they do not match."""
        if (text.prompt_id, text.turn) != (prediction.prompt_id, prediction.turn):
            raise ValueError(f"prompt {text.prompt_id!r}, turn {text.turn}: no predictions of it at its place")
        draft_ids = None if prediction.draft_ids is None else prediction.draft_ids.tolist()
        return cls(
            len(text.prompt_ids),
            text.text_ids.tolist(),
            text.tokens,
            text.stop,
            text.margin.tolist(),
            draft_ids,
            prediction.acceptance.tolist(),
            prediction.beta.tolist(),
        )


def blocks_of(text: Text, gamma: int, eos_token_ids: frozenset[int]) -> Iterator[dict[str, Any]]:
    """Yield each block that a loop could decode on the way through a text, with its expected number as `weight`.

    A greedy text has one way through: the loop's own blocks, each of weight 1. The text must go on for `gamma` tokens
    past its end.
    """
    starts = np.zeros(text.tokens + gamma + 1)  # the expected number of blocks that start at each position
    starts[0] = 1.0
    for begin in range(text.tokens):
        reached = starts[begin]
        for accepted in range(gamma + 1):
            if reached == 0:
                break
            on = text.acceptance[begin + accepted] if accepted < gamma else 0.0
            if on < 1:
                block = _block(text, begin, accepted, gamma, eos_token_ids)
                weight = float(reached * (1 - on))
                starts[begin + len(block["emitted_ids"])] += 0.0 if block["stop"] else weight
                yield {"weight": weight, **block}
            reached *= on


def _block(text: Text, begin: int, accepted: int, gamma: int, eos_token_ids: frozenset[int]) -> dict[str, Any]:
    """The block of `accepted` proposals that starts at the text's token `begin`."""
    emitted = text.text_ids[begin : begin + accepted + 1]
    end = next((index for index, token in enumerate(emitted, 1) if token in eos_token_ids), len(emitted))
    kept = min(end, text.tokens - begin)
    known = text.draft_ids[begin : begin + min(gamma, accepted + 1)] if text.draft_ids else emitted[:accepted]
    return {
        "prompt_tokens": text.prompt_tokens,
        "start": text.prompt_tokens + begin,
        "proposed_ids": known,
        "emitted_ids": emitted[:end],
        "accepted": accepted,
        "kept": kept,
        "beta": text.beta[begin : begin + end],
        "margin": text.margin[begin : begin + end],
        "stop": text.stop if begin + end >= text.tokens else None,
        "draft_time_s": None,
        "verify_time_s": None,
    }
