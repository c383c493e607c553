"""Pure functions of one row of logits (distribution, overlap, acceptance, residual), and counter-based draws.

A distribution is a float64 array (V,) over token ids; a greedy one is one-hot. Every function takes one row
and adds up in a fixed order, so a result depends neither on the number of threads nor on what else is
decoded: sums are sequential scalar loops (numba without fastmath) or `np.cumsum`, orderings go by value first
and lowest id second. Torch reductions are not used: `torch.sum` over 49,152 elements changes with the number
of threads.

Names: `p` is the target's distribution, `q` the draft's (Leviathan et al., 2023, arXiv 2211.17192).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from scspec.jit import compiled

TOKEN = 0
"""Role of a draw of a token: from q, from p, or as a bonus."""
COIN = 1
"""Role of the accept coin."""
RESIDUAL = 2
"""Role of the draw from the residual after a rejection."""


@dataclass(frozen=True)
class SamplingConfig:
    """How logits become a distribution. `top_k=0` and `top_p=1.0` switch the cuts off.

    Greedy (`do_sample=False`) ignores the rest. Raises ValueError naming argument, value and what is allowed.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.do_sample is not True and self.do_sample is not False:
            raise ValueError(f"do_sample is {self.do_sample!r}; allowed: True, False")
        if not (_is_real(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature is {self.temperature!r}; allowed: a finite number > 0")
        if not is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; allowed: an integer >= 0 (0: off)")
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; allowed: 0 < top_p <= 1 (1: off)")


def warp(logits_row: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The distribution (V,) float64 of one row of logits (V,) after temperature, then top-k, then top-p.

    top-k keeps the k largest logits; top-p the shortest prefix in order (probability descending, id
    ascending) whose cumulative probability reaches `top_p`, at least one token. Greedy is one-hot at the
    argmax. The lowest id wins every tie. -inf is allowed; NaN, +inf or a row without any finite logit raise
    ValueError.
    """
    best = _argmax(logits_row)
    if not config.do_sample:
        probs = np.zeros(len(logits_row))
        probs[best] = 1.0
        return probs
    probs = _exp(logits_row, float(logits_row[best]), float(config.temperature))
    if 0 < config.top_k < len(probs):
        probs[~_largest(logits_row, config.top_k)] = 0.0
    _normalise(probs)
    if config.top_p < 1:
        cumulative = np.cumsum(np.sort(probs)[::-1])
        count = min(int(np.searchsorted(cumulative, config.top_p)) + 1, len(probs))
        probs[~_largest(probs, count)] = 0.0
        _normalise(probs)
    return probs


def margin(logits_row: np.ndarray) -> float:
    """Largest minus second largest logit of one row (V,): 0.0 at a tie, inf where there is no second."""
    best = _argmax(logits_row)
    others = (logits_row[:best], logits_row[best + 1 :])
    return float(logits_row[best]) - float(max(part.max(initial=-np.inf) for part in others))


@compiled
def beta(p: np.ndarray, q: np.ndarray) -> float:
    """`1 - TV(p, q)`, the probability that a proposal from `q` is accepted: exactly 1.0 for equal arrays."""
    distance = 0.0
    for i in range(p.size):
        distance += abs(p[i] - q[i])
    return max(1.0 - distance / 2, 0.0)


@compiled
def draw(probs: np.ndarray, u: float) -> int:
    """The id at which the cumulative distribution, in id order, exceeds `u` in [0, 1).

    Never an id of probability zero: where rounding leaves the total at or below `u`, the last possible id.
    """
    cumulative = 0.0
    last = -1
    for i in range(probs.size):
        if probs[i] > 0.0:
            last = i
            cumulative += probs[i]
            if cumulative > u:
                break
    return last


def accept(p_x: float, q_x: float, u: float) -> bool:
    """Whether a proposal x ~ q is accepted, with probability min(1, p_x / q_x), given the coin `u` in [0, 1).

    `u * q_x <= p_x` needs no division and always accepts p_x >= q_x. A coin of exactly 0 must not accept a
    token that the target cannot emit.
    """
    return bool(p_x > 0.0 and u * q_x <= p_x)


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The distribution (V,) float64 proportional to max(p - q, 0), which replaces a rejected proposal.

    Raises ValueError where p exceeds q nowhere: then p == q, and nothing can have been rejected.
    """
    probs: np.ndarray = np.maximum(p - q, 0.0)
    if not probs.any():
        raise ValueError("the residual of p and q is zero everywhere; allowed: distributions that differ")
    _normalise(probs)
    return probs


class Draws:
    """Uniform random numbers by (position, role): no state, so batching, resuming or gamma change no draw.

    A number is the first output of the Philox4x64-10 block with key (key, 0) and counter (position, role, 0,
    0) (numpy's Philox, whose first block is that of counter + 1). `position` is the absolute index of the
    token in its sequence, `role` one of TOKEN, COIN, RESIDUAL. `key` is an integer in [0, 2**64), one per
    prompt.
    """

    def __init__(self, key: int):
        if not is_integer(key) or not 0 <= key < 2**64:
            raise ValueError(f"key is {key!r}; allowed: an integer in [0, 2**64)")
        self.key = int(key)

    def uniform(self, position: int, role: int) -> float:
        """A number in [0, 1), a multiple of 2**-53; the same for the same arguments."""
        bits = np.random.Philox(key=self.key, counter=[position, role, 0, 0]).random_raw()
        return (bits >> 11) * 2.0**-53


def key_from(*parts: int | str) -> int:
    """A stable 64-bit key from strings and integers, such as seed, prompt id and turn (blake2b)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def is_integer(value: object) -> bool:
    """Whether `value` is an integer: those of numpy count, True and False do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _argmax(logits_row: np.ndarray) -> int:
    """The lowest id of the largest logit. `np.argmax` stops at a NaN, so looking at one element finds any."""
    best = int(np.argmax(logits_row))
    if not np.isfinite(logits_row[best]):
        raise ValueError(f"logits_row[{best}], its largest, is {logits_row[best]}; allowed: finite or -inf")
    return best


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Mask (V,) bool of the `count` largest values, lowest ids first among equals.

    It orders values, not ids: the n-th largest value is unambiguous whatever sort the machine has.
    """
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    mask: np.ndarray = values > threshold
    mask[np.flatnonzero(values == threshold)[: count - np.count_nonzero(mask)]] = True
    return mask


@compiled
def _exp(logits_row: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    """exp((logits - peak) / temperature) (V,) float64, one scalar at a time."""
    weights = np.empty(logits_row.size)
    for i in range(logits_row.size):
        weights[i] = math.exp((np.float64(logits_row[i]) - peak) / temperature)
    return weights


@compiled
def _normalise(weights: np.ndarray) -> None:
    """Divide by the sum, in place."""
    total = 0.0
    for i in range(weights.size):
        total += weights[i]
    for i in range(weights.size):
        weights[i] /= total
