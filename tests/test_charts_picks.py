"""What a reader picks in charts, and that every chart compiles for a browser."""

import json

import pandas as pd
import pytest
import vl_convert
from fake_cells import as_blocks, fake_grid, fake_keys, fake_metadata, fake_rows, fake_summary

from scspec.charts import (
    THEMES,
    alpha_chart,
    categories_chart,
    controls_chart,
    frontier_chart,
    hardware_chart,
    length_map,
    positions_chart,
    precision_map,
    prediction_chart,
    quality_chart,
    tau_chart,
)
from scspec.hardware import modelled
from scspec.stats import Tally, by_category, positions

QUALITY = {"perplexity": 5.0, "float_perplexity": 4.0, "target_tv": 0.1, "target_kl": 0.2}


def charts_of(cells, **rows):
    """name -> specification of every chart of some (keys, true alpha)."""
    blocks = [
        row for seed, (keys, alpha) in enumerate(cells) for row in fake_rows(keys, alpha=alpha, seed=seed, **rows)
    ]
    metadata = {keys["cell_id"]: fake_metadata(keys) for keys, _ in cells}
    summary = modelled(fake_summary(blocks, resamples=50), metadata)
    summary = summary.assign(
        **QUALITY,
        quality_loss=8 / summary["target_stoc_len"].astype(float),
        speedup_over_shortest=summary["speedup_at_once"],
    )
    grid = summary[summary["arm"] == "sc_sc"]
    blocks = as_blocks([row for row in blocks if row["arm"] == "sc_sc"])
    charts = {
        "alpha": alpha_chart(grid),
        "tau": tau_chart(grid),
        "controls": controls_chart(summary),
        "precision": precision_map(grid),
        "length": length_map(grid),
        "positions": positions_chart(positions(Tally.of(blocks), resamples=50), grid),
        "categories": categories_chart(by_category(Tally.of(blocks), resamples=50), grid),
        "prediction": prediction_chart(grid),
        "hardware": hardware_chart(grid),
        "quality": quality_chart(grid),
        "frontier": frontier_chart(grid),
    }
    return {name: chart.to_dict() for name, chart in charts.items()}


@pytest.fixture(scope="module")
def grid():
    """Several lengths, gammas, precisions and drafts, with intervals."""
    cells = fake_grid(pairs=("smollm2-shorter",), stoc_lens=(64, 128))
    cells += [(fake_keys(stoc_len=64, draft_stoc_len=56, gamma=gamma, sc_prec=7), 0.5) for gamma in (2, 4)]
    return charts_of(cells, prompts=8, max_new_tokens=12)


@pytest.fixture(scope="module")
def one_cell():
    """A grid of one cell and a control, without intervals."""
    return charts_of([(fake_keys(), 0.6), (fake_keys(arm="identity"), 1)], prompts=2, max_new_tokens=12)


BY_DRAFT = ("alpha", "tau", "prediction", "hardware", "quality", "frontier")
PANELS = ("alpha", "tau", "prediction", "precision", "length", "positions")
DROPDOWNS = {
    "alpha": {"sc_prec_choice": [8, 7]},
    "tau": {"sc_prec_choice": [8, 7]},
    "precision": {"draft_choice": ["7/8 as long", "3/4 as long", "1/2 as long"]},
    "length": {"sc_prec_choice": [8, 7]},
    "positions": {"draft_choice": ["7/8 as long", "3/4 as long", "1/2 as long"], "sc_prec_choice": [8, 7]},
    "categories": {
        "draft_choice": ["7/8 as long", "3/4 as long", "1/2 as long"],
        "gamma_choice": [4, 2],
        "sc_prec_choice": [8, 7],
    },
    "hardware": {"sc_prec_choice": [8, 7]},
}


def parameters(spec):
    return {its["name"]: its for its in spec.get("params", [])}


@pytest.mark.parametrize("name", BY_DRAFT)
def test_a_click_in_the_legend_picks_drafts(grid, one_cell, name):
    for spec in (grid[name], one_cell[name]):
        pick = parameters(spec)["draft_pick"]
        assert (pick["select"], pick["bind"]) == ({"type": "point", "fields": ["draft"]}, "legend")


