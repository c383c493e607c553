"""Heatmaps of alpha: which cells they show, the mean over seeds, and figures that can be read."""

import json

import numpy as np
import pytest
import vl_convert
from fake_cells import SKIPPED, fake_keys
from scenes import items
from test_charts import luminance, summary_of, values

from scspec.charts import length_map, precision_map


def map_layers(spec):
    rect, text = spec["spec"]["layer"]
    assert (rect["mark"]["type"], text["mark"]["type"]) == ("rect", "text")
    return rect["encoding"], text["encoding"]


@pytest.fixture(scope="module")
def cells():
    grid = [
        (fake_keys(stoc_len=length, draft_stoc_len=round(ratio * length), gamma=gamma, sc_prec=bits), 0.6)
        for length, bits in ((32, 6), (32, 8), (64, 6), (64, 8), (128, 8))
        for ratio in (1, 1 / 2)
        for gamma in (2, 4)
    ]
    return summary_of(grid, prompts=8, max_new_tokens=8)


def test_length_by_precision_in_a_panel_a_gamma(cells):
    spec = precision_map(cells).to_dict()
    rect, text = map_layers(spec)
    for encoding in (rect, text):
        assert (encoding["x"]["field"], encoding["y"]["field"]) == ("target_stoc_len", "sc_prec")
        assert (encoding["x"]["scale"]["domain"], encoding["y"]["scale"]["domain"]) == ([32, 64, 128], [8, 6])
    assert (rect["color"]["field"], text["text"]["field"]) == ("alpha", "alpha")
    assert rect["color"]["scale"] == {"scheme": "viridis", "domain": [0, 1]}
    assert (spec["facet"]["field"], spec["columns"]) == ("gamma", 2)
    assert len(values(spec)) == 20
    (row,) = [
        row
        for row in values(spec)
        if (row["draft"], row["target_stoc_len"], row["sc_prec"], row["gamma"]) == ("1/2 as long", 64, 6, 4)
    ]
    its = (cells["draft_stoc_len"] == 32) & (cells["target_stoc_len"] == 64) & (cells["sc_prec"] == 6)
    (alpha,) = cells.loc[its & (cells["gamma"] == 4), "alpha"]
    assert row["alpha"] == pytest.approx(alpha, abs=1e-6)


def test_draft_length_by_target_length(cells):
    spec = length_map(cells).to_dict()
    rect, _ = map_layers(spec)
    assert (rect["x"]["field"], rect["y"]["field"]) == ("target_stoc_len", "draft_stoc_len")
    assert rect["y"]["scale"]["domain"] == [128, 64, 32, 16]
    assert [its["name"] for its in spec["params"]] == ["sc_prec_choice"]
    assert len(values(spec)) == 20


def test_drafts_that_differ_in_more_than_the_length_are_picked():
    keys = [fake_keys(), fake_keys(draft_settings=SKIPPED, cell_id="skipped")]
    spec = length_map(summary_of([(its, 0.6) for its in keys], prompts=2)).to_dict()
    (pick,) = spec["params"]
    assert (pick["name"], pick["bind"]["options"]) == ("other_choice", ["4 layers skipped", "nothing"])


@pytest.mark.parametrize("chart", [precision_map, length_map])
def test_seeds_are_averaged_and_counted(chart):
    cells = [(fake_keys(sc_seed=seed), 0.3 + 0.2 * seed) for seed in (0, 1, 2)]
    cells.append((fake_keys(stoc_len=64), 0.5))
    summary = summary_of(cells, prompts=8)
    spec = chart(summary).to_dict()
    one, several = sorted(values(spec), key=lambda row: row["cells"])
    alphas = summary["alpha"][:3]
    assert (one["cells"], several["cells"]) == (1, 3)
    assert several["alpha"] == pytest.approx(alphas.mean(), abs=1e-6)
    assert several["range"] == f"{alphas.min():.3f} to {alphas.max():.3f}"
    assert several["interval"] is None
    assert (one["range"], " to " in one["interval"]) == ("-", True)
    titles = [its["title"] for its in map_layers(spec)[0]["tooltip"]]
    assert "alpha, mean of the cells" in titles
    titles = [its["title"] for its in map_layers(chart(summary[:1]).to_dict())[0]["tooltip"]]
    assert "alpha" in titles
    assert "cells" not in titles


def test_figures_stand_out_from_their_cells():
    """Contrast 4.5 (WCAG 2.1) at every alpha; black or white, whichever is further away, always has it."""
    alphas = np.linspace(0, 1, 101)
    row = summary_of([(fake_keys(), 0.6)], prompts=2).iloc[[0] * len(alphas)]
    row = row.assign(
        alpha=alphas, target_stoc_len=range(1, len(alphas) + 1), cell_id=[str(i) for i in range(len(alphas))]
    )
    scene = vl_convert.vegalite_to_scenegraph(precision_map(row).to_dict())["scenegraph"]
    fills = [item["fill"] for item in items(scene, "rect")]
    inks = [{"black": 0.0, "white": 1.0}[item["fill"]] for item in items(scene, "text")]
    assert len(fills) == len(inks) == len(alphas)
    for fill, ink in zip(fills, inks, strict=True):
        low, high = sorted((ink, luminance(colour(fill))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, fill


def colour(fill):
    """rgb(1, 2, 3) as #010203."""
    if fill.startswith("#"):
        return fill
    return "#" + "".join(f"{int(part):02x}" for part in fill[4:-1].split(","))


def test_maps_name_no_colours_of_their_own(cells):
    for chart in (precision_map, length_map):
        assert "#" not in json.dumps(chart(cells).to_dict())
