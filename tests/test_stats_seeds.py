"""Cells pooled over their SC seeds: worked by hand, against simulations with known truth, and refusals.

The simulations are seeded, so they pass or fail for good; the stated odds are those of a correct estimator to fail
under a seed drawn at random.
"""

import json

import numpy as np
import pytest
from fake_cells import as_blocks, fake_keys, fake_rows
from stats_cases import (
    EASY_AND_HARD,
    coverage,
    independent_cells,
    summary_of,
    table_of,
    true_alpha_and_tau,
    unanimous_rows,
)

from scspec.stats import POOLED_COLUMNS, Tally, pool_seeds
from scspec.stats.seeds import _seed_draws


def pooled(cells):
    """Some cells, pooled."""
    blocks, metadata = table_of(cells)
    return pool_seeds(Tally.of(blocks), metadata)


def test_one_seed_is_pooled_as_it_is():
    rows = fake_rows(fake_keys(), alpha=0.6, spread=0.2)
    (found,) = pooled([rows]).to_dict("records")
    assert list(found) == list(POOLED_COLUMNS)
    summary = summary_of(rows)
    for name in ("alpha", "tau", "alpha_lo", "alpha_hi", "tau_lo", "tau_hi", "interval", "tau_interval"):
        assert found[name] == summary[name]
    assert (found["seeds"], found["prompts"], found["cell_ids"]) == (1, 16, (rows[0]["cell_id"],))
    assert np.isnan([found["alpha_seed_sd"], found["tau_seed_sd"]]).all()


def test_seeds_alone_worked_by_hand():
    """Prompts are alike, seeds are not: alpha is 0, 1/3 and 1 whatever prompts are drawn. Two of three are drawn, each
    pair (s, s) with odds 1/9, so the 2.5 % and 97.5 % quantiles are the smallest and the largest."""
    cells = []
    for seed, beta in enumerate(([0.0] * 3, [1.0, 0.0, 0.0], [1.0] * 3)):
        rows = unanimous_rows(fake_keys(gamma=2, sc_seed=seed), [0] * 20)
        cells.append([{**row, "beta": beta, "accepted": int(sum(beta[:2]))} for row in rows])
    (found,) = pooled(cells).to_dict("records")
    assert found["alpha"] == pytest.approx(4 / 9)
    assert [found["alpha_lo"], found["alpha_hi"]] == pytest.approx([0, 1])
    assert found["alpha_seed_sd"] == pytest.approx(np.std([0, 1 / 3, 1], ddof=1))
    assert found["tau"] == pytest.approx((1 + 2 + 3) / 3)
    assert [found["tau_lo"], found["tau_hi"]] == pytest.approx([1, 3])
    assert found["tau_seed_sd"] == pytest.approx(1)
    assert (found["seeds"], found["prompts"]) == (3, 20)


def test_two_seeds_have_a_spread_and_a_resampling_of_its_own():
    cells = [fake_rows(fake_keys(sc_seed=seed), alpha=alpha, spread=0.2) for seed, alpha in enumerate((0.5, 0.7))]
    blocks, metadata = table_of(cells)
    tally = Tally.of(blocks)
    found = [pool_seeds(tally, metadata, seed=seed).iloc[0] for seed in (0, 0, 1)]
    assert found[0]["alpha_seed_sd"] == pytest.approx(np.std([summary_of(rows)["alpha"] for rows in cells], ddof=1))
    bounds = [[its["alpha_lo"], its["alpha_hi"], its["tau_lo"], its["tau_hi"]] for its in found]
    assert bounds[0] == bounds[1]
    assert bounds[0] != bounds[2]
    assert not np.array_equal(_seed_draws(3, 100, 0), _seed_draws(3, 100, 1))


def test_the_spread_of_a_mean_over_seeds_is_not_too_small():
    """The variance of the mean of S seeds is estimated by that between them (S - 1 in the denominator) over S. Over
    40,000 resamples it is met to sqrt(2 / 40,000) = 0.7 % or better, as nothing drawn has heavier tails than the normal
    distribution; 4 % is more than five of these. Drawing S of S, it would be a third too small of three seeds."""
    for values in ([0.2, 0.7], [0.2, 0.5, 0.9], [0.1, 0.2, 0.4, 0.8, 0.9]):
        drawn = values @ _seed_draws(len(values), 40_000, 0)
        assert np.var(drawn) == pytest.approx(np.var(values, ddof=1) / len(values), rel=0.04)
        assert drawn.mean() == pytest.approx(np.mean(values), abs=5 * np.std(drawn) / 200)


