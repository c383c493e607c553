"""What is checked of a job before a model is loaded: its files, its devices, and the tokens of its prompts."""

from typing import Any

import torch
from jinja2 import TemplateError

from scspec.jobs import Cell, Side, Trajectory
from scspec.models import context_limit, vocabulary_size
from scspec.placement import check_placement
from scspec.prompt_rows import Prompt
from scspec.prompts import load_prompts, turn_ids
from scspec.provenance import sha256_of_setting


def check_planned(path: str, sha256: str | None, setting: str, job: str) -> None:
    """Raise ValueError if the file that a setting names is not the one that a job was planned with.

    Raises FileNotFoundError if it cannot be read.
    """
    if (found := sha256_of_setting(path, setting)) != sha256:
        raise ValueError(f"{setting} {path}: its SHA-256 is {found}, the {job} was planned with {sha256}")


def checked_prompts(spec: Cell | Trajectory) -> list[Prompt]:
    """Return the job's prompts, of the file that it was planned with. Raises ValueError as `load_prompts` does."""
    check_planned(spec.prompt_file, spec.prompt_sha256, "prompt_file", "cell")
    return load_prompts(spec.prompt_file)[: spec.prompt_limit]


def check_gpus(spec: Cell | Trajectory, gpus: int) -> None:
    """Raise ValueError unless the job's device, dtype and backend go together and `gpus` of that device are here."""
    check_placement(spec.device, getattr(torch, spec.dtype), spec.backend)
    here = torch.cuda.device_count() if spec.device == "cuda" else 1
    if not 1 <= gpus <= here:
        raise ValueError(f"gpus={gpus}: allowed are 1..{here} with device {spec.device!r} here")
    check_placement(devices(spec, gpus), getattr(torch, spec.dtype), spec.backend)


def devices(spec: Cell | Trajectory, gpus: int) -> str | list[str]:
    """Return where a model of the job goes: its device, or the first `gpus` GPUs."""
    return spec.device if gpus == 1 else [f"cuda:{index}" for index in range(gpus)]


def checked_first_turns(
    spec: Cell | Trajectory, sides: dict[str, Side], prompts: list[Prompt], tokenizer: Any, beyond: int
) -> list[list[int]]:
    """Return what the first turn of each prompt starts from.

    Raises ValueError naming the prompt for token ids that the models do not know, and for a turn that needs more
    positions than they have even if all replies before it are empty.
    """
    limit, known = min(context_limit(side.model) for side in sides.values()), vocabulary_size(spec.target.model)
    first_turns = []
    for prompt in prompts:
        turns = unanswered_turns(tokenizer, prompt)
        for turn, ids in enumerate(turns):
            if (largest := max(ids)) >= known:
                raise ValueError(f"{named(prompt, turn)}: token id {largest}; the models know 0..{known - 1}")
            check_length(named(prompt, turn), len(ids), prompt.budget(spec.max_new_tokens), beyond, limit)
        first_turns.append(turns[0])
    return first_turns


def unanswered_turns(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    """Return what each turn of a prompt starts from if all replies before it are empty."""
    return [named_turn_ids(tokenizer, prompt, [""] * turn) for turn in range(len(prompt.turns))]


def named_turn_ids(tokenizer: Any, prompt: Prompt, replies: list[str]) -> list[int]:
    """Return `turn_ids`. Raises ValueError naming the prompt if the tokenizer or its chat template refuses it."""
    try:
        return turn_ids(tokenizer, prompt, replies)
    except (TemplateError, ValueError) as error:  # templates of models without system messages raise the former
        raise ValueError(f"{named(prompt, len(replies))}: {error}") from error


def named(prompt: Prompt, turn: int) -> str:
    """Return what errors call a turn of a prompt."""
    return f"prompt {prompt.prompt_id!r}, turn {turn}"


def check_length(where: str, tokens: int, budget: int, beyond: int, limit: int) -> None:
    """Raise ValueError naming `where` if the models have fewer positions, `limit`, than a text needs.

    tokens: it starts from; budget: new ones; beyond: of its last block, past the budget.
    """
    needed = tokens + budget + beyond
    if needed > limit:
        raise ValueError(
            f"{where}: {tokens} tokens, {budget} new ones and a block need {needed} positions; the models have {limit}"
        )
