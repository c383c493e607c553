"""Decoding: plain and speculative, greedy and sampled, with a KV cache and without.

    request.py         the arguments of a call, checked before any work; Turn: one text to decode
    cache.py           KVCache: how many tokens each slot holds; rollback moves an integer
    scoring.py         tokens in, logits out, for the slots of a batch; with the cache or without it, bit-identical
    sampling.py        logits -> distributions, overlap, accept, residual, counter-based random numbers
    autoregressive.py  one token a pass: the oracle
    verification.py    a batch's logits -> proposals and what is accepted: greedy on the device, sampled on the host
    speculative.py     draft, verify, emit: one `Block` a target pass, for all texts of a batch
    generation.py      one prompt in one call

Prompts decode in a ragged batch, and what comes of one depends neither on the others nor on how many they are; one
prompt is a batch of one. What a model must offer is in docs/architecture.md ("Seam 1"), what a block is in "Seam 2".
Not here: where models come from and how their matmuls are done (this package imports neither `scspec.sc` nor
transformers).
"""

from .autoregressive import decode_tokens, generate_autoregressive
from .cache import KVCache
from .generation import SpecDecodeStats, generate, generate_cached
from .request import Request, Turn
from .sampling import Draws, SamplingConfig, key_from
from .scoring import CachedScorer, CacheFreeScorer
from .speculative import Block, Conversation, decode_batch, decode_blocks, one_turn
from .verification import greedy_ids

__all__ = [
    "Block",
    "CacheFreeScorer",
    "CachedScorer",
    "Conversation",
    "Draws",
    "KVCache",
    "Request",
    "SamplingConfig",
    "SpecDecodeStats",
    "Turn",
    "decode_batch",
    "decode_blocks",
    "decode_tokens",
    "generate",
    "generate_autoregressive",
    "generate_cached",
    "greedy_ids",
    "key_from",
    "one_turn",
]
