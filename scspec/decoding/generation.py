"""Speculative text of one prompt in one call, with a KV cache or without, and what its blocks add up to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .request import Request, check_at_least_one, extended
from .sampling import SamplingConfig
from .scoring import CachedScorer, CacheFreeScorer, Model, Scorer
from .speculative import Block, check_widths, decode_blocks


@dataclass(frozen=True)
class SpecDecodeStats:
    """What the blocks of one prompt add up to; `blocks` hold the per-position data."""

    blocks: tuple[Block, ...]

    @property
    def steps(self) -> int:
        """Target passes."""
        return len(self.blocks)

    @property
    def proposed(self) -> int:
        """Tokens the draft proposed: gamma a block."""
        return sum(len(block.proposed) for block in self.blocks)

    @property
    def accepted(self) -> int:
        """Proposals that verification accepted, whatever EOS or the budget cut off later."""
        return sum(self.accepted_per_step)

    @property
    def new_tokens(self) -> int:
        """Tokens of the text, after the cuts."""
        return sum(block.kept for block in self.blocks)

    @property
    def accepted_per_step(self) -> list[int]:
        """Accepted proposals of each block, 0..gamma: the correction or bonus is not among them."""
        return [block.accepted for block in self.blocks]

    @property
    def acceptance_rate(self) -> float:
        """accepted / proposed. Falls with gamma by construction: never compare it across gamma."""
        return self.accepted / self.proposed

    @property
    def mean_accepted_per_step(self) -> float:
        """accepted / steps."""
        return self.accepted / self.steps

    @property
    def alpha(self) -> float:
        """Mean beta over every emitted position, the bonus positions included."""
        betas = [value for block in self.blocks for value in block.beta]
        return sum(betas) / len(betas)

    @property
    def tau(self) -> float:
        """Block efficiency: emitted tokens per target pass, see `block_efficiency`."""
        return block_efficiency(self.blocks)


def block_efficiency(blocks: Sequence[Block]) -> float:
    """tau = 1 + sum over i = 1..gamma of prod over j <= i of alpha_j.

    alpha_i is the share of blocks whose i-th proposal was accepted among those at risk, which emitted i
    tokens or more: so an EOS that cuts a block does not count as a rejection. A level nobody reached
    contributes zero. The definition is the one of `scspec.stats.tau`, which estimates it over tables.
    """
    tau = survival = 1.0
    for i in range(1, len(blocks[0].proposed) + 1):
        at_risk = [block for block in blocks if len(block.emitted) >= i]
        if not at_risk:
            break
        survival *= sum(block.accepted >= i for block in at_risk) / len(at_risk)
        tau += survival
    return tau


def generate_cached(
    target: Model,
    draft: Model,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    gamma: int = 4,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, SpecDecodeStats]:
    """The sequence (1, T + new), prompt included, decoded speculatively from `input_ids` (1, T), and statistics.

    Both models offer `new_kv_cache` (docs/architecture.md, "Seam 1"); they may be the same object. The text
    ends with the first of the EOS ids or after `max_new_tokens` exactly. `generator` gives one key for the
    call; without it the key is 0. Global random state is not touched. Raises ValueError naming argument,
    value and what is allowed, before any forward wherever the models tell their vocabulary.
    """
    sampling = SamplingConfig(do_sample, temperature, top_k, top_p)
    _check_speculation(target, draft, gamma)
    request = Request.from_arguments(input_ids, max_new_tokens, sampling, eos_token_id, generator)
    capacity = len(request.prompt_ids) + max_new_tokens + gamma + 1
    return _generate(CachedScorer(target, capacity), CachedScorer(draft, capacity), input_ids, gamma, request)


def generate(
    target: Model,
    draft: Model,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    gamma: int = 4,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, SpecDecodeStats]:
    """What `generate_cached` returns, to the same bits, without a cache: every pass runs the whole sequence.

    Target and draft are any callables with `model(input_ids=(1, T) int64).logits` of shape (1, T, V).
    """
    sampling = SamplingConfig(do_sample, temperature, top_k, top_p)
    _check_speculation(target, draft, gamma)
    request = Request.from_arguments(input_ids, max_new_tokens, sampling, eos_token_id, generator)
    return _generate(CacheFreeScorer(target), CacheFreeScorer(draft), input_ids, gamma, request)


def _generate(
    target_scorer: Scorer, draft_scorer: Scorer, input_ids: torch.Tensor, gamma: int, request: Request
) -> tuple[torch.Tensor, SpecDecodeStats]:
    blocks = tuple(decode_blocks(target_scorer, draft_scorer, gamma=gamma, **vars(request)))
    new_ids = [token for block in blocks for token in block.emitted[: block.kept]]
    return extended(input_ids, new_ids), SpecDecodeStats(blocks)


def _check_speculation(target: Model, draft: Model, gamma: int) -> None:
    check_at_least_one("gamma", gamma)
    sizes: list[Any] = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (target, draft)]
    if None not in sizes:
        check_widths(*sizes)
