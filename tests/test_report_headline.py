"""The headline of a card, and what of a grid is absent."""

import math

import pytest
from fake_cells import fake_grid, fake_keys, fake_rows, plan_entry
from report_pages import write
from stats_cases import table_of

from scspec.hardware import modelled
from scspec.report.headline import at_loss, best_speedups, shortest_texts, speedup_text
from scspec.report.run import read_run
from scspec.report.state import absent_cells
from scspec.stats import Tally, summarise


def summary_of(losses, alpha=0.9, **rows):
    """A cell for each (target's length, draft's length, gamma), with the loss of its target's quality."""
    keys = [fake_keys(stoc_len=target, draft_stoc_len=draft, gamma=gamma) for target, draft, gamma in losses]
    cells = [fake_rows(its, alpha=alpha, prompts=8, **rows) for its in keys]
    blocks, metadata = table_of(cells)
    summary = modelled(summarise(Tally.of(blocks), metadata, resamples=10), metadata)
    loss = list(losses.values())
    return summary.assign(quality_loss=loss, float_perplexity=2.0, perplexity=[2 * (1 + its) for its in loss])


def test_a_step_for_each_quality_that_admits_another_target():
    summary = summary_of({(128, 32, 4): 0.01, (64, 32, 4): 0.2, (64, 16, 4): 0.2})
    steps = best_speedups(summary)
    assert [step["loss"] for step in steps] == [0.01, 0.2]
    assert [step["cell"]["target_stoc_len"] for step in steps] == [128, 64]
    assert steps[0]["speedup"] == steps[0]["same_length_speedup"]  # plain decoding is at 128 too
    assert steps[1]["plain_stoc_len"] == 64
    fastest = summary["speedup_at_once"].iloc[2]
    assert steps[1]["speedup"] == pytest.approx(fastest, rel=1e-12)
    assert steps[1]["draft"] == "1/4 as long"


def test_a_longer_target_is_compared_with_plain_decoding_at_the_shortest_too():
    summary = summary_of({(128, 16, 4): 0.01, (64, 64, 4): 0.02})
    last = best_speedups(summary)[-1]
    if last["cell"]["target_stoc_len"] == 128:
        assert last["speedup"] == pytest.approx(last["same_length_speedup"] / 2, rel=1e-12)
    assert last["plain_stoc_len"] == 64


def test_with_the_lm_heads_another_setting_may_be_best():
    summary = summary_of({(128, 32, 4): 0.01, (128, 32, 1): 0.01}, alpha=1)
    summary["c"], summary["c_with_head"] = 0.0, 1.0
    for end, c in (("", 0.0), ("_with_head", 1.0)):
        summary[f"speedup_at_once{end}"] = summary["tau"] / (summary["gamma"] * c + 1)
    (step,) = best_speedups(summary)
    assert (step["cell"]["gamma"], step["speedup"]) == (4, 5.0)
    assert step["speedup_with_head"] == 1.0  # 5 / (4 + 1) and 2 / (1 + 1)
    assert "where LM heads count too, 1.000\u00a0\u00d7 at best" in speedup_text(step)["sentence"]
    summary["c_with_head"] = [9.0, 0.0]
    (step,) = best_speedups(summary)
    assert (step["speedup"], step["speedup_with_head"]) == (5.0, 2.0)


def test_no_step_without_a_measured_quality():
    assert best_speedups(summary_of({(128, 32, 4): math.nan})) == []


def test_a_target_that_chance_makes_better_than_its_float_is_admitted_by_no_loss_at_all():
    assert [step["loss"] for step in best_speedups(summary_of({(128, 32, 4): -0.01}))] == [0.0]


@pytest.mark.parametrize(("loss", "index"), [(0.005, -1), (0.01, 0), (0.05, 0), (0.2, 1), (9.0, 1)])
def test_the_step_that_a_loss_admits(loss, index):
    assert at_loss([{"loss": 0.01}, {"loss": 0.2}], loss) == index


@pytest.mark.parametrize(("alpha", "pays"), [(1, True), (0, False)])
def test_a_card_says_whether_speculation_pays(alpha, pays):
    (step,) = best_speedups(summary_of({(128, 32, 4): 0.125}, alpha=alpha))
    shown = speedup_text(step)
    assert shown["loss"] == "+12.5%"
    assert shown["speedup"] == ("2.500\u00a0\u00d7" if pays else "0.500\u00a0\u00d7")  # 5 / (4 / 4 + 1) and 1 / 2
    assert ("does not pay" in shown["sentence"]) != pays
    assert "perplexity is 2.250, in floating point 2.000 (+12.5%)" in shown["sentence"]


def run_of(folder, *cells):
    plan = write(folder, *cells)
    return read_run([cell["path"] for cell in plan["cells"]], plan)


def test_the_shortest_streams_of_each_draft(tmp_path):
    run = run_of(tmp_path, *fake_grid(pairs=("smollm2-shorter",), stoc_lens=(64, 128), gammas=(2,)))
    rows = shortest_texts(run, run.summary)
    assert [row["draft"] for row in rows] == ["7/8 as long", "3/4 as long", "1/2 as long"]
    assert all("(95\u00a0%: " in row["length"] for row in rows)


def test_streams_that_keep_everything_and_streams_that_keep_nothing(tmp_path):
    run = run_of(tmp_path, (fake_keys(arm="float_float"), 1), (fake_keys(stoc_len=64), 1), (fake_keys(), 0))
    (row,) = shortest_texts(run, run.summary)
    assert row == {
        "draft": "same length",
        "length": "64 cycles (95\u00a0%: 64 cycles)",
        "alpha": "1.000 of 1.000",
    }
    without = run_of(tmp_path / "without", (fake_keys(arm="float_float"), 1), (fake_keys(), 0))
    (row,) = shortest_texts(without, without.summary)
    assert row["length"].startswith("not reached")
    assert row["alpha"] == "below 95% of 1.000"


def test_where_floating_point_accepts_nothing_no_length_is_praised(tmp_path):
    run = run_of(tmp_path, (fake_keys(arm="float_float"), 0), (fake_keys(), 0))
    (row,) = shortest_texts(run, run.summary)
    assert (row["length"], row["alpha"]) == ("nothing to keep", "0.000 in floating point")


def test_no_shortest_streams_without_floating_point(tmp_path):
    run = run_of(tmp_path, (fake_keys(), 0.5))
    assert shortest_texts(run, run.summary) == []


def test_absent_cells_are_failed_if_their_log_says_something(tmp_path):
    plan = {"cells": [plan_entry(tmp_path, fake_keys(gamma=gamma)) for gamma in (1, 2, 3, 4)]}
    said = ["Loading\nValueError: no <GPU>\n\n", "  \n", None, "done\n"]
    for entry, text in zip(plan["cells"], said, strict=True):
        entry["log"] = str(tmp_path / f"{entry['gamma']}.log")
        if text is not None:
            (tmp_path / f"{entry['gamma']}.log").write_text(text)
    write(tmp_path, (fake_keys(gamma=4), 1))
    failed, missing = absent_cells(plan)
    assert [(cell["gamma"], cell["said"]) for cell in failed] == [(1, "ValueError: no <GPU>")]
    assert [cell["gamma"] for cell in missing] == [2, 3]


def test_the_last_line_of_a_long_log(tmp_path):
    entry = {**plan_entry(tmp_path, fake_keys()), "log": str(tmp_path / "log")}
    (tmp_path / "log").write_bytes(b"x\n" * 10_000 + "ö".encode() * 4000 + b"\nlast \xff\n")
    ((found,), _) = absent_cells({"cells": [entry]})
    assert found["said"] == "last \ufffd"
