"""`run_cell`: one cell of the grid as a loop of draft and target, from its settings to its Parquet file."""

import json
from pathlib import Path
from typing import Any

from scspec.config import LOOP
from scspec.decoding import Block
from scspec.jobs import Cell
from scspec.prompt_rows import Prompt
from scspec.results import write_cell
from scspec.task import Save, Task


def run_cell(cell: Cell, output: Path, *, threads: int = 1, prompts_per_batch: int = 1, gpus: int = 1) -> None:
    """Decode the cell's prompts and write its Parquet file (docs/results.md) to `output`.

    Everything cheap is checked before a model is loaded: ValueError names what is wrong. `prompts_per_batch` prompts
    are decoded side by side, and each model's layers lie on the first `gpus` GPUs; neither these nor `threads` change a
    result, wall times apart. Each finished prompt is saved, and what earlier runs of the same settings, sources and
    device have saved is not decoded again (`checkpoint`). Progress goes to stderr. Sets the process's thread counts.
    """
    if cell.method != LOOP:
        raise ValueError(f"method={cell.method!r} of cell {cell.id}: a loop runs cells of method 'loop' alone")
    sides = {"target": cell.target, "draft": cell.draft}
    task = Task.load(cell, sides, output, beyond=cell.gamma + 1, threads=threads, gpus=gpus)
    metadata = {"cell": json.loads(cell.to_json()), **task.metadata()}
    keys = key_columns(cell, metadata)

    def decode(prompts: list[Prompt], save: Save) -> None:
        task.decode(prompts, save, _block_rows, gamma=cell.gamma, slots=prompts_per_batch)

    def write(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
        write_cell(output, [{**keys, **row} for row in rows], metadata)

    task.complete(metadata, decode, write)


def key_columns(cell: Cell, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that are the same in every row of a cell; the sides' settings are the metadata's."""
    keys: dict[str, Any] = {
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


def _block_rows(prompt_ids: list[int], blocks: list[Block]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_tokens": len(prompt_ids),
            "block": number,
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
        for number, block in enumerate(blocks)
    ]
