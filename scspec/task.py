"""What every job that runs models shares: models, prompts, checkpoint, metadata."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch
from tqdm import tqdm

from scspec import provenance
from scspec.checkpoint import Checkpoint, FinishedPrompt
from scspec.decoding import (
    Block,
    CachedScorer,
    Conversation,
    Draws,
    SamplingConfig,
    Turn,
    decode_batch,
    key_from,
    one_turn,
)
from scspec.hardware import cost_per_token, sc_mac_share
from scspec.jobs import Cell, Side, Trajectory
from scspec.models import check_vocabularies, fetch_model, load_model, load_tokenizer
from scspec.patching import knobs_of
from scspec.preflight import (
    check_gpus,
    check_length,
    checked_first_turns,
    checked_prompts,
    devices,
    named,
    named_turn_ids,
    unanswered_turns,
)
from scspec.prompt_rows import Prompt
from scspec.prompts import token_ids_sha256
from scspec.results import SCHEMA_VERSION
from scspec.sc.knobs import PRESETS, resolve_knobs

#: Blocks decoded before the first that counts, in each slot, if all their proposals are accepted; else more. A GPU
#: launches, captures and replays a shape before it is at its speed; a CPU compiles, once.
WARM_UP_BLOCKS = {"cpu": 1, "cuda": 4}
#: Tokens of the prompt before them, None for all: a GPU compiles for many rows what it does not run for few.
WARM_UP_TOKENS = {"cpu": 3, "cuda": None}

Save = Callable[[FinishedPrompt], None]
Write = Callable[[list[dict[str, Any]], dict[str, Any]], None]
#: (ids that a turn started from, its blocks) -> its rows, without what says which turn it is.
RowsOf = Callable[[list[int], list[Block]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """A job's models and prompts, ready to work.

    `spec` says which prompts, how they are sampled and on what; `models` has a model of each of its `sides`, by name
    ("target", "draft"). Texts may go on for `beyond` tokens past their budget. `gamma` is 0 without a draft.
    """

    spec: Cell | Trajectory
    sides: dict[str, Side]
    models: dict[str, Any]
    prompts: list[Prompt]
    first_turns: list[list[int]]
    tokenizer: Any
    beyond: int
    checkpoint: Checkpoint

    @classmethod
    def load(
        cls, spec: Cell | Trajectory, sides: dict[str, Side], output: Path, *, beyond: int, threads: int, gpus: int
    ) -> "Task":
        """Check everything cheap, then load the models, each spread over the first `gpus` GPUs.

        Raises ValueError that names what is wrong. Sets the process's thread counts.
        """
        checkpoint = Checkpoint(output)
        prompts = checked_prompts(spec)
        check_gpus(spec, gpus)
        for side in sides.values():
            resolve_knobs(_overrides(side))
            check_vocabularies(spec.target.model, side.model)
        torch.set_num_threads(threads)
        cores = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made when numba is imported
        numba.set_num_threads(min(threads, cores))
        tokenizer = load_tokenizer(spec.target.model)
        first_turns = checked_first_turns(spec, sides, prompts, tokenizer, beyond)
        models = {name: _load(spec, side, gpus) for name, side in sides.items()}
        return cls(spec, sides, models, prompts, first_turns, tokenizer, beyond, checkpoint)

    def metadata(self) -> dict[str, Any]:
        """Return what a file says of where it came from, without its prompts and times."""
        models = {name: fetch_model(side.model) for name, side in self.sides.items()}
        commit, dirty = provenance.commit()
        return {
            "versions": provenance.versions(),
            "commit": commit,
            "dirty": dirty,
            "sources": provenance.sources_sha256(),
            "models": models,
            "device": f"{self.spec.device}: {provenance.device_name(self.spec.device)}",
            "backend": self.spec.backend,
            "sc_mac_share": {name: sc_mac_share(model.config) for name, model in self.models.items()},
            "cost": {name: cost_per_token(model.config) for name, model in self.models.items()},
            "weights_note": {name: manifest["note"] for name, manifest in models.items()},
            "settings": {
                name: {**knobs_of(self.models[name]), "skip_layers": list(side.skip_layers)}
                for name, side in self.sides.items()
            },
        }

    @property
    def limit(self) -> int:
        """How many positions all of the models have."""
        limits: list[int] = [model.config.max_position_embeddings for model in self.models.values()]
        return min(limits)

    def complete(self, metadata: dict[str, Any], work: Callable[[list[Prompt], Save], None], write: Write) -> None:
        """Do the work and write the output; then nothing of it is kept for another run.

        `work` gets the prompts that no earlier run of the same settings, sources and device has finished, and saves
        each as it finishes (`checkpoint`). All that could change a result is in the metadata; `dirty` is left out
        of what earlier runs must share: the sources are in, and not a config.yaml. `write` gets the rows of all
        prompts, and the metadata with prompts and times.
        """
        checkpoint = self.checkpoint
        key = {name: value for name, value in metadata.items() if name != "dirty"}
        checkpoint.resume({**key, "schema_version": SCHEMA_VERSION, "first_turns": token_ids_sha256(self.first_turns)})
        work([prompt for prompt in self.prompts if prompt.prompt_id not in checkpoint.finished], checkpoint.save)
        finished = [checkpoint.finished[prompt.prompt_id] for prompt in self.prompts]
        attempts = checkpoint.attempts()
        prompts = {
            "file": self.spec.prompt_file,
            "sha256": self.spec.prompt_sha256,
            "count": len(finished),
            "token_ids_sha256": token_ids_sha256(ids for prompt in finished for ids in prompt.token_ids),
        }
        times = {
            "started_at": attempts[0]["started_at"],
            "wall_time_s": sum(attempt["wall_time_s"] for attempt in attempts),
            "attempts": attempts,
        }
        write([row for prompt in finished for row in prompt.rows], {**metadata, "prompts": prompts, **times})
        checkpoint.remove()

    def decode(
        self, prompts: list[Prompt], save: Save, rows_of: RowsOf, *, gamma: int, slots: int, past_end: int = 0
    ) -> None:
        """Decode the prompts and hand each to `save` when its last turn has ended, in whatever order they come.

        `slots` prompts are decoded side by side; gamma 0 is the target alone. `rows_of` makes the rows of a turn.
        Progress goes to stderr.
        """
        token_ids: list[list[list[int]]] = [[] for _ in prompts]
        rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
        blocks: list[list[Block]] = [[] for _ in prompts]
        for index, turn, block in self._blocks(prompts, token_ids, gamma=gamma, slots=slots, past_end=past_end):
            prompt = prompts[index]
            blocks[index].append(block)
            if not block.stop:
                continue
            where = {"prompt_id": prompt.prompt_id, "category": prompt.category, "turn": turn}
            rows[index] += [{**where, **row} for row in rows_of(token_ids[index][turn], blocks[index])]
            blocks[index].clear()
            if turn == len(prompt.turns) - 1:
                save(FinishedPrompt(prompt.prompt_id, token_ids[index], rows[index]))

    def _blocks(
        self, prompts: list[Prompt], token_ids: list[list[list[int]]], *, gamma: int, slots: int, past_end: int
    ) -> Iterator[tuple[int, int, Block]]:
        """Yield (index of the prompt, turn, block); each turn's ids are appended to its prompt's `token_ids`."""
        if not prompts:
            return
        slots, capacity = min(slots, len(prompts)), self._capacity(prompts)
        target = CachedScorer(self.models["target"], capacity, slots)
        draft = CachedScorer(self.models["draft"], capacity, slots) if gamma else None
        decoded = partial(decode_batch, target, draft, gamma=gamma, sampling=SamplingConfig(**vars(self.spec.sampling)))
        warm_up = self._warm_up(max(prompts, key=self._budget), slots, gamma)
        for _ in decoded(warm_up, eos_token_ids=frozenset()):
            pass
        conversations = [
            self._conversation(prompt, ids, past_end) for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
        blocks = decoded(conversations, eos_token_ids=self.eos_token_ids)
        total = sum(len(prompt.turns) * self._budget(prompt) for prompt in prompts)
        with tqdm(total=total, unit="tok", desc=self.spec.id, file=sys.stderr, mininterval=1) as progress:
            for index, turn, block in blocks:
                yield index, turn, block
                left = self._budget(prompts[index]) - (block.start - len(token_ids[index][turn]))
                progress.update(max(left, 0) if block.stop else block.kept)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a text."""
        return eos_token_ids(self.models["target"], self.tokenizer)

    def _warm_up(self, prompt: Prompt, slots: int, gamma: int) -> list[Conversation]:
        """Return conversations whose blocks nobody counts: what is compiled or captured there is in no block's time."""
        ids = named_turn_ids(self.tokenizer, prompt, [])
        warm_up = warm_up_turn(ids, self._budget(prompt), gamma, self.spec.device)
        return [one_turn(warm_up) for _ in range(slots)]

    def _conversation(self, prompt: Prompt, token_ids: list[list[int]], past_end: int) -> Conversation:
        """Yield the prompt's turns, each after the reply to the one before, and append their ids to `token_ids`."""
        replies: list[str] = []
        for turn in range(len(prompt.turns)):
            ids = named_turn_ids(self.tokenizer, prompt, replies)
            check_length(named(prompt, turn), len(ids), self._budget(prompt), self.beyond, self.limit)
            token_ids.append(ids)
            draws = Draws(key_from(self.spec.sampling_seed, prompt.prompt_id, turn))
            new_ids = yield Turn(ids, self._budget(prompt), draws, past_end)
            replies.append(self.tokenizer.decode(new_ids, skip_special_tokens=True))

    def _capacity(self, prompts: list[Prompt]) -> int:
        """Return the positions that the longest prompt is likely to need; replies may encode to more tokens again."""
        likely = max(
            len(unanswered_turns(self.tokenizer, prompt)[-1]) + len(prompt.turns) * self._budget(prompt)
            for prompt in prompts
        )
        return min(likely + self.beyond - 1, self.limit)

    def _budget(self, prompt: Prompt) -> int:
        return prompt.budget(self.spec.max_new_tokens)


def eos_token_ids(target: Any, tokenizer: Any) -> frozenset[int]:
    """Return every id that ends a text: the generation config's of the target (one or several) and the tokenizer's."""
    ids = target.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def warm_up_turn(ids: list[int], max_new_tokens: int, gamma: int, device: str) -> Turn:
    """Return a turn to decode before those that count, on "cpu" or "cuda"; `ids` and the budget are of one of these."""
    budget = min(WARM_UP_BLOCKS[device] * (gamma + 1), max_new_tokens)
    return Turn(ids[: WARM_UP_TOKENS[device]], budget, Draws(0))


def _overrides(side: Side) -> dict[str, Any]:
    return PRESETS["float"] if side.sc is None else side.sc


def _load(spec: Cell | Trajectory, side: Side, gpus: int) -> Any:
    where = {"device": devices(spec, gpus), "dtype": getattr(torch, spec.dtype), "backend": spec.backend}
    return load_model(side.model, sc_overrides=_overrides(side), skip_layers=side.skip_layers, **where)
