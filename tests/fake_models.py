"""A tiny language model without weights, for tests: its logits depend on every token so far.

The cached way reads that context back out of its cache. A cache that is not rolled back, rolled back too far
or written in the wrong place or slot therefore changes the logits, and the tests turn red. Logits are coarse
(multiples of 1/16), so argmax ties occur.
"""

import hashlib
from types import SimpleNamespace

import torch

from scspec.decoding import KVCache

POISON = -1


class TokenStore:
    """The one layer of a FakeLM's cache: the tokens themselves, int64 (batch, capacity)."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def slot(self, b: int) -> "TokenStore":
        return TokenStore(self.tokens[b : b + 1])


class FakeLM:
    """Models with the same `seed` agree up to `noise` times logits of their own. `vocab_size` is at most 64."""

    def __init__(self, vocab_size: int = 12, seed: int = 0, noise: float = 0.0, noise_seed: int = 0):
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.seed, self.noise, self.noise_seed = seed, noise, noise_seed
        self.fed = []  # how many tokens each forward was fed

    def new_kv_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(batch, capacity, [TokenStore(torch.full((batch, capacity), POISON))])

    def __call__(self, input_ids, kv_cache=None, logits_to_keep=0):
        batch, fed = input_ids.shape
        self.fed.append(fed)
        if kv_cache is None:
            past, context = (0,) * batch, input_ids
        else:
            past, context = kv_cache.lengths, kv_cache.layers[0].tokens
            kv_cache.advance(fed)
            for b, tokens in enumerate(input_ids):
                context[b, past[b] : past[b] + fed] = tokens
        kept = range(1, fed + 1)[-logits_to_keep:]
        rows = [[self._row(context[b, : past[b] + t].tolist()) for t in kept] for b in range(batch)]
        return SimpleNamespace(logits=torch.tensor(rows, dtype=torch.float32))

    def _row(self, context: list[int]) -> list[float]:
        shared, own = self._hash(context, self.seed), self._hash(context, 1000 + self.noise_seed)
        return [s / 16 + self.noise * o / 16 for s, o in zip(shared, own, strict=True)]

    def _hash(self, context: list[int], seed: int) -> list[int]:
        """`vocab_size` pseudo-random integers 0..63."""
        digest = hashlib.blake2b(repr((seed, context)).encode(), digest_size=self.config.vocab_size).digest()
        return [byte >> 2 for byte in digest]
