"""Tokens in, logits out, for the slots of a batch. Two ways, one interface, equal bits by contract.

A scorer holds one text in each of its `slots`. Both take a `model` as in docs/architecture.md, "Seam 1". Tokens go to
`device`, the model's where it has one, else the CPU; logits are float32 and stay where the model left them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .cache import KVCache


class Output(Protocol):
    """What a forward returns: logits (B, rows, V)."""

    logits: torch.Tensor


#: docs/architecture.md, "Seam 1"; only one with `new_kv_cache` decodes with a cache.
Model = Callable[..., Output]


class CacheFreeScorer:
    """Runs the whole text at every call: the slow way that cannot be wrong about a cache.

    `model` is any callable with `model(input_ids=(1, T) int64).logits` of shape (1, T, V).
    """

    def __init__(self, model: Model, slots: int = 1):
        self.model, self.slots, self.device = model, slots, _device(model)
        self.held = [_ids([], self.device)] * slots

    def reserve(self, capacity: int) -> bool:
        """False: there is always room, and nothing is ever lost."""
        return False

    def prefill(self, slot: int, tokens: Sequence[int]) -> None:
        """Start over in one slot, with exactly `tokens` held (may be empty)."""
        self.held[slot] = _ids(tokens, self.device)

    def rollback(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of one slot."""
        self.held[slot] = self.held[slot][:length]

    def feed(self, ids: torch.Tensor, rows: int) -> torch.Tensor:
        """The logits (slots, rows, V) of the last `rows` tokens fed; `ids` is int64 (slots, T), T new tokens a slot.

        Raises ValueError unless `rows` is in 1..T and the model returns what it should.
        """
        _check_rows(ids, rows)
        self.held = [torch.cat(pair) for pair in zip(self.held, ids.to(self.device), strict=True)]
        logits = [_forward(self.model, held[None], len(held)) for held in self.held]
        return torch.cat([each[:, -rows:] for each in logits])


class CachedScorer:
    """Feeds the model what is new; its cache of `slots` slots holds the rest. Raises ValueError for a model without."""

    def __init__(self, model: Model, capacity: int, slots: int = 1):
        if not hasattr(model, "new_kv_cache"):
            raise ValueError(f"model is {type(model).__name__}; allowed: a model with new_kv_cache")
        self.model, self.slots, self.device = model, slots, _device(model)
        self.cache = model.new_kv_cache(slots, capacity)

    def reserve(self, capacity: int) -> bool:
        """Whether room for `capacity` tokens a slot took a new cache: then no slot holds anything."""
        if capacity <= self.cache.capacity:
            return False
        self.cache = None  # its memory goes before the new one comes
        self.cache = self.model.new_kv_cache(self.slots, capacity)
        return True

    def prefill(self, slot: int, tokens: Sequence[int]) -> None:
        """Start over in one slot, with exactly `tokens` held (may be empty); the other slots notice nothing.

        Returns when the device has done it.
        """
        self.cache.rollback(slot, 0)
        if tokens:
            logits = self._feed(self.cache.slot(slot), _ids(tokens, self.device)[None], 1)
            logits[0, 0, 0].item()  # what is timed next must not wait for it; reading waits for every device on the way

    def rollback(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of one slot. Raises ValueError if it holds fewer."""
        self.cache.rollback(slot, length)

    def feed(self, ids: torch.Tensor, rows: int) -> torch.Tensor:
        """The logits (slots, rows, V) of the last `rows` tokens fed; `ids` is int64 (slots, T), T new tokens a slot.

        Raises ValueError unless `rows` is in 1..T, the tokens fit the cache and the model returns what it should.
        """
        _check_rows(ids, rows)
        return self._feed(self.cache, ids.to(self.device), rows)

    def _feed(self, cache: KVCache, ids: torch.Tensor, rows: int) -> torch.Tensor:
        expected = tuple(length + ids.shape[1] for length in cache.lengths)
        logits = _forward(self.model, ids, rows, kv_cache=cache, logits_to_keep=rows)
        if cache.lengths != expected:
            raise ValueError(f"the forward left the cache at lengths {cache.lengths}; expected {expected}")
        return logits


def _device(model: Model) -> torch.device:
    return torch.device(getattr(model, "device", "cpu"))


def _ids(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _check_rows(ids: torch.Tensor, rows: int) -> None:
    if not 1 <= rows <= ids.shape[1]:
        raise ValueError(f"rows is {rows}; allowed: 1..{ids.shape[1]} (the tokens fed to a slot)")


def _forward(model: Model, ids: torch.Tensor, rows: int, **cache_arguments: Any) -> torch.Tensor:
    """The logits (B, rows, V) float32 of one forward over `ids` (B, T), which must return that many rows."""
    with torch.no_grad():
        logits = model(input_ids=ids, **cache_arguments).logits
    if logits.ndim != 3 or logits.shape[:2] != (len(ids), rows):
        raise ValueError(f"the model returned logits of shape {tuple(logits.shape)}; expected ({len(ids)}, {rows}, V)")
    return logits.float()


Scorer = CachedScorer | CacheFreeScorer
