"""`run_cell`: one cell of the grid, from its settings to its Parquet file. The only place where the parts meet."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numba
import torch
from tqdm import tqdm

from scspec import provenance
from scspec.cells import Cell, Side
from scspec.checkpoint import Checkpoint, FinishedPrompt
from scspec.decoding import Block, CachedScorer, Conversation, Draws, SamplingConfig, Turn, decode_batch, key_from
from scspec.hardware import sc_mac_share
from scspec.models import check_placement, check_vocabularies, context_limit, fetch_model, load_model, load_tokenizer
from scspec.patching import knobs_of
from scspec.prompts import Prompt, encode_turn, file_sha256, load_prompts, token_ids_sha256
from scspec.results import LOOP, SCHEMA_VERSION, write_cell
from scspec.sc.knobs import PRESETS, resolve_knobs

#: Blocks decoded before the first that counts, in each slot, if all their proposals are accepted; else more.
WARM_UP_BLOCKS = 4


def run_cell(cell: Cell, output: Path, *, threads: int = 1, prompts_per_batch: int = 1, gpus: int = 1) -> None:
    """Decode the cell's prompts and write its Parquet file (docs/architecture.md, "Seam 3") to `output`.

    Everything cheap is checked before a model is loaded: ValueError names what is wrong. `prompts_per_batch` prompts
    are decoded side by side, and each model's layers lie on the first `gpus` GPUs; neither these nor `threads` change a
    result, wall times apart. Each finished prompt is saved, and what earlier runs of the same settings, sources and
    device have saved is not decoded again (`checkpoint`). Progress goes to stderr. Sets the process's thread counts.
    """
    checkpoint = Checkpoint(output)
    prompts = _checked_prompts(cell)
    _check_cell(cell, gpus)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    tokenizer = load_tokenizer(cell.target.model)
    first_turns = _first_turns(cell, prompts, tokenizer)
    run = _Run(cell, tokenizer, *_load(cell, gpus), prompts_per_batch)
    metadata = run.metadata()  # before the expensive part: what cannot be said must not lose results
    checkpoint.resume(_key(metadata, first_turns))
    run.decode([prompt for prompt in prompts if prompt.prompt_id not in checkpoint.finished], checkpoint.save)
    finished = [checkpoint.finished[prompt.prompt_id] for prompt in prompts]
    attempts = checkpoint.attempts()
    times = {
        "started_at": attempts[0]["started_at"],
        "wall_time_s": sum(attempt["wall_time_s"] for attempt in attempts),
        "attempts": attempts,
    }
    write_cell(output, run.rows(finished), {**metadata, "prompts": _prompt_metadata(cell, finished), **times})
    checkpoint.remove()


def _key(metadata: dict, first_turns: list[list[int]]) -> dict:
    """Return all that could change a result. `dirty` is not part of it: the sources are, and not a config.yaml."""
    return {
        **{name: value for name, value in metadata.items() if name != "dirty"},
        "schema_version": SCHEMA_VERSION,
        "sources": provenance.sources_sha256(),
        "first_turns": token_ids_sha256(first_turns),
    }


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


def _first_turns(cell: Cell, prompts: list[Prompt], tokenizer) -> list[list[int]]:
    """Return each prompt's ids at its first turn, checked; a later turn's are known when those before are decoded."""
    limit = min(context_limit(side.model) for side in (cell.target, cell.draft))
    first_turns = [encode_turn(tokenizer, [], prompt.turns[0]) for prompt in prompts]
    for prompt, ids in zip(prompts, first_turns, strict=True):
        _check_length(cell, prompt, 0, len(ids), limit)
    return first_turns


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
    """The loaded models of a cell and what comes of decoding prompts."""

    def __init__(self, cell: Cell, tokenizer, target, draft, prompts_per_batch: int):
        self.cell, self.tokenizer = cell, tokenizer
        self.target, self.draft = target, draft
        self.prompts_per_batch = prompts_per_batch
        self.limit = min(model.config.max_position_embeddings for model in (target, draft))
        self.sampling = SamplingConfig(**vars(cell.sampling))
        self.eos_token_ids = _eos_token_ids(target, tokenizer)

    def decode(self, prompts: list[Prompt], save: Callable[[FinishedPrompt], None]) -> None:
        """Decode the prompts and hand each to `save` when its last turn has ended, in whatever order they come."""
        token_ids, rows, block_numbers = [[] for _ in prompts], [[] for _ in prompts], defaultdict(count)
        total = sum(len(prompt.turns) for prompt in prompts) * self.cell.max_new_tokens
        with tqdm(total=total, unit="tok", desc=self.cell.id, file=sys.stderr, mininterval=1) as progress:
            for index, turn, block in self._blocks(prompts, token_ids):
                prompt, tokens = prompts[index], len(token_ids[index][turn])
                where = {"prompt_id": prompt.prompt_id, "category": prompt.category, "turn": turn}
                numbers = {"prompt_tokens": tokens, "block": next(block_numbers[index, turn])}
                rows[index].append({**where, **numbers, **_block_row(block)})
                left = self.cell.max_new_tokens - (block.start - tokens)
                progress.update(left if block.stop else block.kept)
                if block.stop and turn == len(prompt.turns) - 1:
                    save(FinishedPrompt(prompt.prompt_id, token_ids[index], rows[index]))

    def rows(self, finished: list[FinishedPrompt]) -> list[dict]:
        """Return one row of the Parquet schema per block, by prompt, turn and block."""
        keys = self._keys()
        return [{**keys, **row} for prompt in finished for row in prompt.rows]

    def _blocks(self, prompts: list[Prompt], token_ids: list[list[list[int]]]) -> Iterator[tuple[int, int, Block]]:
        """Yield (index of the prompt, turn, block); each turn's ids are appended to its prompt's `token_ids`."""
        if not prompts:
            return
        slots, capacity = min(self.prompts_per_batch, len(prompts)), self._capacity(prompts)
        scorers = CachedScorer(self.target, capacity, slots), CachedScorer(self.draft, capacity, slots)
        options = {"gamma": self.cell.gamma, "sampling": self.sampling}
        for _ in decode_batch(*scorers, self._warm_up(prompts[0], slots), **options, eos_token_ids=frozenset()):
            pass
        conversations = [self._conversation(*each) for each in zip(prompts, token_ids, strict=True)]
        yield from decode_batch(*scorers, conversations, **options, eos_token_ids=self.eos_token_ids)

    def _warm_up(self, prompt: Prompt, slots: int) -> list[Conversation]:
        """Return conversations whose blocks nobody counts: what is compiled or captured there is in no block's time."""
        ids = encode_turn(self.tokenizer, [], prompt.turns[0])
        budget = min(WARM_UP_BLOCKS * (self.cell.gamma + 1), self.cell.max_new_tokens)
        return [(turn for turn in [Turn(ids, budget, Draws(0))]) for _ in range(slots)]

    def _conversation(self, prompt: Prompt, token_ids: list[list[int]]) -> Conversation:
        """Yield the prompt's turns, each after the reply to the one before, and append their ids to `token_ids`."""
        cell, history = self.cell, []
        for turn, text in enumerate(prompt.turns):
            ids = encode_turn(self.tokenizer, history, text)
            _check_length(cell, prompt, turn, len(ids), self.limit)
            token_ids.append(ids)
            draws = Draws(key_from(cell.sampling_seed, prompt.prompt_id, turn))
            new_ids = yield Turn(ids, cell.max_new_tokens, draws)
            reply = self.tokenizer.decode(new_ids, skip_special_tokens=True)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def _capacity(self, prompts: list[Prompt]) -> int:
        """Return the positions that the longest prompt is likely to need; replies may encode to more tokens again."""
        cell = self.cell
        asked = [[len(encode_turn(self.tokenizer, [], text)) for text in prompt.turns] for prompt in prompts]
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
            "method": LOOP,
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


def _prompt_metadata(cell: Cell, finished: list[FinishedPrompt]) -> dict:
    return {
        "file": cell.prompt_file,
        "sha256": cell.prompt_sha256,
        "count": len(finished),
        "token_ids_sha256": token_ids_sha256(ids for prompt in finished for ids in prompt.token_ids),
    }


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


def _eos_token_ids(model, tokenizer) -> frozenset[int]:
    """Return every id that ends a text: the generation config's (one or several) and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
