"""`run_cell`: one cell of the grid, from its settings to its Parquet file. The only place where the parts meet."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

import numba
import torch
from tqdm import tqdm

from scspec import provenance
from scspec.cells import Cell, Side
from scspec.decoding import Block, CachedScorer, Conversation, Draws, SamplingConfig, Turn, decode_batch, key_from
from scspec.hardware import sc_mac_share
from scspec.models import check_placement, check_vocabularies, context_limit, fetch_model, load_model, load_tokenizer
from scspec.patching import knobs_of
from scspec.prompts import Prompt, encode_turn, file_sha256, load_prompts, token_ids_sha256
from scspec.results import write_cell
from scspec.sc.knobs import PRESETS, resolve_knobs

#: Blocks decoded before the first that counts, in each slot, if all their proposals are accepted; else more.
WARM_UP_BLOCKS = 4


def run_cell(cell: Cell, output: Path, *, threads: int = 1, prompts_per_batch: int = 1, gpus: int = 1) -> None:
    """Decode the cell's prompts and write its Parquet file (docs/architecture.md, "Seam 3") to `output`.

    Everything cheap is checked before a model is loaded: ValueError names what is wrong. `prompts_per_batch` prompts
    are decoded side by side, and each model's layers lie on the first `gpus` GPUs; neither these nor `threads` change a
    result, wall times apart. Progress goes to stderr. Sets the process's thread counts.
    """
    started_at, began_s = datetime.now(UTC), time.perf_counter()
    prompts = _checked_prompts(cell)
    _check_cell(cell, gpus)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    tokenizer = load_tokenizer(cell.target.model)
    limit = min(context_limit(side.model) for side in (cell.target, cell.draft))
    for prompt in prompts:  # a later turn's length is known when the turns before it are decoded
        _check_length(cell, prompt, 0, len(encode_turn(tokenizer, [], prompt.turns[0])), limit)
    run = _Run(cell, prompts, tokenizer, *_load(cell, gpus), prompts_per_batch)
    provenance_of_run = run.metadata()  # before the expensive part: what cannot be said must not lose results
    rows = run.rows()
    metadata = {
        **provenance_of_run,
        "prompts": run.prompt_metadata(),
        "started_at": started_at.isoformat(timespec="seconds"),
        "wall_time_s": time.perf_counter() - began_s,
    }
    write_cell(output, rows, metadata)


def _checked_prompts(cell: Cell) -> list[Prompt]:
    found = file_sha256(cell.prompt_file)
    if found != cell.prompt_sha256:
        raise ValueError(
            f"prompt_file {cell.prompt_file}: its SHA-256 is {found}, the cell was planned with {cell.prompt_sha256}"
        )
    return load_prompts(cell.prompt_file)[: cell.prompt_limit]


def _check_cell(cell: Cell, gpus: int) -> None:
    check_placement(cell.device, getattr(torch, cell.dtype), cell.backend)
    here = torch.cuda.device_count() if cell.device == "cuda" else 1
    if not 1 <= gpus <= here:
        raise ValueError(f"gpus={gpus}: allowed are 1..{here} with device {cell.device!r} here")
    check_placement(_devices(cell, gpus), getattr(torch, cell.dtype), cell.backend)
    for side in (cell.target, cell.draft):
        resolve_knobs(_overrides(side))
    check_vocabularies(cell.target.model, cell.draft.model)


def _devices(cell: Cell, gpus: int) -> str | list[str]:
    return cell.device if gpus == 1 else [f"cuda:{index}" for index in range(gpus)]


def _check_length(cell: Cell, prompt: Prompt, turn: int, tokens: int, limit: int) -> None:
    """Raise ValueError if the models have fewer positions than the turn needs."""
    needed = tokens + cell.max_new_tokens + cell.gamma + 1
    if needed > limit:
        raise ValueError(
            f"prompt {prompt.prompt_id!r}, turn {turn}: {tokens} tokens, {cell.max_new_tokens} new ones and a block "
            f"need {needed} positions; the models have {limit}"
        )


def _overrides(side: Side) -> dict:
    return PRESETS["float"] if side.sc is None else side.sc


def _load(cell: Cell, gpus: int) -> list:
    """Return target and draft, each spread over as many GPUs."""
    where = {"device": _devices(cell, gpus), "dtype": getattr(torch, cell.dtype), "backend": cell.backend}
    return [
        load_model(side.model, sc_overrides=_overrides(side), skip_layers=side.skip_layers, **where)
        for side in (cell.target, cell.draft)
    ]


class _Run:
    """The loaded models of a cell and what comes of decoding its prompts."""

    def __init__(self, cell: Cell, prompts: list[Prompt], tokenizer, target, draft, prompts_per_batch: int):
        self.cell, self.prompts, self.tokenizer = cell, prompts, tokenizer
        self.target, self.draft = target, draft
        self.prompts_per_batch = prompts_per_batch
        self.limit = min(model.config.max_position_embeddings for model in (target, draft))
        self.sampling = SamplingConfig(**vars(cell.sampling))
        self.eos_token_ids = _eos_token_ids(target, tokenizer)
        self.prompt_ids: list[list[list[int]]] = [[] for _ in prompts]  # by prompt and turn

    def rows(self) -> list[dict]:
        """Return one row of the Parquet schema per block, by prompt, turn and block, in whatever order they come."""
        keys, rows, block_numbers = self._keys(), [[] for _ in self.prompts], defaultdict(count)
        total = sum(len(prompt.turns) for prompt in self.prompts) * self.cell.max_new_tokens
        with tqdm(total=total, unit="tok", desc=self.cell.id, file=sys.stderr, mininterval=1) as progress:
            for index, turn, block in self._blocks():
                prompt, tokens = self.prompts[index], len(self.prompt_ids[index][turn])
                where = {"prompt_id": prompt.prompt_id, "category": prompt.category, "turn": turn}
                numbers = {"prompt_tokens": tokens, "block": next(block_numbers[index, turn])}
                rows[index].append({**keys, **where, **numbers, **_block_row(block)})
                left = self.cell.max_new_tokens - (block.start - tokens)
                progress.update(left if block.stop else block.kept)
        return list(chain.from_iterable(rows))

    def _blocks(self) -> Iterator[tuple[int, int, Block]]:
        slots, capacity = min(self.prompts_per_batch, len(self.prompts)), self._capacity()
        scorers = CachedScorer(self.target, capacity, slots), CachedScorer(self.draft, capacity, slots)
        options = {"gamma": self.cell.gamma, "sampling": self.sampling}
        for _ in decode_batch(*scorers, self._warm_up(slots), **options, eos_token_ids=frozenset()):
            pass
        conversations = [self._conversation(*each) for each in zip(self.prompts, self.prompt_ids, strict=True)]
        return decode_batch(*scorers, conversations, **options, eos_token_ids=self.eos_token_ids)

    def _warm_up(self, slots: int) -> list[Conversation]:
        """Return conversations whose blocks nobody counts: what is compiled or captured there is in no block's time."""
        ids = encode_turn(self.tokenizer, [], self.prompts[0].turns[0])
        budget = min(WARM_UP_BLOCKS * (self.cell.gamma + 1), self.cell.max_new_tokens)
        return [(turn for turn in [Turn(ids, budget, Draws(0))]) for _ in range(slots)]

    def _conversation(self, prompt: Prompt, prompt_ids: list[list[int]]) -> Conversation:
        """Yield the prompt's turns, each after the reply to the one before, and append their ids to `prompt_ids`."""
        cell, history = self.cell, []
        for turn, text in enumerate(prompt.turns):
            ids = encode_turn(self.tokenizer, history, text)
            _check_length(cell, prompt, turn, len(ids), self.limit)
            prompt_ids.append(ids)
            draws = Draws(key_from(cell.sampling_seed, prompt.prompt_id, turn))
            new_ids = yield Turn(ids, cell.max_new_tokens, draws)
            reply = self.tokenizer.decode(new_ids, skip_special_tokens=True)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def _capacity(self) -> int:
        """Return the positions that the longest prompt is likely to need; replies may encode to more tokens again."""
        cell = self.cell
        asked = [[len(encode_turn(self.tokenizer, [], text)) for text in prompt.turns] for prompt in self.prompts]
        likely = max(sum(turns) + len(turns) * cell.max_new_tokens for turns in asked) + cell.gamma
        return min(likely, self.limit)

    def _keys(self) -> dict:
        cell = self.cell
        keys = {
            "cell_id": cell.id,
            "pair": cell.pair,
            "arm": cell.arm,
            "stoc_len": cell.stoc_len or None,
            "sc_prec": cell.sc_prec or None,
            "gamma": cell.gamma,
            "sampling_seed": cell.sampling_seed,
            "sc_seed": cell.sc_seed,
            "device": cell.device,
            "backend": cell.backend,
            "do_sample": cell.sampling.do_sample,
        }
        for name, side, model in (("target", cell.target, self.target), ("draft", cell.draft, self.draft)):
            knobs = side.sc or {}
            keys[f"{name}_model"] = side.model
            for knob in ("sc_prec", "sc_seed"):
                keys[f"{name}_{knob}"] = knobs.get(knob)
            keys[f"{name}_stoc_len"] = knobs.get("sc_stoc_len")
            settings = {**knobs_of(model), "skip_layers": list(side.skip_layers)}
            keys[f"{name}_settings"] = json.dumps(settings, sort_keys=True)
        return keys

    def metadata(self) -> dict:
        """Return the file's metadata, without its prompts and times."""
        cell = self.cell
        sides = {"target": (cell.target, self.target), "draft": (cell.draft, self.draft)}
        models = {name: fetch_model(side.model) for name, (side, _) in sides.items()}
        commit, dirty = provenance.commit()
        return {
            "cell": json.loads(cell.to_json()),
            "versions": provenance.versions(),
            "commit": commit,
            "dirty": dirty,
            "models": models,
            "device": f"{cell.device}: {provenance.device_name(cell.device)}",
            "backend": cell.backend,
            "sc_mac_share": {name: sc_mac_share(model.config) for name, (_, model) in sides.items()},
            "weights_note": {name: manifest["note"] for name, manifest in models.items()},
        }

    def prompt_metadata(self) -> dict:
        """Return which prompts were decoded; after `rows` has run (a later turn's ids hold earlier replies)."""
        return {
            "file": self.cell.prompt_file,
            "sha256": self.cell.prompt_sha256,
            "count": len(self.prompts),
            "token_ids_sha256": token_ids_sha256(list(chain.from_iterable(self.prompt_ids))),
        }


def _block_row(block: Block) -> dict:
    return {
        "start": block.start,
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


def _eos_token_ids(model, tokenizer) -> frozenset[int]:
    """Return every id that ends a text: the generation config's (one or several) and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
