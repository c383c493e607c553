"""Estimates by position and by category, worked by hand and against those of whole cells."""

import numpy as np
import pytest
from fake_cells import as_blocks, fake_keys, fake_rows
from stats_cases import hand_rows, summary_of

from scspec.stats import CATEGORY_COLUMNS, POSITION_COLUMNS, Tally, by_category, positions


def test_positions_worked_by_hand():
    """As in `test_worked_by_hand`: 4 of 5 blocks accept one, and 2 of the 3 that emitted two tokens accept two."""
    found = positions(Tally.of(as_blocks(hand_rows())))
    assert list(found.columns) == list(POSITION_COLUMNS)
    assert found["i"].tolist() == [1, 2]
    assert found["alpha_i"].tolist() == [4 / 5, 2 / 3]
    assert found["p_accepted"].tolist() == pytest.approx([4 / 5, 8 / 15])
    assert found["at_risk"].tolist() == [5, 3]
    assert 1 + found["p_accepted"].sum() == pytest.approx(summary_of(hand_rows())["tau"])
    assert (found[["p_accepted_interval", "alpha_i_interval"]] == "none").all(axis=None)
    for estimate, columns in ((positions, POSITION_COLUMNS), (by_category, CATEGORY_COLUMNS)):
        nothing = estimate(Tally.of(as_blocks([])))
        assert nothing.empty
        assert list(nothing.columns) == list(columns)


def test_positions_of_cells_are_in_ascending_order():
    """The cell between two others has another gamma, so it is not resampled between them."""
    cells = [fake_keys(stoc_len=length, gamma=gamma) for length, gamma in ((128, 1), (32, 2), (64, 1))]
    found = positions(Tally.of(as_blocks([row for keys in cells for row in fake_rows(keys, alpha=0.6, prompts=2)])))
    wanted = [(keys["cell_id"], i) for keys in cells for i in range(1, keys["gamma"] + 1)]
    assert wanted == sorted(wanted)
    assert list(found[["cell_id", "i"]].itertuples(index=False, name=None)) == wanted
    assert found.index.tolist() == list(range(4))


def test_positions_are_resampled_as_tau_is():
    rows = fake_rows(fake_keys(gamma=1), alpha=0.6, spread=0.2)
    found, summary = positions(Tally.of(as_blocks(rows))).iloc[0], summary_of(rows)
    for name in ("p_accepted", "alpha_i"):  # at gamma 1 tau is 1 + alpha_1
        bounds = [1 + found[f"{name}_lo"], 1 + found[f"{name}_hi"]]
        assert bounds == pytest.approx([summary["tau_lo"], summary["tau_hi"]], rel=1e-15 * 4)
        assert found[f"{name}_interval"] == "bootstrap"


def test_positions_at_the_ends_of_their_range():
    """20 prompts, gamma 4, h = 0.05**(1/20). The plausible worst of 20 perfect prompts: a share h of the tokens in
    blocks of 5, the rest in blocks of 1 (or of i, if they accept i - 1). Bounds of P and of tau are one scenario's."""
    share = 0.05 ** (1 / 20)
    rows = fake_rows(fake_keys(), alpha=1, prompts=20)
    perfect = positions(Tally.of(as_blocks(rows)))
    assert (perfect[["p_accepted_interval", "alpha_i_interval"]] == "one-sided").all(axis=None)
    assert (perfect[["p_accepted_hi", "alpha_i_hi"]] == 1).all(axis=None)
    np.testing.assert_allclose(perfect["p_accepted_lo"], share / 5 / (share / 5 + 1 - share), rtol=1e-12)
    i = np.arange(1, 5)
    np.testing.assert_allclose(perfect["alpha_i_lo"], share / 5 / (share / 5 + (1 - share) / i), rtol=1e-12)
    assert 1 + perfect["p_accepted_lo"].sum() == pytest.approx(summary_of(rows)["tau_lo"], rel=1e-12)

    hopeless = positions(Tally.of(as_blocks(fake_rows(fake_keys(), alpha=0, prompts=20))))
    assert (hopeless["p_accepted"] == 0).all()
    np.testing.assert_allclose(hopeless["p_accepted_hi"], 1 - share, rtol=1e-12)
    assert hopeless["alpha_i"].isna().tolist() == [False, True, True, True]  # nobody came to try
    assert hopeless["alpha_i_interval"].tolist() == ["one-sided", "none", "none", "none"]
    assert hopeless["prompts"].tolist() == [20, 0, 0, 0]


def test_few_prompts_at_risk_have_no_interval():
    """Of 10 prompts 7 accept the first proposal, so alpha_2 rests on 7 prompts and P(accepted >= 2) on 10."""
    one = hand_rows()[0]
    accepts = [2, 1, 2, 1, 2, 1, 2, 0, 0, 0]
    rows = [
        {**one, "prompt_id": f"p{n}", "accepted": accepted, "beta": [1.0] * accepted + [0.0]}
        for n, accepted in enumerate(accepts)
    ]
    second = positions(Tally.of(as_blocks(rows))).iloc[1]
    assert (second["alpha_i"], second["alpha_i_interval"], second["prompts"]) == (4 / 7, "none", 7)
    assert second["p_accepted"] == pytest.approx(4 / 10)
    assert second["p_accepted_interval"] == "bootstrap"


def test_a_category_is_as_a_cell_of_it_alone():
    rows = fake_rows(fake_keys(), alpha=0.6, prompts=40, spread=0.3, categories=("maths", "code", "maths", "maths"))
    rows += fake_rows(fake_keys(gamma=2), alpha=0.7, prompts=14, categories=("code", "maths"))
    found = by_category(Tally.of(as_blocks(rows)))
    assert list(found.columns) == list(CATEGORY_COLUMNS)
    assert found["category"].tolist() == ["code", "maths"] * 2
    assert found["prompts"].tolist() == [7, 7, 10, 30]
    assert found["interval"].tolist() == ["none", "none", "bootstrap", "bootstrap"]
    for its in found.to_dict("records"):
        alone = [row for row in rows if (row["cell_id"], row["category"]) == (its["cell_id"], its["category"])]
        summary = summary_of(alone)
        for name in CATEGORY_COLUMNS[2:]:
            np.testing.assert_equal(its[name], summary[name])
    assert by_category(Tally.of(as_blocks([]))).empty
