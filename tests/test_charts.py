"""Charts through `to_dict()`: what is encoded, how many panels, and what is left out."""

import json

import pandas as pd
import pytest
import vl_convert
from fake_cells import CONTROL_ALPHAS, SKIPPED, fake_grid, fake_keys, fake_rows, fake_summary
from scenes import items

from scspec.charts import (
    THEMES,
    alpha_chart,
    controls_chart,
    draft_labels,
    interval_text,
    number,
    quality_chart,
    tau_chart,
    unscrambled,
)
from scspec.stats import PLATFORM_COLUMNS


def summary_of(cells, **rows):
    """Summary of a grid of (keys, true alpha)."""
    blocks = [
        row for seed, (keys, alpha) in enumerate(cells) for row in fake_rows(keys, alpha=alpha, seed=seed, **rows)
    ]
    return fake_summary(blocks, resamples=50)


def grid_and_controls(**changed):
    summary = summary_of(fake_grid(**changed), prompts=8, max_new_tokens=12)
    return summary[summary["arm"] == "sc_sc"], summary[summary["arm"] != "sc_sc"]


@pytest.fixture(scope="module")
def grid():
    return grid_and_controls(pairs=("smollm2-shorter",))[0]


@pytest.fixture(scope="module")
def controls():
    return grid_and_controls(pairs=("smollm2-shorter",), stoc_lens=(64,), gammas=(2,))[1]


def layers(spec):
    return {layer["mark"]["type"]: layer for layer in spec.get("spec", spec)["layer"]}


def values(spec):
    return spec["datasets"][spec["data"]["name"]]


def titles(tooltips):
    return [tooltip["title"] for tooltip in tooltips]


@pytest.mark.parametrize(("chart", "quantity"), [(alpha_chart, "alpha"), (tau_chart, "tau")])
def test_points_lines_and_bars(grid, chart, quantity):
    spec = chart(grid).to_dict()
    found = layers(spec)
    point, line, rule, area = (found[mark]["encoding"] for mark in ("point", "line", "rule", "area"))
    assert point["y"]["field"] == line["y"]["field"] == quantity
    for encoding in (rule, area):
        assert (encoding["y"]["field"], encoding["y2"]["field"]) == (f"{quantity}_lo", f"{quantity}_hi")
    assert line["detail"]["field"] == area["detail"]["field"] == "curve"
    assert area["opacity"]["condition"]["value"] == 0.12
    for encoding in (point, line, rule, area):
        assert encoding["color"]["field"] == "draft"
    assert {"alpha", "alpha, 95 % interval", "prompts", "cell"} <= set(titles(point["tooltip"]))
    row = next(row for row in values(spec) if row["gamma"] == 4 and row["draft_stoc_len"] == 56)
    (cell,) = grid[(grid["gamma"] == 4) & (grid["draft_stoc_len"] == 56)].to_dict("records")
    for name in (quantity, f"{quantity}_lo", f"{quantity}_hi"):
        assert row[name] == pytest.approx(cell[name], abs=1e-12)


@pytest.mark.parametrize("chart", [alpha_chart, tau_chart])
def test_lengths_are_the_ticks_of_a_log2_axis(grid, chart):
    x = layers(chart(grid).to_dict())["point"]["encoding"]["x"]
    assert (x["scale"]["type"], x["scale"]["base"]) == ("log", 2)
    assert x["axis"]["values"] == [64, 128, 256]
    assert "clock cycles" in x["title"]


@pytest.mark.parametrize("chart", [alpha_chart, tau_chart])
def test_drafts_are_moved_apart_but_by_less_than_a_tenth_of_an_octave(grid, chart):
    for row in values(chart(grid).to_dict()):
        assert 2**-0.1 < row["x"] / row["target_stoc_len"] < 2**0.1
    assert len({row["x"] for row in values(chart(grid).to_dict())}) == 9  # 3 lengths, 3 drafts


def test_a_panel_per_gamma(grid):
    spec = alpha_chart(grid).to_dict()
    assert (spec["facet"]["field"], spec["facet"]["type"]) == ("gamma", "ordinal")
    assert spec["columns"] == 2
    assert {row["gamma"] for row in values(spec)} == {2, 4}


def test_panels_are_in_the_order_of_numbers():
    cells = [(fake_keys(gamma=gamma), 0.6) for gamma in (16, 2, 8)]
    scene = vl_convert.vegalite_to_scenegraph(alpha_chart(summary_of(cells, prompts=2)).to_dict())["scenegraph"]
    headers = [item["text"] for item in items(scene, "text", role="title-text")]
    assert [text for text in headers if "gamma" in text] == ["gamma = 2", "gamma = 8", "gamma = 16"]