@pytest.mark.parametrize("name", BY_DRAFT)
def test_the_legend_hears_clicks_and_has_one_store_for_all_panels(grid, one_cell, name):
    for spec in (grid[name], one_cell[name]):
        vega = vl_convert.vegalite_to_vega(spec)
        assert [data["name"] for data in vega["data"]].count("draft_pick_store") == 1
        (legend,) = [its for its in vega["legends"] if its["title"] == "draft's streams"]
        assert legend["encode"]["symbols"]["name"] == "draft_legend_symbols"
        assert legend["encode"]["symbols"]["interactive"]
        assert legend["encode"]["symbols"]["update"]["opacity"][0]["value"] == 1


@pytest.mark.parametrize("name", BY_DRAFT)
def test_what_is_not_picked_fades(grid, name):
    spec = grid[name]
    panels = spec.get("hconcat") or [spec.get("spec", spec)]
    by_draft = [layer for panel in panels for layer in panel["layer"] if "color" in layer["encoding"]]
    assert by_draft
    for layer in by_draft:
        opacity = layer["encoding"]["opacity"]
        assert opacity["condition"]["param"] == "draft_pick"
        assert opacity["value"] == pytest.approx(0.12 * opacity["condition"]["value"])


@pytest.mark.parametrize("name", [name for name in DROPDOWNS if name not in BY_DRAFT])
def test_charts_without_drafts_in_the_legend_hold_no_pick(grid, name):
    assert "draft_pick" not in json.dumps(grid[name])


def test_dropdowns_pick_what_a_chart_does_not_spread_out(grid):
    for name, spec in grid.items():
        selects = [its for its in spec.get("params", []) if its.get("bind", {}) != "legend"]
        selects = [its for its in selects if its["bind"]["input"] == "select"]
        assert {its["name"]: its["bind"]["options"] for its in selects} == DROPDOWNS.get(name, {}), name
        assert [its["value"] for its in selects] == [its["bind"]["options"][0] for its in selects]
        for its in selects:
            assert json.dumps(spec).count(f" === {its['name']})") >= 1, "the dropdown picks nothing"


def test_no_dropdown_where_there_is_no_choice(one_cell):
    for name, spec in one_cell.items():
        assert [param for param in parameters(spec) if param.endswith("_choice")] == [], name


@pytest.mark.parametrize("theme", THEMES)
def test_every_chart_compiles_and_is_drawn(grid, one_cell, theme):
    for charts in (grid, one_cell):
        for name, spec in charts.items():
            drawn = vl_convert.vegalite_to_svg(spec, config=THEMES[theme])
            assert "NaN" not in drawn, name
            assert 'class="mark-' in drawn


def test_the_page_sizes_panels_by_these_signals(grid):
    """Vega's names for the width of panels, and of charts of equal width side by side."""
    for name, spec in grid.items():
        signals = [its["name"] for its in vl_convert.vegalite_to_vega(spec).get("signals", [])]
        assert ("child_width" in signals) == (name in PANELS), name
        assert ("childWidth" in signals) == (name == "hardware"), name


def test_every_chart_has_a_text_alternative(grid):
    for name, spec in grid.items():
        assert "pair smollm2-shorter, greedy decoding" in spec["description"], name


def test_marks_to_hover_over_say_numbers_and_intervals(grid):
    for name, spec in grid.items():
        panels = spec.get("hconcat") or [spec.get("spec", spec)]
        hovered = [
            layer["encoding"]["tooltip"]
            for panel in panels
            for layer in panel["layer"]
            if "tooltip" in layer["encoding"]
        ]
        assert hovered, name
        said = [its["title"] for tooltip in hovered for its in tooltip]
        assert any("95 % interval" in title for title in said), name


@pytest.mark.parametrize(
    "chart", [precision_map, length_map, prediction_chart, hardware_chart, quality_chart, frontier_chart]
)
def test_pairs_never_share_a_chart(chart):
    cells = pd.DataFrame([{**fake_keys(pair), "device_name": "", "dtype": ""} for pair in ("one", "other")])
    with pytest.raises(ValueError, match="one pair"):
        chart(cells)


@pytest.mark.parametrize("chart", [positions_chart, categories_chart])
def test_pairs_never_share_a_chart_of_parts(chart):
    cells = pd.DataFrame([{**fake_keys(pair), "device_name": "", "dtype": ""} for pair in ("one", "other")])
    with pytest.raises(ValueError, match="one pair"):
        chart(pd.DataFrame(), cells)
