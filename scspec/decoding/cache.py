"""The bookkeeping of a key/value cache. Its contents belong to the model that made it."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


class KVCache:
    """Per-layer stores for `batch` sequences (slots), and how many positions of each slot are valid.

    `layers` is a list of whatever the model keeps per layer; each has `slot(b)`, the same store for slot b alone.
    Lengths start at 0. A forward writes row t of slot b at position `lengths[b] + t` and then calls `advance`; what
    lies beyond a length is simply written over later. `owner` is the model that made it, for that model to tell.
    """

    def __init__(self, batch: int, capacity: int, layers: Sequence[Any], owner: object = None):
        self.batch = batch
        self.capacity = capacity
        self.layers = layers
        self.owner = owner
        self._lengths = np.zeros(batch, np.int64)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held by each slot, 0..capacity; not to be assigned to: see `rollback`."""
        return tuple(self._lengths.tolist())

    def rollback(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of one slot. Raises ValueError for a length above the one held, or below 0."""
        length, held = operator.index(length), self.lengths[slot]
        if not 0 <= length <= held:
            raise ValueError(f"length is {length}; allowed: 0..{held} (the tokens that slot {slot} holds)")
        self._lengths[slot] = length

    def advance(self, n: int) -> None:
        """Count `n` tokens more as held by every slot. Raises ValueError, and changes nothing, when they do not fit."""
        fullest = max(self.lengths)
        if fullest + n > self.capacity:
            raise ValueError(f"KV cache full: length {fullest} + n {n} > capacity {self.capacity}")
        self._lengths += n

    def slot(self, slot: int) -> "KVCache":
        """The cache of one slot alone, batch 1: a view, so a forward over it writes here and advances this slot."""
        slot = range(self.batch)[slot]
        view = KVCache(1, self.capacity, [layer.slot(slot) for layer in self.layers], self.owner)
        view._lengths = self._lengths[slot : slot + 1]
        return view