@pytest.mark.parametrize(("gammas", "columns"), [(1, 1), (3, 3), (4, 4), (5, 3), (8, 4), (9, 3)])
def test_panels_fill_rows_of_at_most_four(gammas, columns):
    cells = [(fake_keys(gamma=gamma + 1), 0.6) for gamma in range(gammas)]
    assert alpha_chart(summary_of(cells, prompts=1, max_new_tokens=4)).to_dict()["columns"] == columns


@pytest.mark.parametrize("chart", [alpha_chart, tau_chart])
def test_one_precision_is_drawn_at_a_time(chart):
    cells = [(fake_keys(stoc_len=32, gamma=gamma, sc_prec=bits), bits / 10) for gamma in (2, 4) for bits in (6, 8)]
    scene = vl_convert.vegalite_to_scenegraph(chart(summary_of(cells, prompts=2)).to_dict())["scenegraph"]
    said = [item["description"] for item in items(scene, "symbol")]
    assert [(text.count("sc_prec (bits): 8"), text.count("sc_prec (bits): 6")) for text in said] == [(1, 0), (1, 0)]


def test_scales_hold_what_alpha_and_tau_can_be(grid):
    assert layers(alpha_chart(grid).to_dict())["point"]["encoding"]["y"]["scale"]["domain"] == [0, 1]
    spec = tau_chart(grid).to_dict()
    assert layers(spec)["point"]["encoding"]["y"]["scale"]["domain"] == [1, 5]
    ceiling = spec["spec"]["layer"][0]
    assert (ceiling["mark"]["type"], ceiling["encoding"]["y"]["field"]) == ("rule", "ceiling")
    assert {row["gamma"]: row["ceiling"] for row in values(spec)} == {2: 3, 4: 5}


def test_no_intervals_below_eight_prompts():
    summary = summary_of(fake_grid(pairs=("smollm2-shorter",)), prompts=7, max_new_tokens=12)
    grid = summary[summary["arm"] == "sc_sc"]
    assert list(layers(alpha_chart(grid).to_dict())) == ["point"]
    ceiling, *rest = tau_chart(grid).to_dict()["spec"]["layer"]
    assert [layer["mark"]["type"] for layer in rest] == ["point"]
    assert "y2" not in ceiling["encoding"]
    assert {row["alpha_interval"] for row in values(alpha_chart(grid).to_dict())} == {"none (fewer than 8 prompts)"}


def test_the_unscrambled_length_is_marked(grid):
    spec = alpha_chart(grid).to_dict()
    shape = layers(spec)["point"]["encoding"]["shape"]
    assert shape["scale"]["domain"][1].startswith("not scrambled")
    marked = {row["target_stoc_len"] for row in values(spec) if row["streams"].startswith("not")}
    assert marked == {256}
    shorter = layers(alpha_chart(grid[grid["stoc_len"] < 256]).to_dict())["point"]["encoding"]["shape"]
    assert shorter["legend"] is None


def test_halving_scrambles_every_length():
    halved = json.dumps({"sc_halve_bipolar": True})
    cells = summary_of(
        [(fake_keys(stoc_len=256), 0.6), (fake_keys(stoc_len=256, target_settings=halved, cell_id="h"), 0.6)]
    )
    assert unscrambled(cells).tolist() == [True, False]
    float_target = summary_of([(fake_keys(arm="float_sc"), 0.6)])
    assert unscrambled(float_target).tolist() == [False]


def test_greedy_and_sampled_cells_and_pairs_never_share_a_chart(grid):
    sampled = grid.assign(do_sample=True)
    for chart in (alpha_chart, tau_chart, controls_chart):
        with pytest.raises(ValueError, match="one do_sample"):
            chart(pd.concat([grid, sampled]))
        with pytest.raises(ValueError, match="one pair"):
            chart(pd.concat([grid, grid.assign(pair="other")]))
    assert "sampled" in alpha_chart(sampled).to_dict()["description"]
    assert "greedy" in alpha_chart(grid).to_dict()["description"]


def test_greedy_agreement_and_sampled_overlap_have_names_of_their_own(grid, controls):
    for do_sample, title in ((False, "alpha (agreement per emitted token)"), (True, "alpha (mean overlap per emitted")):
        curves = alpha_chart(grid.assign(do_sample=do_sample)).to_dict()
        assert layers(curves)["point"]["encoding"]["y"]["title"].startswith(title)
        chart = controls_chart(controls.assign(do_sample=do_sample)).to_dict()
        assert layers(chart)["circle"]["encoding"]["x"]["title"].startswith(title)


