"""Distributions, overlap, acceptance and counter-based random numbers."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scspec.decoding import Draws, SamplingConfig, key_from
from scspec.decoding.sampling import COIN, RESIDUAL, TOKEN, accept, beta, draw, margin, residual, warp

SAMPLED = SamplingConfig(do_sample=True)
LARGEST_U = 1 - 2.0**-53
VOCAB_SIZE = 49_152

coarse_logits = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0])  # many ties
fine_logits = st.floats(-30, 30, width=32)
rows = st.lists(coarse_logits | fine_logits, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
configs = st.builds(
    SamplingConfig,
    do_sample=st.just(True),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0]),
)


def row_of(values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def naive_warp(row: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """`warp` as its docstring reads, with Python lists and one full sort per cut."""
    scaled = [(float(x) - float(max(row))) / config.temperature for x in row]
    ids = sorted(range(len(row)), key=lambda i: (-row[i], i))[: config.top_k or None]
    weights = {i: math.exp(scaled[i]) for i in ids}
    total = math.fsum(weights.values())
    kept, cumulative = {}, 0.0
    for i in sorted(ids, key=lambda i: (-weights[i], i)):
        if config.top_p < 1 and kept and cumulative >= config.top_p:
            break
        kept[i] = weights[i] / total
        cumulative += kept[i]
    return np.array([kept.get(i, 0.0) / math.fsum(kept.values()) for i in range(len(row))])


@settings(max_examples=300)
@given(rows, configs)
@example([0.0] * 10, SamplingConfig(True, top_p=0.5))
@example([1.0, 3.0, 3.0, 3.0], SamplingConfig(True, top_k=2))
@example([1.0, 3.0, 3.0, 3.0], SamplingConfig(True, top_p=0.5))
def test_warp_is_its_naive_reading(values, config):
    row = row_of(values)
    probs = warp(row, config)
    assert probs.dtype == np.float64
    assert probs.shape == row.shape
    assert abs(math.fsum(probs) - 1) < 1e-14
    assert 1 <= np.count_nonzero(probs) <= (config.top_k or len(row))
    # Both divide the same exponentials, each rounded twice, by sums of at most 12 terms.
    np.testing.assert_allclose(probs, naive_warp(row, config), rtol=1e-14, atol=0)


@given(rows)
def test_greedy_is_one_hot_at_the_lowest_argmax(values):
    probs = warp(row_of(values), SamplingConfig(temperature=0.3, top_k=2, top_p=0.1))
    assert probs.tolist() == [float(i == values.index(max(values))) for i in range(len(values))]


def test_ties_take_the_lowest_ids():
    row = row_of([1, 3, 3, -math.inf, 3])
    assert np.flatnonzero(warp(row, SamplingConfig(True, top_k=2))).tolist() == [1, 2]
    assert np.flatnonzero(warp(row, SamplingConfig(True, top_p=0.5))).tolist() == [1, 2]
    assert warp(row, SamplingConfig()).tolist() == [0, 1, 0, 0, 0]


def test_top_p_comes_after_top_k():
    row = row_of(np.log([4, 3, 2, 1]))
    # Of all four, 0.4 + 0.3 < 0.75 would keep three; of the top two, renormalised, 4/7 < 0.75 keeps two.
    assert np.flatnonzero(warp(row, SamplingConfig(True, top_p=0.75))).tolist() == [0, 1, 2]
    assert np.flatnonzero(warp(row, SamplingConfig(True, top_k=2, top_p=0.75))).tolist() == [0, 1]
    assert np.flatnonzero(warp(row, SamplingConfig(True, top_k=2, top_p=0.5))).tolist() == [0]


def test_temperature_extremes():
    row = row_of([0, 1, 1])
    assert warp(row, SamplingConfig(True, temperature=1e-308)).tolist() == [0, 0.5, 0.5]
    np.testing.assert_allclose(warp(row, SamplingConfig(True, temperature=1e308)), 1 / 3, rtol=1e-15)


@pytest.mark.parametrize("config", [SamplingConfig(), SAMPLED])
@pytest.mark.parametrize("bad", [[0, math.nan, 1], [math.inf, 0], [-math.inf, -math.inf]])
def test_warp_refuses_what_has_no_distribution(bad, config):
    with pytest.raises(ValueError, match="logits_row"):
        warp(row_of(bad), config)


def test_no_bit_depends_on_threads_or_company():
    generator = np.random.default_rng(1)
    batch = generator.normal(scale=3, size=(3, VOCAB_SIZE)).astype(np.float32)
    config = SamplingConfig(True, temperature=0.8, top_k=5000, top_p=0.95)
    seen = set()
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        for row in (batch[1], batch[1].copy(), torch.from_numpy(batch)[1].numpy(), batch.copy()[1]):
            seen.add((warp(row, config).tobytes(), margin(row), beta(warp(row, config), warp(batch[0], SAMPLED))))
    torch.set_num_threads(threads)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", 1),
        ("temperature", 0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
    ],
)
def test_config_errors_name_argument_value_and_allowed(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; allowed: ".replace(".", r"\.")):
        SamplingConfig(**{name: value})


@given(rows, rows, configs)
def test_beta_is_the_overlap(a, b, config):
    size = max(len(a), len(b))
    p, q = (warp(row_of(values + [-math.inf] * (size - len(values))), config) for values in (a, b))
    assert beta(p, p.copy()) == 1.0
    assert beta(p, q) == beta(q, p)
    assert 0 <= beta(p, q) <= 1
    assert abs(beta(p, q) - math.fsum(np.minimum(p, q))) < 1e-14


def test_beta_of_greedy_distributions_is_agreement():
    one, other = warp(row_of([1, 2, 0]), SamplingConfig()), warp(row_of([1, 0, 0]), SamplingConfig())
    assert beta(one, one) == 1.0
    assert beta(one, other) == 0.0


def test_margin():
    assert margin(row_of([1, 4, 2.5])) == 1.5
    assert margin(row_of([4, 1, 4])) == 0.0
    assert margin(row_of([1, -math.inf])) == math.inf
    assert margin(row_of([1])) == math.inf


def test_draw_inverts_the_distribution_in_id_order():
    probs = np.array([0.25, 0, 0.25, 0.5])
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.4999, 0.5, LARGEST_U)] == [0, 0, 2, 2, 3, 3]


def test_draw_never_takes_a_token_of_probability_zero():
    assert draw(np.array([0.0, 1.0]), 0.0) == 1
    short = np.array([0.1] * 10 + [0.0])
    assert np.cumsum(short)[-1] <= LARGEST_U  # rounding leaves a gap below 1
    assert draw(short, LARGEST_U) == 9


def test_accept():
    assert accept(0.5, 0.25, LARGEST_U)
    assert accept(0.25, 0.5, 0.5)
    assert not accept(0.25, 0.5, math.nextafter(0.5, 1))
    assert not accept(0.0, 0.5, 0.0)
    assert accept(5e-324, 1.0, 0.0)


def test_residual():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.75, 0.125])
    assert residual(p, q).tolist() == [0.75, 0.0, 0.25]
    with pytest.raises(ValueError, match=r"^the residual of p and q is zero .*allowed: distributions that differ$"):
        residual(p, p.copy())


def test_draws_depend_on_key_position_and_role_only():
    draws = Draws(5)
    first = draws.uniform(7, TOKEN)
    others = [
        draws.uniform(7, COIN),
        draws.uniform(7, RESIDUAL),
        draws.uniform(8, TOKEN),
        Draws(6).uniform(7, TOKEN),
    ]
    assert draws.uniform(7, TOKEN) == first == Draws(5).uniform(7, TOKEN)
    assert len({first, *others}) == 5


def philox_4x64_10(key: int, counter: list[int]) -> int:
    """First 64-bit word of the block (Salmon et al., SC 2011), with Python integers."""
    word = 2**64 - 1
    keys = [key, 0]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            right >> 64 ^ counter[1] ^ keys[0],
            right & word,
            left >> 64 ^ counter[3] ^ keys[1],
            left & word,
        ]
        keys = [keys[0] + 0x9E3779B97F4A7C15 & word, keys[1] + 0xBB67AE8584CAA73B & word]
    return counter[0]


def test_draws_and_keys_never_change():
    """Stored results follow from these; another stream, here or in numpy, would make them irreproducible."""
    for key, position, role in [
        (0, 0, TOKEN),
        (2**64 - 1, 123, RESIDUAL),
        (12345678901234567890, 4096, COIN),
    ]:
        expected = (philox_4x64_10(key, [position + 1, role, 0, 0]) >> 11) / 2**53
        assert Draws(key).uniform(position, role) == expected
    assert key_from(1, "prompt", 2) == 16464423042876195666


def test_draws_are_uniform():
    """Kolmogorov-Smirnov over 3 x 4000 draws. The key is fixed; over random keys D > 3.3 / sqrt(n) has odds
    of 2 exp(-2 * 3.3**2) = 7e-10 a role."""
    count = 4000
    for role in (TOKEN, COIN, RESIDUAL):
        values = np.sort([Draws(3).uniform(position, role) for position in range(count)])
        assert values[0] >= 0
        assert values[-1] < 1
        assert np.abs(values - np.arange(count) / count).max() < 3.3 / math.sqrt(count)


@pytest.mark.parametrize("key", [-1, 2**64, 1.0, True])
def test_draws_refuse_keys_out_of_range(key):
    with pytest.raises(ValueError, match=rf"key is {key}; allowed: "):
        Draws(key)


def test_keys_tell_their_parts_apart():
    parts = [(), (1,), ("1",), (1, 2), (12,), ("a", "b"), ("ab",), ("a,b",), (2, 1)]
    assert len({key_from(*part) for part in parts}) == len(parts)
    assert all(0 <= key_from(*part) < 2**64 for part in parts)


def test_global_random_state_is_untouched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    draw(warp(row_of([1, 2, 3]), SAMPLED), Draws(key_from("x")).uniform(1, TOKEN))
    after = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
