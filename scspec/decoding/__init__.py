"""Decoding: plain and speculative, greedy and sampled, with a KV cache and without.

    request.py         the arguments of a call, checked before any work
    cache.py           KVCache: how many tokens are held; rollback is assigning a smaller length
    scoring.py         a token sequence -> logits, with the cache or without it, bit-identical
    sampling.py        logits -> distributions, overlap, accept, residual, counter-based random numbers
    autoregressive.py  one token a pass: the oracle
    speculative.py     draft, verify, emit: one `Block` a target pass

Everything works on one prompt; a batch is several prompts decoded one by one. What a model must offer is in
docs/architecture.md ("Seam 1"), what a block is in "Seam 2". Not here: where models come from and how their
matmuls are done (this package imports neither `scspec.sc` nor transformers).
"""

from .autoregressive import decode_tokens, generate_autoregressive
from .cache import KVCache
from .request import Request
from .sampling import Draws, SamplingConfig, key_from
from .scoring import CachedScorer, CacheFreeScorer
from .speculative import Block, SpecDecodeStats, decode_blocks, generate, generate_cached

__all__ = [
    "Block",
    "CacheFreeScorer",
    "CachedScorer",
    "Draws",
    "KVCache",
    "Request",
    "SamplingConfig",
    "SpecDecodeStats",
    "decode_blocks",
    "decode_tokens",
    "generate",
    "generate_autoregressive",
    "generate_cached",
    "key_from",
]