@pytest.mark.parametrize("name", PLATFORM_COLUMNS)
@pytest.mark.parametrize("chart", [alpha_chart, tau_chart, controls_chart])
def test_platforms_never_share_a_chart(grid, chart, name):
    with pytest.raises(ValueError, match=f"one {name}, got"):
        chart(pd.concat([grid, grid.assign(**{name: "another"})]))


def test_a_line_joins_cells_that_differ_in_the_length_only():
    cells = [(fake_keys(stoc_len=length, sc_seed=seed), 0.6) for length in (64, 128) for seed in (0, 1)]
    spec = alpha_chart(summary_of(cells, prompts=8)).to_dict()
    assert len({(row["curve"], row["target_stoc_len"]) for row in values(spec)}) == 4
    assert len({row["curve"] for row in values(spec)}) == 2
    assert len({row["draft"] for row in values(spec)}) == 1


def labels(*sides, **changed):
    """Labels of drafts whose (target, draft) lengths are given."""
    cells = [(fake_keys(stoc_len=target, draft_stoc_len=draft, **changed), 0.6) for target, draft in sides]
    return draft_labels(summary_of(cells, prompts=1, max_new_tokens=4))


def test_drafts_are_named_by_what_sets_them_apart():
    assert labels((64, 56), (128, 112), (128, 64)) == ["7/8 as long", "7/8 as long", "1/2 as long"]
    assert labels((64, 64), (128, 128)) == ["same length", "same length"]
    assert labels((64, 32), (128, 32)) == ["32 cycles", "32 cycles"]
    assert labels((64, 64), draft_settings=SKIPPED) == ["same length, 4 layers skipped"]
    assert labels((32, 32), draft_sc_prec=6) == ["same length, 6 bit"]
    assert draft_labels(summary_of([(fake_keys(arm="sc_float"), 0.6)])) == ["float"]


def test_modules_with_streams_of_their_own_set_drafts_apart():
    mixed, other = {"*.mlp.*": {"sc_stoc_len": 64, "sc_prec": 7}}, {"lm_head": {"sc_prec": 6}}
    settings = [({}, {}), (mixed, mixed), (mixed, other)]
    names = ("target_settings", "draft_settings")
    cells = [
        {**fake_keys(), **{name: json.dumps({"sc_modules": own}) for name, own in zip(names, pair, strict=True)}}
        for pair in settings
    ]
    assert draft_labels(pd.DataFrame(cells)) == [
        "same length",
        "same length, *.mlp.* 64 cycles 7 bit",
        "same length, target's *.mlp.* 64 cycles 7 bit, draft's lm_head 6 bit",
    ]


def test_controls_lie_in_one_row_an_arm_with_the_expected_value(controls):
    spec = controls_chart(controls).to_dict()
    found = layers(spec)
    circle = found["circle"]["encoding"]
    assert (circle["x"]["field"], circle["x"]["scale"]["domain"]) == ("alpha", [0, 1])
    assert circle["y"]["sort"] == [
        "float target, float draft",
        "SC target, float draft",
        "float target, SC draft",
        "identity: draft = target",
        "reseed: independent streams",
    ]
    assert found["tick"]["encoding"]["x"]["field"] == "expected"
    assert {row["label"] for row in values(spec) if row["expected"] == 1} == {"identity: draft = target"}
    assert [row["expected"] for row in values(spec)].count(None) == 4


def test_controls_at_several_settings_have_rows_of_their_own():
    cells = [(fake_keys(arm="identity", stoc_len=length, gamma=gamma), 1) for length in (64, 128) for gamma in (2, 4)]
    spec = controls_chart(summary_of(cells, prompts=2)).to_dict()
    rows = [f"identity: draft = target, {length} cycles, gamma {gamma}" for length in (64, 128) for gamma in (2, 4)]
    assert layers(spec)["circle"]["encoding"]["y"]["sort"] == rows
    mixed = [(fake_keys(arm=arm, sc_seed=seed), 1) for arm in ("reseed", "float_float") for seed in (0, 1)][:3]
    rows = [
        "float target, float draft",
        "reseed: independent streams, sc_seed 0",
        "reseed: independent streams, sc_seed 1",
    ]
    spec = controls_chart(summary_of(mixed, prompts=2)).to_dict()
    assert layers(spec)["circle"]["encoding"]["y"]["sort"] == rows


