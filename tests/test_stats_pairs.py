"""Differences between two cells: worked by hand, against simulations with known truth, and refusals.

The simulations are seeded, so they pass or fail for good; the stated odds are those of a correct estimator to fail
under a seed drawn at random.
"""

import numpy as np
import pytest
from fake_cells import fake_keys, fake_metadata, fake_rows
from stats_cases import EASY_AND_HARD, coverage, independent_cells, table_of, true_alpha_and_tau, unanimous_rows

from scspec.stats import DIFFERENCE_COLUMNS, Tally, paired_differences


def difference_of(cells, **options):
    blocks, metadata = table_of(cells)
    ids = [rows[0]["cell_id"] for rows in cells]
    (found,) = paired_differences(Tally.of(blocks), metadata, [tuple(ids)], **options).to_dict("records")
    return found


def test_a_pair_draws_the_same_prompts():
    """Of 20 prompts every second agrees, in b also the first. The difference is the share of the first prompt in a
    resample, Binomial(20, 1/20) / 20: its 2.5 % quantile is 0 (0 has 36 %), its 97.5 % quantile 3/20 (up to 2 has
    92.5 %, up to 3 98.4 %). In 40,000 resamples a share has a standard deviation of at most 0.13 %, so 92.5 % and
    98.4 % are seven of them or more from 97.5 %. Were prompts drawn apart, the bounds would be beyond 0.25."""
    a = [n % 2 for n in range(20)]
    cells = [unanimous_rows(fake_keys(gamma=1), a), unanimous_rows(fake_keys("b", gamma=1), [1, *a[1:]])]
    found = difference_of(cells, resamples=40_000)
    assert list(found) == list(DIFFERENCE_COLUMNS)
    assert (found["prompts"], found["interval"], found["tau_interval"]) == (20, "bootstrap", "bootstrap")
    assert (found["alpha_a"], found["alpha_b"]) == (0.5, 0.55)
    assert found["alpha_diff"] == pytest.approx(0.05)
    assert [found["alpha_diff_lo"], found["alpha_diff_hi"]] == pytest.approx([0, 0.15])
    assert found["tau_diff"] == pytest.approx(0.05)  # at gamma 1 tau is 1 + the share of blocks that accept one
    assert [found["tau_diff_lo"], found["tau_diff_hi"]] == pytest.approx([0, 0.15])


def test_identical_cells_differ_by_nothing_with_a_bound_for_what_was_not_seen():
    """Of the 20 prompts none deviates, so up to 1 - 0.05**(1/20) = 0.139 of all may: by 1 in alpha at most."""
    rows = fake_rows(fake_keys(), alpha=0.6, prompts=20)
    found = difference_of([rows, [{**row, "cell_id": "again"} for row in rows]])
    unseen = 1 - 0.05 ** (1 / 20)
    assert (found["alpha_diff"], found["tau_diff"]) == (0, 0)
    assert (found["interval"], found["tau_interval"]) == ("unanimous", "unanimous")
    assert [found["alpha_diff_lo"], found["alpha_diff_hi"]] == pytest.approx([-unseen, unseen])
    least, most = (1 / ((1 - unseen) / found["tau_a"] + unseen / extreme) for extreme in (1, 5))
    assert [found["tau_diff_lo"], found["tau_diff_hi"]] == pytest.approx([least - most, most - least])


def test_opposite_cells_have_a_bound_within_what_can_be():
    found = difference_of([unanimous_rows(fake_keys(gamma=2, sc_seed=n), [n] * 20) for n in (0, 1)])
    unseen = 1 - 0.05 ** (1 / 20)
    assert (found["alpha_diff"], found["interval"]) == (1, "unanimous")
    assert [found["alpha_diff_lo"], found["alpha_diff_hi"]] == pytest.approx([1 - 2 * unseen, 1])
    assert (found["tau_diff"], found["tau_diff_hi"]) == (2, pytest.approx(2))
    assert found["tau_diff_lo"] < 1.5


