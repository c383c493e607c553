"""Plain decoding, one token a pass: the oracle that speculative decoding must reproduce."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from .request import Request, extended
from .sampling import TOKEN, Draws, SamplingConfig, draw, warp
from .scoring import CachedScorer, CacheFreeScorer, Model, Scorer


def generate_autoregressive(
    model: Model,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The sequence (1, T + new), prompt included, that `model` alone decodes from `input_ids` (1, T).

    It ends with the first of the EOS ids or after `max_new_tokens`. A model with `new_kv_cache` is decoded
    with its cache, any other callable from scratch for every token, to the same bits. `generator` gives one
    key for the call; without it the key is 0. Global random state is not touched. Raises ValueError naming
    argument, value and what is allowed.
    """
    sampling = SamplingConfig(do_sample, temperature, top_k, top_p)
    request = Request.from_arguments(input_ids, max_new_tokens, sampling, eos_token_id, generator)
    capacity = len(request.prompt_ids) + max_new_tokens
    cached = hasattr(model, "new_kv_cache")
    scorer = CachedScorer(model, capacity) if cached else CacheFreeScorer(model)
    return extended(input_ids, list(decode_tokens(scorer, **vars(request))))


def decode_tokens(
    scorer: Scorer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_token_ids: frozenset[int],
    draws: Draws,
) -> Iterator[int]:
    """Yields the new tokens one by one, the EOS that ends them included."""
    *before, token = prompt_ids
    scorer.prefill(0, before)
    for position in range(len(prompt_ids), len(prompt_ids) + max_new_tokens):
        logits = scorer.feed(torch.tensor([[token]]), 1)[0, 0]
        token = draw(warp(logits.cpu().numpy(), sampling), draws.uniform(position, TOKEN))
        yield token
        if token in eos_token_ids:
            return
