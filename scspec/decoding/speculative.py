"""Speculative decoding: a draft proposes gamma tokens, one target pass verifies them, a block is emitted.

Leviathan et al., 2023 (arXiv 2211.17192) and Chen et al., 2023 (arXiv 2302.01318); `p` is the target's
distribution, `q` the draft's. The emitted text has the target's distribution; greedy, it is the target's own
text.

The token at absolute position i takes its TOKEN draw wherever it comes from (proposal, plain sampling,
bonus). So a draft equal to its target emits exactly the text of plain sampling.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .request import Request, check_at_least_one, extended
from .sampling import COIN, RESIDUAL, TOKEN, Draws, SamplingConfig, accept, beta, draw, margin, residual, warp
from .scoring import CachedScorer, CacheFreeScorer, Scorer


@dataclass(frozen=True)
class Block:
    """One target pass, as docs/architecture.md defines it in "Seam 2"; `proposed` are the gamma token ids."""

    start: int
    proposed: tuple[int, ...]
    accepted: int
    emitted: tuple[int, ...]
    kept: int
    stop: str | None
    beta: tuple[float, ...]
    margin: tuple[float, ...]
    draft_time_s: float
    verify_time_s: float


def decode_blocks(
    target_scorer: Scorer,
    draft_scorer: Scorer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    gamma: int,
    sampling: SamplingConfig,
    eos_token_ids: frozenset[int],
    draws: Draws,
) -> Iterator[Block]:
    """Yields one Block per target pass until EOS or the budget.

    Whenever it yields, both scorers hold all tokens but the last one emitted. Raises ValueError at the first
    pass if target and draft have different vocabularies.
    """
    sequence = list(prompt_ids)
    end = len(sequence) + max_new_tokens
    for scorer in (target_scorer, draft_scorer):
        scorer.prefill(sequence[:-1])
    stop = None
    while stop is None:
        start = len(sequence)
        began_s = time.perf_counter()
        proposed, q = propose(draft_scorer, sequence, gamma, sampling, draws)
        drafted_s = time.perf_counter()
        logits = target_scorer.logits(sequence + proposed, gamma + 1)
        _check_widths(logits.shape[1], len(q[0]))
        p = [warp(row, sampling) for row in logits]
        accepted, emitted = verify(proposed, p, q, start, draws)
        verified_s = time.perf_counter()
        emitted = _until_eos(emitted, eos_token_ids)
        if len(emitted) > gamma:  # the bonus position has a beta too, and q there asks for the last proposal
            q.append(warp(draft_scorer.logits(sequence + proposed, 1)[0], sampling))
        ingested_s = time.perf_counter()
        kept = min(len(emitted), end - start)
        sequence += emitted
        if not eos_token_ids.isdisjoint(emitted[:kept]):
            stop = "eos"
        elif len(sequence) >= end:
            stop = "budget"
        for scorer in (target_scorer, draft_scorer):
            scorer.rollback(len(sequence) - 1)
        yield Block(
            start=start,
            proposed=tuple(proposed),
            accepted=accepted,
            emitted=tuple(emitted),
            kept=kept,
            stop=stop,
            beta=tuple(beta(p_i, q_i) for p_i, q_i, _ in zip(p, q, emitted, strict=False)),
            margin=tuple(margin(row) for row in logits[: len(emitted)]),
            draft_time_s=drafted_s - began_s + ingested_s - verified_s,
            verify_time_s=verified_s - drafted_s,
        )


def propose(
    scorer: Scorer, sequence: list[int], gamma: int, sampling: SamplingConfig, draws: Draws
) -> tuple[list[int], list[np.ndarray]]:
    """`gamma` tokens that continue `sequence`, and the draft distributions (V,) they were drawn from."""
    proposed, q = [], []
    for position in range(len(sequence), len(sequence) + gamma):
        q.append(warp(scorer.logits(sequence + proposed, 1)[0], sampling))
        proposed.append(draw(q[-1], draws.uniform(position, TOKEN)))
    return proposed, q


def verify(
    proposed: list[int], p: list[np.ndarray], q: list[np.ndarray], start: int, draws: Draws
) -> tuple[int, list[int]]:
    """How many leading proposals are accepted, and the tokens emitted: those and a correction or a bonus.

    `p` has gamma + 1 distributions (V,), `q` gamma; `start` is the position of the first proposal.
    """
    for i, token in enumerate(proposed):
        if not accept(p[i][token], q[i][token], draws.uniform(start + i, COIN)):
            correction = draw(residual(p[i], q[i]), draws.uniform(start + i, RESIDUAL))
            return i, [*proposed[:i], correction]
    bonus = draw(p[-1], draws.uniform(start + len(proposed), TOKEN))
    return len(proposed), [*proposed, bonus]


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
    target: Callable,
    draft: Callable,
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
    target: Callable,
    draft: Callable,
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


def _until_eos(emitted: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """`emitted` up to and including its first EOS."""
    for i, token in enumerate(emitted):
        if token in eos_token_ids:
            return emitted[: i + 1]
    return emitted


def _check_speculation(target: Callable, draft: Callable, gamma: int) -> None:
    check_at_least_one("gamma", gamma)
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (target, draft)]
    if None not in sizes:
        _check_widths(*sizes)


def _check_widths(target_size: int, draft_size: int) -> None:
    if target_size != draft_size:
        raise ValueError(f"draft has a vocabulary of {draft_size}; allowed: {target_size}, the target's")
