"""Charts of parts of cells: positions in the block, categories of prompts."""

from itertools import pairwise

import pandas as pd
import pytest
import vl_convert
from fake_cells import as_blocks, fake_keys, fake_rows
from scenes import items
from test_charts import layers, luminance, summary_of, titles, values
from test_charts_maps import colour
from test_charts_picks import parameters

from scspec.charts import THEMES, categories_chart, positions_chart
from scspec.stats import Tally, by_category, positions

KEYS = [
    fake_keys(stoc_len=length, draft_stoc_len=draft, gamma=gamma)
    for length, draft in ((64, 64), (64, 32), (128, 128), (128, 64))
    for gamma in (2, 4)
]
ROWS = {"prompts": 16, "max_new_tokens": 20, "categories": ("maths", "code")}


@pytest.fixture(scope="module")
def cells():
    return summary_of([(keys, 0.7) for keys in KEYS], **ROWS)


@pytest.fixture(scope="module")
def blocks():
    return as_blocks([row for seed, keys in enumerate(KEYS) for row in fake_rows(keys, alpha=0.7, seed=seed, **ROWS)])


def test_a_line_a_length_over_positions(cells, blocks):
    table = positions(Tally.of(blocks), resamples=50)
    spec = positions_chart(table, cells).to_dict()
    found = layers(spec)
    assert list(found) == ["line", "rule", "circle"]
    circle = found["circle"]["encoding"]
    assert (circle["y"]["field"], circle["color"]["field"]) == ("alpha_i", "target_stoc_len")
    assert circle["color"]["scale"]["domain"] == [64, 128]
    assert circle["x"]["axis"]["values"] == [1, 2, 3, 4]
    assert (spec["facet"]["field"], spec["columns"]) == ("gamma", 2)
    assert {"P(accepted >= i)", "blocks at risk", "alpha_i, 95 % interval"} <= set(titles(circle["tooltip"]))
    assert len(values(spec)) == len(table) == 4 * (2 + 4)
    for row in values(spec):
        assert abs(row["x"] - row["i"]) < 0.1
        assert row["i"] <= row["gamma"]


def test_rows_of_other_cells_are_left_out(cells, blocks):
    few = cells[(cells["target_stoc_len"] == 64) & (cells["gamma"] == 4)]
    spec = positions_chart(positions(Tally.of(blocks), resamples=50), few).to_dict()
    assert (len(values(spec)), {row["gamma"] for row in values(spec)}) == (2 * 4, {4})
    spec = categories_chart(by_category(Tally.of(blocks), resamples=50), few).to_dict()
    assert (len(values(spec)), {row["gamma"] for row in values(spec)}) == (2 * 2, {4})
    assert list(parameters(spec)) == ["draft_choice"]


def test_no_point_where_no_block_was_at_risk(cells, blocks):
    table = positions(Tally.of(blocks), resamples=50)
    table.loc[table["i"] == 4, "alpha_i"] = float("nan")
    assert {row["i"] for row in values(positions_chart(table, cells).to_dict())} == {1, 2, 3}


def test_no_bars_where_there_are_no_intervals(cells, blocks):
    table = positions(Tally.of(blocks), resamples=50).assign(alpha_i_interval="none")
    assert list(layers(positions_chart(table, cells).to_dict())) == ["line", "circle"]
    table = by_category(Tally.of(blocks), resamples=50).assign(interval="none")
    assert list(layers(categories_chart(table, cells).to_dict())) == ["circle"]


def test_categories_in_rows_with_a_place_for_each_length(cells, blocks):
    table = by_category(Tally.of(blocks), resamples=50)
    spec = categories_chart(table, cells).to_dict()
    found = layers(spec)
    rule, circle = found["rule"]["encoding"], found["circle"]["encoding"]
    for encoding in (rule, circle):
        assert encoding["y"]["sort"] == ["code", "maths"]
        assert (encoding["yOffset"]["field"], encoding["color"]["field"]) == ("target_stoc_len", "target_stoc_len")
    assert (rule["x"]["field"], rule["x2"]["field"], circle["x"]["field"]) == ("alpha_lo", "alpha_hi", "alpha")
    assert {"category", "alpha, 95 % interval", "prompts"} <= set(titles(circle["tooltip"]))
    assert len(values(spec)) == len(KEYS) * 2
    merged = pd.DataFrame(values(spec)).merge(cells[["target_stoc_len", "draft_stoc_len", "gamma", "cell_id"]])
    assert not merged.empty


def test_points_of_lengths_do_not_overlap(cells, blocks):
    scene = vl_convert.vegalite_to_scenegraph(
        categories_chart(by_category(Tally.of(blocks), resamples=50), cells).to_dict()
    )
    ys = sorted(item["y"] for item in items(scene["scenegraph"], "symbol"))
    assert len(ys) == 4  # 2 categories, 2 lengths
    assert min(b - a for a, b in pairwise(ys)) >= 9  # the diameter of a point


@pytest.mark.parametrize(("theme", "page"), [("light", 1.0), ("dark", 0.0091)])
def test_shades_of_lengths_have_contrast_three(theme, page, cells, blocks):
    """page: its luminance, of #ffffff and #14181e."""
    lengths = [8, 16, 32, 64, 128, 256]
    some = cells.iloc[[0] * len(lengths)].assign(target_stoc_len=lengths, stoc_len=lengths, draft_stoc_len=lengths)
    some["cell_id"] = [str(length) for length in lengths]
    table = (
        by_category(Tally.of(blocks), resamples=50).iloc[[0] * len(lengths)].assign(cell_id=some["cell_id"].tolist())
    )
    scene = vl_convert.vegalite_to_scenegraph(categories_chart(table, some).to_dict(), config=THEMES[theme])
    fills = {item["fill"] for item in items(scene["scenegraph"], "symbol")}
    assert len(fills) == len(lengths)
    for fill in fills:
        low, high = sorted((page, luminance(colour(fill))))
        assert (high + 0.05) / (low + 0.05) >= 3, fill