@pytest.mark.parametrize(("prompts", "kind"), [(7, "none"), (8, "bootstrap")])
def test_no_interval_of_a_difference_below_eight_prompts(prompts, kind):
    cells = [fake_rows(fake_keys(sc_seed=seed), alpha=0.6, seed=seed, prompts=prompts) for seed in (0, 1)]
    found = difference_of(cells)
    assert (found["interval"], found["tau_interval"]) == (kind, kind)
    bounds = [found[f"{name}_diff_{end}"] for name in ("alpha", "tau") for end in ("lo", "hi")]
    assert np.isnan(bounds).tolist() == [kind == "none"] * 4
    assert found["alpha_diff"] == found["alpha_b"] - found["alpha_a"] != 0


def test_resampling_is_repeatable():
    cells = [fake_rows(fake_keys(sc_seed=seed), alpha=0.6, spread=0.2, seed=seed) for seed in (0, 1)]
    assert difference_of(cells) == difference_of(cells, resamples=2000, seed=0) != difference_of(cells, seed=1)


def test_no_pairs():
    blocks, metadata = table_of([fake_rows(fake_keys(), prompts=1)])
    assert list(paired_differences(Tally.of(blocks), metadata, []).columns) == list(DIFFERENCE_COLUMNS)


CELL = fake_metadata(fake_keys())["cell"]


@pytest.mark.parametrize(
    ("keys", "prompts", "metadata", "named"),
    [
        ({}, 9, {}, "prompts .* not 8 and 9, 'p08' in one"),
        ({}, 8, {"prompts": {"sha256": "other"}}, "prompt file .* not .* and other"),
        ({"backend": "reference"}, 8, {}, "backend .* not cpu and reference"),
        ({}, 8, {"device": "cpu: another"}, "device_name .* not cpu: a processor and cpu: another"),
        ({}, 8, {"cell": {**CELL, "dtype": "float16"}}, "dtype .* not float32 and float16"),
        ({"do_sample": True}, 8, {}, "do_sample .* not False and True"),
        ({}, 8, {"cell": {**CELL, "sampling": {"temperature": 0.5}}}, "sampling settings"),
        ({}, 8, {"cell": {**CELL, "max_new_tokens": 9}}, "max_new_tokens .* not 40 and 9"),
    ],
)
def test_cells_that_cannot_be_paired(keys, prompts, metadata, named):
    a, b = fake_keys(), fake_keys("other", **keys)
    rows = [fake_rows(a, prompts=8), fake_rows(b, prompts=prompts)]
    blocks, its_metadata = table_of(rows, {1: metadata})
    with pytest.raises(
        ValueError, match=f"cells '{a['cell_id']}' and '{b['cell_id']}' must have the same {named}"
    ) as e:
        paired_differences(Tally.of(blocks), its_metadata, [(a["cell_id"], b["cell_id"])])
    assert "\n" not in str(e.value)


def test_a_pair_of_unknown_cells():
    blocks, metadata = table_of([fake_rows(fake_keys(), prompts=1)])
    with pytest.raises(ValueError, match="no blocks of cell 'nothing'"):
        paired_differences(Tally.of(blocks), metadata, [(fake_keys()["cell_id"], "nothing")])


def simulated_pairs(count, seed):
    generator = np.random.default_rng(seed)
    kinds = np.repeat(generator.choice(EASY_AND_HARD, (count, 48)), 2, axis=0)
    kinds[1::2] -= 0.1  # the second of each pair agrees less in prompts of either kind
    blocks, metadata = independent_cells(kinds, generator)
    ids = list(metadata)
    found = paired_differences(Tally.of(blocks), metadata, zip(ids[::2], ids[1::2], strict=True), resamples=1000)
    truths = np.subtract(true_alpha_and_tau(EASY_AND_HARD - 0.1), true_alpha_and_tau(EASY_AND_HARD))
    return coverage(found, truths, ("diff_lo", "diff_hi"))


def test_intervals_of_paired_differences_cover_the_truth():
    """1000 pairs of 48 prompts. Measured over 5000 others: intervals of differences of alpha cover 93.9 %, of tau
    94.1 %. Then the odds of fewer than 92 % are 0.6 % and 0.3 %, those of more than 98 % below 1 in 100 million."""
    covered = simulated_pairs(1000, seed=4)
    assert (covered >= 920).all()
    assert (covered <= 980).all()