def test_grid_cells_stand_between_the_controls_of_their_point():
    """Of the grid at two lengths and gammas, one row a draft where the controls were run, the longest draft first."""
    summary = summary_of(fake_grid(pairs=("smollm2-shorter",)), prompts=2, max_new_tokens=6)
    other = summary[summary["arm"] == "sc_sc"].assign(sc_seed=1)
    spec = controls_chart(pd.concat([other, summary])).to_dict()
    rows = layers(spec)["circle"]["encoding"]["y"]["sort"]
    drafts = [f"SC target, SC draft, {ratio} as long" for ratio in ("7/8", "3/4", "1/2")]
    assert rows[3:6] == drafts
    assert len(rows) == len(values(spec)) == len(CONTROL_ALPHAS) + 3
    shown = [row for row in values(spec) if row["label"] in drafts]
    assert {(row["target_stoc_len"], row["gamma"]) for row in shown} == {(256, 4)}
    assert {row["expected"] for row in shown} == {None}


def test_settings_in_which_controls_differ_are_said_of_grid_cells_too():
    cells = [(fake_keys(arm=arm, stoc_len=length), 0.6) for length in (64, 128) for arm in ("sc_sc", "identity")]
    spec = controls_chart(summary_of(cells, prompts=2)).to_dict()
    grid = [f"SC target, SC draft, same length, {length} cycles" for length in (64, 128)]
    assert layers(spec)["circle"]["encoding"]["y"]["sort"][:2] == grid


def test_no_control_at_an_sc_target_no_grid_cells():
    cells = [(fake_keys(arm=arm), 0.6) for arm in ("sc_sc", "float_float", "float_sc")]
    spec = controls_chart(summary_of(cells, prompts=2)).to_dict()
    assert [row["label"] for row in values(spec)] == ["float target, float draft", "float target, SC draft"]


def test_charts_take_their_colours_from_the_theme(grid, controls):
    for spec in (alpha_chart(grid).to_dict(), controls_chart(controls).to_dict()):
        assert "#" not in json.dumps(spec)
    for theme in THEMES.values():
        assert theme["background"] is None
        assert theme["axis"]["labelFlush"] is False
        assert len(set(theme["range"]["category"])) == 6


def luminance(colour):
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("theme", "page"), [("light", "#ffffff"), ("dark", "#14181e")])
def test_marks_have_contrast_three_and_text_four_and_a_half(theme, page):
    def contrast(colour):
        low, high = sorted((luminance(colour), luminance(page)))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(colour) for colour in THEMES[theme]["range"]["category"]) >= 3
    for part in ("axis", "legend", "header"):
        assert min(contrast(THEMES[theme][part][name]) for name in ("labelColor", "titleColor")) >= 4.5


def test_intervals_in_words():
    assert interval_text(0.4, 0.31, 0.46, "bootstrap") == "0.310 to 0.460"
    assert interval_text(1, 0.83, 1.0, "one-sided") == "at least 0.830"
    assert interval_text(0, 0.0, 0.17, "one-sided") == "at most 0.170"
    assert interval_text(1, 1.0, 1.4, "one-sided") == "at most 1.400"
    assert interval_text(5, 2.9, 5, "one-sided") == "at least 2.900"
    assert interval_text(0.4, float("nan"), float("nan"), "none") == "none (fewer than 8 prompts)"


def test_numbers_near_the_ends_do_not_look_exact():
    assert [number(x) for x in (1, 0, 0.5, 2.25)] == ["1.000", "0.000", "0.500", "2.250"]
    assert number(0.99999) == "1 - 1.0e-05"
    assert number(0.00001) == "1.0e-05"
    assert number(float("nan")) == "undefined"


def test_quality_is_the_distance_to_the_right(grid):
    measured = grid.assign(quality_loss=0.25, perplexity=5.0, float_perplexity=4.0, target_tv=0.1, target_kl=0.2)
    spec = quality_chart(measured).to_dict()
    point, label = spec["layer"]
    assert (point["encoding"]["x"]["field"], point["encoding"]["y"]["field"]) == ("perplexity_ratio", "alpha")
    assert label["encoding"]["text"]["field"] == "target_stoc_len"
    assert label["encoding"]["y"] == {"aggregate": "max", "field": "alpha", "type": "quantitative"}
    assert {(row["quality_loss"], row["perplexity_ratio"]) for row in values(spec)} == {(0.25, 1.25)}
    assert len(values(spec)) == len(grid)
    with pytest.raises(ValueError, match="one pair"):
        quality_chart(pd.concat([measured, measured.assign(pair="another")]))
