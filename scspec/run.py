"""`run_cell`: one cell of the grid as a loop of draft and target, from its settings to its Parquet file."""

import json
from collections import defaultdict
from itertools import count
from pathlib import Path

from scspec.checkpoint import FinishedPrompt
from scspec.config import LOOP
from scspec.decoding import Block
from scspec.jobs import Cell
from scspec.prompts import Prompt
from scspec.results import write_cell
from scspec.task import Save, Task


def run_cell(cell: Cell, output: Path, *, threads: int = 1, prompts_per_batch: int = 1, gpus: int = 1) -> None:
    """Decode the cell's prompts and write its Parquet file (docs/architecture.md, "Seam 3") to `output`.

    Everything cheap is checked before a model is loaded: ValueError names what is wrong. `prompts_per_batch` prompts
    are decoded side by side, and each model's layers lie on the first `gpus` GPUs; neither these nor `threads` change a
    result, wall times apart. Each finished prompt is saved, and what earlier runs of the same settings, sources and
    device have saved is not decoded again (`checkpoint`). Progress goes to stderr. Sets the process's thread counts.
    """
    if cell.method != LOOP:
        raise ValueError(f"method={cell.method!r} of cell {cell.id}: a loop runs cells of method 'loop' alone")
    sides = {"target": cell.target, "draft": cell.draft}
    task = Task.load(cell, sides, output, beyond=cell.gamma + 1, threads=threads, gpus=gpus)
    keys = key_columns(cell, metadata := {"cell": json.loads(cell.to_json()), **task.metadata()})

    def decode(prompts: list[Prompt], save: Save) -> None:
        _decode(task, prompts, save, prompts_per_batch)

    finished, metadata = task.complete(metadata, decode)
    write_cell(output, [{**keys, **row} for prompt in finished for row in prompt.rows], metadata)
    task.checkpoint.remove()


def key_columns(cell: Cell, metadata: dict) -> dict:
    """Return the columns that are the same in every row of a cell; the sides' settings are the metadata's."""
    keys = {
        "cell_id": cell.id,
        "pair": cell.pair,
        "arm": cell.arm,
        "stoc_len": cell.stoc_len,
        "sc_prec": cell.sc_prec,
        "gamma": cell.gamma,
        "sampling_seed": cell.sampling_seed,
        "sc_seed": cell.sc_seed,
        "device": cell.device,
        "backend": cell.backend,
        "method": cell.method,
        "do_sample": cell.sampling.do_sample,
    }
    for name, side in (("target", cell.target), ("draft", cell.draft)):
        knobs = side.sc or {}
        keys[f"{name}_model"] = side.model
        for knob in ("sc_prec", "sc_seed"):
            keys[f"{name}_{knob}"] = knobs.get(knob)
        keys[f"{name}_stoc_len"] = knobs.get("sc_stoc_len")
        keys[f"{name}_settings"] = json.dumps(metadata["settings"][name], sort_keys=True)
    return keys


def _decode(task: Task, prompts: list[Prompt], save: Save, slots: int) -> None:
    """Decode the prompts and hand each to `save` when its last turn has ended, in whatever order they come."""
    token_ids, rows, block_numbers = [[] for _ in prompts], [[] for _ in prompts], defaultdict(count)
    for index, turn, block in task.decode(prompts, token_ids, gamma=task.spec.gamma, slots=slots):
        prompt = prompts[index]
        where = {"prompt_id": prompt.prompt_id, "category": prompt.category, "turn": turn}
        numbers = {"prompt_tokens": len(token_ids[index][turn]), "block": next(block_numbers[index, turn])}
        rows[index].append({**where, **numbers, **_block_row(block)})
        if block.stop and turn == len(prompt.turns) - 1:
            save(FinishedPrompt(prompt.prompt_id, token_ids[index], rows[index]))


def _block_row(block: Block) -> dict:
    return {
        "start": block.start,
        "weight": 1.0,
        "proposed_ids": block.proposed,
        "emitted_ids": block.emitted,
        "accepted": block.accepted,
        "kept": block.kept,
        "beta": block.beta,
        "margin": block.margin,
        "stop": block.stop,
        "draft_time_s": block.draft_time_s,
        "verify_time_s": block.verify_time_s,
    }
