"""Speculative text has the target's distribution: enumerated exactly, and by a chi-square test.

Both checks go through `decode_blocks` itself, and both must fail for every version in MUTANTS.
"""

import math
from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise, product

import numpy as np
import pytest
import torch
from fake_models import FakeLM

from scspec.decoding import CachedScorer, Draws, SamplingConfig, decode_blocks, key_from, verification
from scspec.decoding.sampling import COIN, RESIDUAL, TOKEN, accept, residual, warp

SAMPLED = SamplingConfig(do_sample=True)

# Row: the token before. Entries: eighths. Zeros on either side, a certain token, and one row with p == q.
P = [[2, 3, 3], [0, 2, 6], [4, 0, 4]]
Q = [[6, 1, 1], [2, 6, 0], [4, 0, 4]]


def law(table, last):
    return [Fraction(eighths, 8) for eighths in table[last]]


class TableScorer:
    """Logits that depend on the token before, from a table of eighths."""

    slots, device = 1, torch.device("cpu")

    def __init__(self, table):
        with np.errstate(divide="ignore"):
            self.rows = torch.from_numpy(np.log(np.array(table, dtype=np.float32) / 8))

    def reserve(self, capacity):
        return False

    def prefill(self, slot, tokens):
        pass

    def rollback(self, slot, length):
        pass

    def feed(self, ids, rows):
        return self.rows[ids[:, -rows:]]


def cells_of(breakpoints):
    """(midpoint, width) of the cells into which the breakpoints cut [0, 1)."""
    edges = sorted({Fraction(0), Fraction(1), *breakpoints})
    return [(float((low + high) / 2), high - low) for low, high in pairwise(edges)]


def cumulative(probs):
    return [sum(probs[: i + 1]) for i in range(len(probs))]


def breakpoints_by_role():
    """Every u at which a decision over P and Q can change; for the residual also those of drawing from p or
    q."""
    token, coin, after_rejection = [], [], [Fraction(eighths, 8) for eighths in range(8)]
    for last in range(3):
        p, q = law(P, last), law(Q, last)
        token += cumulative(p) + cumulative(q)
        coin += [p_x / q_x for p_x, q_x in zip(p, q, strict=True) if 0 < p_x < q_x]
        excess = [max(p_x - q_x, Fraction(0)) for p_x, q_x in zip(p, q, strict=True)]
        if any(excess):
            after_rejection += cumulative([x / sum(excess) for x in excess])
    return {TOKEN: token, COIN: coin, RESIDUAL: after_rejection}


class EveryOutcome:
    """Draws that walk through all combinations of cells: one a run, until `advance` returns False."""

    def __init__(self):
        self.cells = {role: cells_of(points) for role, points in breakpoints_by_role().items()}
        self.chosen = {}  # (position, role) -> index of its cell, in the order of the first request

    def uniform(self, position, role):
        index = self.chosen.setdefault((position, role), 0)
        return self.cells[role][index][0]

    def weight(self):
        return math.prod(self.cells[role][index][1] for (_, role), index in self.chosen.items())

    def advance(self):
        while self.chosen:
            (position, role), index = self.chosen.popitem()
            if index + 1 < len(self.cells[role]):
                self.chosen[position, role] = index + 1
                return True
        return False


def check_exactly(gamma, passes):
    """AssertionError unless the tokens of `passes` blocks, continued by plain sampling from the target, have
    exactly the target's law, and each block emits one token more than it accepts."""
    outcomes, emitted_law = EveryOutcome(), Counter()
    more = True
    while more:
        blocks = decode_blocks(
            TableScorer(P),
            TableScorer(Q),
            [0],
            max_new_tokens=99,
            gamma=gamma,
            sampling=SAMPLED,
            eos_token_ids=frozenset(),
            draws=outcomes,
        )
        text = ()
        for block in islice(blocks, passes):
            assert len(block.emitted) == block.accepted + 1
            text += block.emitted
        emitted_law[text] += outcomes.weight()
        more = outcomes.advance()
    assert sum(emitted_law.values()) == 1
    for text in product(range(3), repeat=passes * (gamma + 1)):
        found = sum(emitted_law[text[:n]] * text_law(text[n:], text[:n]) for n in range(1, len(text) + 1))
        assert found == text_law(text, ())


def text_law(text, before):
    """The target's probability of `text` after `before` (after the prompt [0] where that is empty)."""
    context = (0, *before, *text)
    first = len(before)
    return math.prod(law(P, context[first + i])[token] for i, token in enumerate(text))


def check_statistically(gamma=2, texts=3000, length=2):
    """AssertionError unless a chi-square over all texts of `length` tokens passes.

    The keys are fixed, so it passes or fails for good; over random keys a right decoder would fail with odds
    of 1e-9 (critical value by Wilson and Hilferty, whose z is 5.998).
    """
    target, draft = FakeLM(4, seed=3), FakeLM(4, seed=3, noise=1.0, noise_seed=4)
    sampling = SamplingConfig(do_sample=True, temperature=1.5)
    counts = Counter()
    for text in range(texts):
        blocks = decode_blocks(
            CachedScorer(target, 9),
            CachedScorer(draft, 9),
            [1, 2],
            max_new_tokens=length,
            gamma=gamma,
            sampling=sampling,
            eos_token_ids=frozenset(),
            draws=Draws(key_from("chi-square", text)),
        )
        new_ids = []
        for block in blocks:
            assert len(block.emitted) == block.accepted + 1
            new_ids += block.emitted
        counts[tuple(new_ids[:length])] += 1
    expected = expected_counts(target, sampling, texts, length)
    assert min(expected.values()) > 5
    statistic = sum((counts[text] - count) ** 2 / count for text, count in expected.items())
    freedom = len(expected) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 5.998 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < critical


def expected_counts(target, sampling, texts, length):
    expected = {(): float(texts)}
    for _ in range(length):
        longer = {}
        for text, count in expected.items():
            row = np.array(target._row([1, 2, *text]), dtype=np.float32)
            longer |= {(*text, token): count * p for token, p in enumerate(warp(row, sampling))}
        expected = longer
    return expected


def verify_without_bonus(proposed, p, q, start, draws):
    accepted, emitted = real_verify(proposed, p, q, start, draws)
    return accepted, emitted[: len(proposed)]


real_verify = verification.verify
MUTANTS = {
    "always accept": {"accept": lambda p_x, q_x, u: True},
    "p and q swapped": {
        "accept": lambda p_x, q_x, u: accept(q_x, p_x, u),
        "residual": lambda p, q: residual(q, p),
    },
    "resample from p": {"residual": lambda p, q: p},
    "no bonus": {"verify": verify_without_bonus},
    "residual takes the coin": {"RESIDUAL": COIN},
    "residual takes the proposal's draw": {"RESIDUAL": TOKEN},
}


@pytest.mark.parametrize(("gamma", "passes"), [(1, 1), (2, 1), (1, 2)])
def test_emitted_law_is_exactly_the_target_law(gamma, passes):
    check_exactly(gamma, passes)


@pytest.mark.parametrize("gamma", [1, 2])
def test_emitted_law_is_the_target_law_over_real_draws(gamma):
    check_statistically(gamma)


@pytest.mark.parametrize("check", [lambda: check_exactly(1, 1), lambda: check_exactly(2, 1), check_statistically])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_decoders_fail_the_checks(mutant, check, monkeypatch):
    for name, broken in MUTANTS[mutant].items():
        monkeypatch.setattr(verification, name, broken)
    with pytest.raises(AssertionError):
        check()
