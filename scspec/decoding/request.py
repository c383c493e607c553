"""The arguments of a `generate*` call, checked and normalised before any work is done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .sampling import Draws, SamplingConfig, is_integer


@dataclass(frozen=True)
class Request:
    """What to decode and how: the same for every decoder."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig
    eos_token_ids: frozenset[int]
    draws: Draws

    @classmethod
    def from_arguments(
        cls,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        sampling: SamplingConfig,
        eos_token_id: int | Iterable[int] | None,
        generator: torch.Generator | None,
    ) -> "Request":
        """The checked request; takes one key from `generator`.

        `input_ids` is an integer tensor (1, T) with T >= 1. Raises ValueError naming argument, value and what
        is allowed.
        """
        check_at_least_one("max_new_tokens", max_new_tokens)
        prompt_ids = _prompt_ids(input_ids)
        eos_token_ids = _eos_token_ids(eos_token_id)
        return cls(prompt_ids, max_new_tokens, sampling, eos_token_ids, Draws(_key_of(generator)))


@dataclass(frozen=True)
class Turn:
    """One text to decode: what it starts from, and its own budget and draws. Raises ValueError without a token.

    `past_end` tokens more are decoded once the text has ended, and kept by nobody.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    draws: Draws
    past_end: int = 0

    def __post_init__(self) -> None:
        check_at_least_one("max_new_tokens", self.max_new_tokens)
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty; allowed: at least one token id")


def check_at_least_one(name: str, value: int) -> None:
    """Raises ValueError unless `value` is an integer >= 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")


def extended(input_ids: torch.Tensor, new_ids: list[int]) -> torch.Tensor:
    """`input_ids` (1, T) followed by `new_ids`, with its dtype and on its device."""
    return torch.cat([input_ids, input_ids.new_tensor([new_ids])], dim=1)


def _prompt_ids(input_ids: torch.Tensor) -> tuple[int, ...]:
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids is {type(input_ids).__name__}; allowed: an integer tensor (1, T)")
    dtype = input_ids.dtype
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"input_ids has dtype {dtype}; allowed: an integer dtype")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; allowed: (1, T) with T >= 1")
    return tuple(input_ids[0].tolist())


def _eos_token_ids(eos_token_id: int | Iterable[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    ids = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
    if not all(is_integer(i) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id is {eos_token_id!r}; allowed: None, an id >= 0, an iterable of them")
    return frozenset(int(i) for i in ids)


def _key_of(generator: torch.Generator | None) -> int:
    """One key drawn from `generator`; 0 without one, so that such a call is reproducible too."""
    if generator is None:
        return 0
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