def test_prompts_are_drawn_alike_for_all_seeds():
    """Three seeds of one text: the seeds add nothing, so the interval is that of one."""
    rows = fake_rows(fake_keys(), alpha=0.6, spread=0.2)
    cells = [[{**row, **fake_keys(sc_seed=seed)} for row in rows] for seed in range(3)]
    (found,) = pooled(cells).to_dict("records")
    summary = summary_of(rows)
    for name in ("alpha", "tau", "alpha_lo", "alpha_hi", "tau_lo", "tau_hi"):
        assert found[name] == pytest.approx(summary[name], rel=1e-12)
    assert found["alpha_seed_sd"] == pytest.approx(0, abs=1e-12)


def test_only_seeds_are_pooled():
    def knobs(seed):
        its = {"sc_seed": seed, "skip_layers": [], "sc_prec": 8}
        return json.dumps(dict(sorted(its.items(), reverse=seed == 1)))  # in whatever order they were written

    grid = [
        fake_keys(arm=arm, gamma=gamma, sc_seed=seed, target_settings=knobs(seed), draft_settings=knobs(seed))
        for arm in ("sc_sc", "reseed", "sc_float", "float_float")
        for gamma in (2, 4)
        for seed in (0, 1, 2)
        if arm != "float_float" or seed == 0
    ]
    blocks, metadata = table_of([fake_rows(keys, prompts=2, seed=n) for n, keys in enumerate(grid)])
    found = pool_seeds(Tally.of(blocks), metadata)
    arms = [arm for arm in ("sc_sc", "reseed", "sc_float", "float_float") for _ in (2, 4)]
    assert found["arm"].tolist() == arms
    assert found["seeds"].tolist() == [3] * 6 + [1] * 2
    assert found["gamma"].tolist() == [2, 4] * 4
    assert json.loads(found["draft_settings"].iloc[0]) == {"sc_prec": 8, "skip_layers": []}
    shared = {"target_sc_seed": 0, "draft_sc_seed": 7}  # streams of the draft are no longer the target's
    apart = [
        fake_rows(fake_keys(), prompts=2),
        fake_rows({**fake_keys("x", sc_seed=1), **shared, "pair": "x"}, prompts=2),
    ]
    apart[1] = [{**row, "pair": apart[0][0]["pair"]} for row in apart[1]]
    assert pooled(apart)["seeds"].tolist() == [1, 1]
    assert list(pool_seeds(Tally.of(as_blocks([])), {}).columns) == list(POOLED_COLUMNS)


def test_seeds_that_cannot_be_pooled():
    a, b = fake_keys(sc_seed=0), fake_keys(sc_seed=1)
    with pytest.raises(ValueError, match=f"'{a['cell_id']}' and '{b['cell_id']}' must have the same prompts"):
        pooled([fake_rows(a, prompts=2), fake_rows(b, prompts=3)])
    again = [{**row, "cell_id": "again"} for row in fake_rows(a, prompts=2)]
    with pytest.raises(ValueError, match="cell 'again' has the setting and the seeds of another"):
        pooled([fake_rows(a, prompts=2), again])


def simulated_pools(count, seed, effect=0.04, seeds=3):
    """Cells of three seeds, each of which adds or takes `effect` in every prompt."""
    generator = np.random.default_rng(seed)
    kinds = np.repeat(generator.choice(EASY_AND_HARD, (count, 48)), seeds, axis=0)
    blocks, metadata = independent_cells(kinds + generator.choice([-effect, effect], (len(kinds), 1)), generator)
    pool = {cell_id: f"pool {number // seeds}" for number, cell_id in enumerate(metadata)}
    blocks = blocks.assign(pair=blocks["cell_id"].map(pool))
    found = pool_seeds(Tally.of(blocks), metadata, resamples=1000)
    assert (found["seeds"] == seeds).all()
    truths = np.mean([true_alpha_and_tau(EASY_AND_HARD + sign * effect) for sign in (-1, 1)], axis=0)
    return coverage(found, truths, ("lo", "hi"))


def test_intervals_of_pooled_seeds_cover_the_truth():
    """1000 pools of 3 seeds and 48 prompts. Measured over 5000 others: alpha's interval covers 95.7 %, tau's 96.4 %.
    Then the odds of more than 98 % are 0.003 % and 0.1 %, those of fewer than 92 % below 1 in 10 million."""
    covered = simulated_pools(1000, seed=5)
    assert (covered >= 920).all()
    assert (covered <= 980).all()
