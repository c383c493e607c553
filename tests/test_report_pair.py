"""A pair's page: which charts it has and of what, its tables, and what its captions say."""

import math
import re

import pytest
from fake_cells import fake_keys, write_fake_grid
from report_pages import SMALL, report_of, write, write_measured

from scspec.charts import number

GRID_CHARTS = ["alpha", "tau", "hardware", "precision", "lengths", "positions", "categories", "prediction"]


def ids(*names, section=0):
    return [f"{name}-{section}" for name in names]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The report of the whole fake grid."""
    folder = tmp_path_factory.mktemp("grid")
    return report_of(folder, write_fake_grid(folder / "data", **SMALL))


@pytest.mark.parametrize("pair", ["smollm2-shorter", "smollm2-skip"])
def test_every_chart_has_a_sentence_and_a_text_alternative(grid, pair):
    page = grid.pair(pair)
    assert list(page.specs) == ids(*GRID_CHARTS, "controls")
    charts = [attrs for _, attrs in page.tags if "chart" in attrs.get("class", "").split()]
    assert [attrs["id"] for attrs in charts] == list(page.specs)
    for attrs in charts:
        assert attrs["role"] == "img"
        assert page.specs[attrs["id"]]["description"] == attrs["aria-label"]
        assert pair in attrs["aria-label"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert len(captions) == len(charts)
    for caption in captions:
        assert caption.endswith(".")
        assert "streams cost" not in caption  # a draft may leave layers out
    assert sum("bars are 95\xa0% intervals over prompts" in caption for caption in captions) == 4


def table_rows(page):
    """The texts of each row of the tables of cells, whose first column leads to the cell."""
    rows = re.findall(r"<tr>\n(?:<td[^>]*>.*</td>\n)+</tr>", page.source)
    rows = [re.findall(r"<td[^>]*>(.*)</td>", row) for row in rows if "../cells/" in row]
    return [[re.sub(r"<a[^>]*>(.*)</a>", r"\1", text) for text in row] for row in rows]


def test_the_table_holds_every_cell(grid):
    summary = grid.summary[grid.summary["pair"] == "smollm2-shorter"]
    rows = table_rows(grid.pair())
    assert len(rows) == len(summary)
    cell = summary[(summary["arm"] == "sc_sc") & (summary["draft_stoc_len"] == 112)].iloc[0]
    wanted = [
        "7/8 as long",
        "128 / 112",
        "8",
        "2",
        "0 / 0 / 0",
        "8",
        number(cell["alpha"]),
        f"{cell['alpha_lo']:.3f} to {cell['alpha_hi']:.3f}",
        number(cell["tau"]),
        f"{cell['tau_lo']:.3f} to {cell['tau_hi']:.3f}",
        number(cell["predicted_tau"]),
        number(cell["alpha_evaluated"]),
        number(cell["acceptance_rate"]),
        *(f"{cell[name]:.3f}" for name in ("speedup_at_once", "speedup_in_turn", "energy_ratio")),
        *("-", "-"),  # the target's quality was not measured
        "96",
        f"{cell['tokens_per_s']:.1f}",
    ]
    assert wanted in rows


def test_the_table_says_the_seed_of_each_side(grid):
    seeds = {row[0]: row[4] for row in table_rows(grid.pair())}
    assert seeds["reseed: independent streams"] == "0 / 0 / 1000"
    assert seeds["identity: draft = target"] == "0 / 0 / 0"
    assert seeds["SC target, float draft"] == "0 / 0 / -"
    assert seeds["float target, SC draft"] == "0 / - / 0"
    assert seeds["float target, float draft"] == "0 / - / -"


def test_no_heading_breaks_before_its_percent_sign(grid):
    source = grid.pair().source
    assert source.count(">alpha, 95\xa0%<") == 2
    assert source.count(">tau, 95\xa0%<") == 2
    shown = re.sub(r"<(script|style).*?</\1>", "", source, flags=re.DOTALL)
    assert "95 %" not in shown


def test_alpha_is_not_said_to_be_free_of_gamma(grid):
    assert "else 0); estimates the same number whatever gamma is" in grid.pair().text
    assert "it does not depend on gamma" not in grid.pair().text


def test_a_single_cell(tmp_path):
    report = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6)))
    assert list(report.pair().specs) == ids(*GRID_CHARTS)
    assert len(report.summary) == 1


def test_controls_without_a_grid(tmp_path):
    page = report_of(
        tmp_path, write(tmp_path, *[(fake_keys(arm=arm), 1) for arm in ("identity", "float_float")])
    ).pair()
    assert list(page.specs) == ["controls-0"]


def test_greedy_and_sampled_cells_have_charts_of_their_own(tmp_path):
    cells = [(fake_keys(arm=arm, do_sample=do_sample), 1) for arm in ("sc_sc", "identity") for do_sample in (0, 1)]
    cells = [({**keys, "do_sample": bool(keys["do_sample"])}, alpha) for keys, alpha in cells]
    page = report_of(tmp_path, write(tmp_path, *cells)).pair()
    assert list(page.specs) == [*ids(*GRID_CHARTS, "controls"), *ids(*GRID_CHARTS, "controls", section=1)]
    for chart_id, decoding in {"alpha-0": "greedy", "alpha-1": "sampled", "controls-1": "sampled"}.items():
        assert decoding in page.specs[chart_id]["description"]
    assert "share of emitted tokens on which" in page.text
    assert "overlap 1 - TV(p, q)" in page.text


def test_few_prompts_are_said_to_have_no_interval(tmp_path):
    plan = write_fake_grid(tmp_path, [(fake_keys(), 0.6), (fake_keys(arm="reseed"), 0.6)], prompts=4)
    page = report_of(tmp_path, plan).pair()
    assert page.text.count("there are no intervals below 8 prompts, so differences may be chance.") == 4
    assert "95 % intervals over prompts" not in page.text


def test_quality_stands_beside_acceptance(tmp_path):
    """Of the targets it was measured for; a float target is what the others are measured against."""
    short, long, float_target = fake_keys(stoc_len=64), fake_keys(stoc_len=128), fake_keys(arm="float_sc")
    plan = write_measured(tmp_path, (short, 0.6, 3), (long, 0.7, None), (float_target, 0.7, None))
    plan["cells"][1]["quality"] = str(tmp_path / "absent.parquet")
    report = report_of(tmp_path, plan)
    page, summary = report.pair(), report.summary
    losses = summary.set_index("cell_id")["quality_loss"]
    assert losses.iloc[0] == pytest.approx(3 / 2 - 1)
    assert math.isnan(losses.iloc[1])
    assert losses.iloc[2] == 0
    assert summary["target_tv"].iloc[0] == pytest.approx(0.2)
    (point,) = page.specs["quality-0"]["datasets"].popitem()[1]
    assert point["alpha"] == pytest.approx(summary["alpha"].iloc[0], abs=1e-12)
    assert page.specs["quality-0"]["description"].startswith("Acceptance alpha against the target's quality, pair")
    assert "smollm2-135m 64 8 0 continuations 80 3.000 2.000 +50.00%" in page.text
    assert "smollm2-135m 64 8 0 text file 10 4.000 2.000 +100.00% none" in page.text


def test_without_quality_the_page_says_that_nothing_tells_how_good_the_targets_are(grid):
    assert "Not measured: quality.enabled is false, or its files are missing." in grid.pair().text


def test_seeds_of_a_setting_are_pooled(tmp_path):
    seeds = [(fake_keys(sc_seed=seed), truth) for seed, truth in enumerate((0.5, 0.6, 0.7))]
    report = report_of(tmp_path, write(tmp_path / "data", *seeds, (fake_keys(gamma=2), 0.7)))
    pooled = report.pair().source.partition("Pooled over seeds of the SC noise</h3>")[2].partition("</table>")[0]
    assert pooled.count("<tr>") == 2  # the head, and gamma 4: gamma 2 has one seed
    alphas = report.summary.loc[report.summary["gamma"] == 4, "alpha"]
    cells = re.findall(r"<td[^>]*>(.*)</td>", pooled)
    assert cells[:6] == ["same length", "128 / 128", "8", "4", "3", "8"]
    assert (cells[6], cells[8]) == (number(alphas.mean()), number(alphas.std(ddof=1)))


def test_nothing_is_pooled_where_settings_have_one_seed(grid):
    assert "Pooled over" not in grid.pair().source
