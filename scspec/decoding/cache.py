"""The bookkeeping of a key/value cache. Its contents belong to the model that made it."""

import operator


class KVCache:
    """Per-layer stores written by absolute position, and how many positions of them are valid.

    `layers` is a list of whatever the model keeps per layer. `length` starts at 0. A forward writes its rows
    at positions `length ...` and then calls `advance`; rollback is `cache.length = n`, and what lies beyond
    `n` is simply written over later.
    """

    def __init__(self, batch: int, capacity: int, layers: list):
        self.batch = batch
        self.capacity = capacity
        self.layers = layers
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held, 0..capacity."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        length = operator.index(length)
        if not 0 <= length <= self.capacity:
            raise ValueError(f"length is {length}; allowed: 0..{self.capacity} (the capacity)")
        self._length = length

    def advance(self, n: int) -> None:
        """Count `n` tokens more as held. Raises ValueError, and changes nothing, when they do not fit."""
        if self._length + n > self.capacity:
            raise ValueError(f"KV cache full: length {self._length} + n {n} > capacity {self.capacity}")
        self.length = self._length + n
