"""A token sequence -> the logits of its last positions. Two ways, one interface, equal bits by contract.

Both take a `model` as in docs/architecture.md, "Seam 1". Tokens go to `model.device` where the model has one,
else to the CPU; logits come back as numpy float32.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch


class CacheFreeScorer:
    """Scores a sequence by running all of it: the slow way that cannot be wrong about a cache.

    `model` is any callable with `model(input_ids=(1, T) int64).logits` of shape (1, T, V).
    """

    def __init__(self, model: Callable):
        self.model = model

    def prefill(self, tokens: Sequence[int]) -> None:
        """Nothing to prepare."""

    def rollback(self, length: int) -> None:
        """Nothing to forget."""

    def logits(self, sequence: Sequence[int], rows: int) -> np.ndarray:
        """The logits (rows, V) float32 at the last `rows` positions of `sequence`.

        Raises ValueError unless `rows` is in 1..len(sequence) and the model returns what it should.
        """
        _check_rows(sequence, rows)
        return _forward(self.model, sequence, len(sequence), rows)


class CachedScorer:
    """Scores a sequence by feeding the model only what its cache does not hold.

    The cache is known by its length alone: the caller keeps the first `cache.lengths[0]` tokens of every sequence
    it passes equal to those fed before, and says `rollback` when a tail of them was discarded.
    """

    def __init__(self, model: Callable, capacity: int):
        if not hasattr(model, "new_kv_cache"):
            raise ValueError(f"model is {type(model).__name__}; allowed: a model with new_kv_cache")
        self.model = model
        self.cache = model.new_kv_cache(1, capacity)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Start over with a cache that holds exactly `tokens` (may be empty)."""
        self.cache.rollback(0, 0)
        if tokens:
            self._feed(tokens, 1)

    def rollback(self, length: int) -> None:
        """Keep at most the first `length` tokens."""
        self.cache.rollback(0, min(self.cache.lengths[0], length))

    def logits(self, sequence: Sequence[int], rows: int) -> np.ndarray:
        """The logits (rows, V) float32 at the last `rows` positions of `sequence`.

        Positions whose logits are asked for are fed (again) even if the cache held them. Raises ValueError
        unless `rows` is in 1..len(sequence), the sequence fits the cache and the model returns what it should.
        """
        _check_rows(sequence, rows)
        self.rollback(len(sequence) - rows)
        return self._feed(sequence[self.cache.lengths[0] :], rows)

    def _feed(self, tokens: Sequence[int], rows: int) -> np.ndarray:
        expected = self.cache.lengths[0] + len(tokens)
        logits = _forward(self.model, tokens, rows, rows, kv_cache=self.cache, logits_to_keep=rows)
        if self.cache.lengths[0] != expected:
            raise ValueError(f"the forward left the cache at length {self.cache.lengths[0]}; expected {expected}")
        return logits


def _check_rows(sequence: Sequence[int], rows: int) -> None:
    if not 1 <= rows <= len(sequence):
        raise ValueError(f"rows is {rows}; allowed: 1..{len(sequence)} (the length of the sequence)")


def _forward(model: Callable, tokens: Sequence[int], returned: int, rows: int, **cache_arguments) -> np.ndarray:
    """The last `rows` logits (rows, V) float32 of one forward over `tokens`, which must return `returned`
    rows."""
    input_ids = torch.tensor([tokens], dtype=torch.int64, device=getattr(model, "device", "cpu"))
    with torch.no_grad():
        logits = model(input_ids=input_ids, **cache_arguments).logits
    if logits.ndim != 3 or logits.shape[:2] != (1, returned):
        raise ValueError(f"the model returned logits of shape {tuple(logits.shape)}; expected (1, {returned}, V)")
    return logits[0, -rows:].to("cpu", torch.float32).numpy()


Scorer = CachedScorer | CacheFreeScorer
