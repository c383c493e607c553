"""The charts of the hardware model and of predictions: what Vega computes is what the model says."""

import numpy as np
import pytest
import vl_convert
from fake_cells import fake_keys, fake_metadata, fake_rows, fake_summary
from test_charts import layers, values
from test_charts_maps import items
from test_charts_picks import parameters

from scspec.charts import frontier_chart, hardware_chart, prediction_chart
from scspec.hardware import energy_ratio, modelled, speedup_at_once, speedup_in_turn, speedup_roofline
from scspec.stats import predicted_tau


def costed(*cells, **rows):
    """Summary of (keys, true alpha) with the columns of the hardware model."""
    blocks = [
        row for seed, (keys, alpha) in enumerate(cells) for row in fake_rows(keys, alpha=alpha, seed=seed, **rows)
    ]
    return modelled(fake_summary(blocks, resamples=50), {keys["cell_id"]: fake_metadata(keys) for keys, _ in cells})


@pytest.fixture(scope="module")
def cells():
    """A draft half as long as its target of 128 and one as long as it, at gamma 2 and 4; the latter agrees always."""
    return costed(
        *((fake_keys(draft_stoc_len=64, gamma=gamma), 0.7) for gamma in (2, 4)),
        *((fake_keys(gamma=gamma), 1) for gamma in (2, 4)),
    )


@pytest.fixture(scope="module")
def chart(cells):
    return vl_convert.vegalite_to_vega(hardware_chart(cells).to_dict())


def drawn(vega, gamma, rows_at_once, head="without LM head"):
    """quantity -> {(shape, draft_stoc_len): what Vega computed} at these positions of the sliders and of the choice."""
    sliders = {"gamma_slider": gamma, "rows_at_once": rows_at_once, "lm_head_macs": head}
    signals = [{**its, "value": sliders.get(its["name"], its.get("value"))} for its in vega["signals"]]
    scene = vl_convert.vega_to_scenegraph({**vega, "signals": signals})["scenegraph"]
    found = {"speedup over plain decoding": {}, "energy per token, plain decoding = 1": {}}
    for item in items(scene, "symbol"):
        said = dict(part.split(": ", 1) for part in item["description"].split("; "))
        (quantity,) = found.keys() & said.keys()
        found[quantity][item["shape"], int(said["draft stoc_len (cycles)"])] = float(said[quantity])
    return dict(zip(("speedup", "energy"), found.values(), strict=True))


def pooled_alpha(cells, draft):
    its = cells[cells["draft_stoc_len"] == draft]
    return np.average(its["alpha"], weights=its["tokens"])


@pytest.mark.parametrize("gamma", [1, 16])
@pytest.mark.parametrize("rows_at_once", [1, 2, 32])
def test_sliders_compute_what_the_model_says(cells, chart, gamma, rows_at_once):
    """At P = 1 rows take turns, from P = gamma + 1 on all are done at once, between them in groups."""
    found = drawn(chart, gamma, rows_at_once)
    for draft in (64, 128):
        tau, c = predicted_tau(pooled_alpha(cells, draft), gamma), draft / 128
        speedup = speedup_roofline(tau, gamma, (c, 0), (1, 0), rows_at_once=rows_at_once, cycles_per_byte=0)
        if rows_at_once == 1:
            assert speedup == pytest.approx(float(speedup_in_turn(tau, gamma, c)))
        if rows_at_once > gamma:
            assert speedup == pytest.approx(float(speedup_at_once(tau, gamma, c)))
        assert found["speedup"]["circle", draft] == pytest.approx(float(speedup), rel=1e-6)
        assert found["energy"]["circle", draft] == pytest.approx(float(energy_ratio(tau, gamma, c)), rel=1e-6)


def test_tokens_weigh_the_alpha_of_cells_that_differ_in_gamma(cells):
    assert pooled_alpha(cells, 128) == 1
    its = cells[cells["draft_stoc_len"] == 64].assign(alpha=[0.2, 0.8], tokens=[100, 300])
    found = drawn(vl_convert.vegalite_to_vega(hardware_chart(its).to_dict()), 1, 32)
    assert found["speedup"]["circle", 64] == pytest.approx((1 + 0.65) / 1.5, rel=1e-6)


@pytest.mark.parametrize("gamma", [2, 4])
def test_measured_cells_of_the_gamma_are_diamonds(cells, chart, gamma):
    found = drawn(chart, gamma, 32)
    for draft in (64, 128):
        (cell,) = cells[(cells["draft_stoc_len"] == draft) & (cells["gamma"] == gamma)].to_dict("records")
        assert found["speedup"]["diamond", draft] == pytest.approx(cell["speedup_at_once"], rel=1e-6)
        assert found["energy"]["diamond", draft] == pytest.approx(cell["energy_ratio"], rel=1e-6)


