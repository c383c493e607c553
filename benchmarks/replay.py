"""What replaying costs beside the loop, timed inside one run: python benchmarks/replay.py

One target's text and one draft's predictions on it give the cells of five gammas. They are compared with one plain
decode and one teacher-forced pass, each timed alone on the same prompts, and with the loops that they replace. Each
replayed cell is checked against its loop, block by block, before a time is printed. CPU, SmolLM2, real prompts.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import torch

from scspec.cells import expand
from scspec.config import load_experiment, read_config
from scspec.decoding import CachedScorer, Draws, SamplingConfig, decode_tokens
from scspec.jobs import Cell
from scspec.models import load_model, load_tokenizer
from scspec.prompts import load_prompts, turn_ids
from scspec.replay import replay_cell, run_predictions, run_trajectory, teacher_forced
from scspec.results import read_cell
from scspec.run import run_cell

REPOSITORY = Path(__file__).resolve().parents[1]
GAMMAS = (1, 2, 4, 6, 8)
COMPARED = ["prompt_id", "turn", "start", "emitted_ids", "accepted", "kept", "beta", "margin", "stop"]


def planned(arguments: argparse.Namespace) -> list[Cell]:
    """Return the loop's cell of each gamma: pair smollm2-shorter, target 128 cycles, draft 64."""
    config = read_config(REPOSITORY / "config.yaml")
    prompts = {"prompt_file": str(REPOSITORY / "prompts/bench48.jsonl"), "prompt_limit": arguments.prompts}
    axes = {"stoc_len": [128], "gamma": list(GAMMAS), "max_new_tokens": arguments.tokens, "demonstration": False}
    cells, _ = expand(load_experiment({**config, **prompts, **axes}))
    return [cell for cell in cells if cell.pair == "smollm2-shorter" and cell.arm == "sc_sc"]


def plain_and_teacher_forced_s(cell: Cell) -> tuple[float, float]:
    """Return the seconds of one plain decode of the prompts and of one teacher-forced draft pass over the texts."""
    target, draft = (load_model(side.model, sc_overrides=side.sc) for side in (cell.target, cell.draft))
    tokenizer = load_tokenizer(cell.target.model)
    prompts = [turn_ids(tokenizer, its) for its in load_prompts(cell.prompt_file)[: cell.prompt_limit]]
    capacity = max(map(len, prompts)) + cell.max_new_tokens
    scorers = [CachedScorer(model, capacity) for model in (target, draft)]
    options = {"sampling": SamplingConfig(), "draws": Draws(0), "max_new_tokens": cell.max_new_tokens}
    eos = frozenset([tokenizer.eos_token_id])
    list(decode_tokens(scorers[0], prompts[0], **{**options, "max_new_tokens": 2}, eos_token_ids=eos))  # compiles
    began_s = time.perf_counter()
    texts = [list(decode_tokens(scorers[0], ids, **options, eos_token_ids=eos)) for ids in prompts]
    decoded_s = time.perf_counter()
    for ids, text in zip(prompts, texts, strict=True):
        for logits in teacher_forced(scorers[1], np.array(ids), np.array(text)):
            logits.argmax(-1)
    return decoded_s - began_s, time.perf_counter() - decoded_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)  # as in the jobs
    cells = planned(arguments)
    plain_s, forced_s = plain_and_teacher_forced_s(cells[0])
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), cells, plain_s, forced_s, arguments)


def report(folder: Path, cells: list[Cell], plain_s: float, forced_s: float, arguments: argparse.Namespace) -> None:
    """Run and time both methods in `folder`, check that they agree, and print the times."""
    replays = [dataclasses.replace(cell, id=f"{cell.id}_replay", method="replay") for cell in cells]
    (predictions,) = {cell.predictions() for cell in replays}
    texts, guesses = predictions.trajectory.path(folder), predictions.path(folder)
    began_s = time.perf_counter()
    run_trajectory(predictions.trajectory, texts)
    run_predictions(predictions, texts, guesses)
    for cell in replays:
        replay_cell(cell, texts, guesses, cell.path(folder))
    replay_s = time.perf_counter() - began_s
    loops_s = []
    for cell, replay in zip(cells, replays, strict=True):
        began_s = time.perf_counter()
        run_cell(cell, cell.path(folder))
        loops_s.append(time.perf_counter() - began_s)
        blocks = [read_cell(its.path(folder))[0][COMPARED].map(str) for its in (cell, replay)]
        if not blocks[0].equals(blocks[1]):
            sys.exit(f"gamma {cell.gamma}: the replay's blocks are not the loop's")
    figures = {
        "prompts": arguments.prompts,
        "tokens": arguments.tokens,
        "gammas": len(cells),
        "plain_decode_s": plain_s,
        "teacher_forced_s": forced_s,
        "replay_s": replay_s,
        "replay_per_decode_and_pass": replay_s / (plain_s + forced_s),
        "loops_s": sum(loops_s),
        "loops_per_replay": sum(loops_s) / replay_s,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