def test_with_the_lm_heads_cells_are_what_the_model_says_with_them(cells):
    """Their draft's head is as large as their target's, so c is nearer to 1."""
    its = cells.assign(c_with_head=(1 + cells["c"]) / 2)
    vega = vl_convert.vegalite_to_vega(hardware_chart(its).to_dict())
    for head, column in (("without LM head", "c"), ("with LM head", "c_with_head")):
        found = drawn(vega, 2, 32, head)
        for cell in its[its["gamma"] == 2].to_dict("records"):
            of_cell = cell["tau"], 2, cell[column]
            at = "diamond", cell["draft_stoc_len"]
            assert found["speedup"][at] == pytest.approx(float(speedup_at_once(*of_cell)), rel=1e-6)
            assert found["energy"][at] == pytest.approx(float(energy_ratio(*of_cell)), rel=1e-6)
            predicted = predicted_tau(pooled_alpha(its, cell["draft_stoc_len"]), 2)
            of_point = float(speedup_at_once(predicted, 2, cell[column]))
            assert found["speedup"]["circle", cell["draft_stoc_len"]] == pytest.approx(of_point, rel=1e-6)
    choice = parameters(hardware_chart(its).to_dict())["lm_head_macs"]
    assert (choice["value"], choice["bind"]["options"]) == ("without LM head", ["without LM head", "with LM head"])


def test_no_diamonds_at_a_gamma_that_was_not_measured(chart):
    assert {shape for shape, _ in drawn(chart, 3, 32)["speedup"]} == {"circle"}


def test_sliders_start_at_the_largest_gamma_with_all_rows_at_once(cells):
    its = parameters(hardware_chart(cells).to_dict())
    gamma, rows = its["gamma_slider"], its["rows_at_once"]
    assert (gamma["value"], gamma["bind"]["min"], gamma["bind"]["max"], gamma["bind"]["step"]) == (4, 1, 16, 1)
    assert (rows["value"], rows["bind"]["min"], rows["bind"]["max"], rows["bind"]["step"]) == (32, 1, 32, 1)
    its = parameters(hardware_chart(cells.assign(gamma=40)).to_dict())
    assert (its["gamma_slider"]["value"], its["gamma_slider"]["bind"]["max"]) == (40, 40)
    assert its["rows_at_once"]["value"] == its["rows_at_once"]["bind"]["max"] == 41


def test_two_panels_with_the_line_at_one(cells):
    for panel, quantity in zip(hardware_chart(cells).to_dict()["hconcat"], ("speedup", "energy"), strict=True):
        even, line, bar, *points = panel["layer"]
        assert even["encoding"]["y"]["datum"] == 1
        assert {its["encoding"]["y"]["field"] for its in (line, *points)} == {quantity}
        assert (bar["encoding"]["y"]["field"], bar["encoding"]["y2"]["field"]) == (f"{quantity}_lo", f"{quantity}_hi")


def test_measured_against_predicted_tau(cells):
    spec = prediction_chart(cells).to_dict()
    diagonal, bar, point = spec["spec"]["layer"]
    assert (point["encoding"]["x"]["field"], point["encoding"]["y"]["field"]) == ("predicted_tau", "tau")
    assert (bar["encoding"]["y"]["field"], bar["encoding"]["y2"]["field"]) == ("tau_lo", "tau_hi")
    assert spec["resolve"]["scale"] == {"x": "independent", "y": "independent"}
    assert (spec["facet"]["field"], len(values(spec))) == ("gamma", 4)
    ends = [axis["field"] for name, axis in diagonal["encoding"].items() if name in ("x", "y", "x2", "y2")]
    assert sorted(ends) == ["end", "end", "start", "start"]
    few = costed((fake_keys(), 0.7), prompts=2, max_new_tokens=8)
    assert list(layers(prediction_chart(few).to_dict())) == ["rule", "circle"]


def test_the_diagonal_goes_from_one_to_gamma_and_one(cells):
    scene = vl_convert.vegalite_to_scenegraph(prediction_chart(cells[cells["gamma"] == 4]).to_dict())["scenegraph"]
    diagonal = next(item for item in items(scene, "rule") if "x2" in item and "y2" in item)
    assert (diagonal["x"], diagonal["y"], diagonal["x2"], diagonal.get("y2", 0)) == (0, 220, 220, 0)


def test_the_frontier_is_the_best_so_far(cells):
    table = cells.assign(quality_loss=[0.3, 0.1, 0.2, 0.1], speedup_over_shortest=[1.4, 0.9, 0.7, 1.1])
    spec = frontier_chart(table).to_dict()
    even, best, points = spec["layer"]
    assert even["encoding"]["y"]["datum"] == 1
    assert best["mark"]["interpolate"] == "step-after"
    steps = [(row["perplexity_ratio"], row["speedup_over_shortest"]) for row in spec["datasets"][best["data"]["name"]]]
    assert steps == [(1.1, 1.1), (1.2, 1.1), (1.3, 1.4)]
    assert (points["encoding"]["x"]["field"], points["encoding"]["y"]["field"]) == (
        "perplexity_ratio",
        "speedup_over_shortest",
    )
    assert points["encoding"]["x"]["scale"]["type"] == "log"
    assert len(values(spec)) == 4
    assert (spec["width"], spec["height"]) == (420, 200)
