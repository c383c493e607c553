"""The hardware model against numbers worked by hand, and against arrays simulated row by row and tile by tile."""

import heapq
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hardware_cases import ATTENTION, LINEAR, LM_HEAD, close_to, mac_cycles, smollm2
from tiny import save_tiny_model

from scspec.hardware import (
    cost_per_token,
    energy_ratio,
    macs_per_token,
    modelled,
    module_macs,
    pass_cycles,
    relative_cost,
    sc_mac_share,
    speedup_at_once,
    speedup_in_turn,
    speedup_over_other_length,
    speedup_roofline,
    total_cost,
)
from scspec.sc.knobs import PRESETS

NO_MEMORY_BOUND = {"cycles_per_byte": 0}


def test_macs_of_smollm2_by_hand():
    macs = module_macs(smollm2())
    assert len(macs) == 30 * 8 + 1
    layer = {name.removeprefix("model.layers.29."): count for name, count in macs.items() if ".29." in name}
    assert layer == {
        "self_attn.q_proj": 331_776,
        "self_attn.k_proj": 110_592,
        "self_attn.v_proj": 110_592,
        "self_attn": 294_912,
        "self_attn.o_proj": 331_776,
        "mlp.gate_proj": 884_736,
        "mlp.up_proj": 884_736,
        "mlp.down_proj": 884_736,
    }
    assert macs["lm_head"] == LM_HEAD
    assert macs_per_token(smollm2()) == {"linear": LINEAR, "attention": ATTENTION, "lm_head": LM_HEAD}
    assert macs_per_token(smollm2(), context_tokens=512)["attention"] == 2 * ATTENTION


def test_the_share_under_sc_by_hand():
    total = 143_327_232
    assert sc_mac_share(smollm2()) == 115_015_680 / total
    assert sc_mac_share(smollm2(use_sc_attn=False)) == 106_168_320 / total
    assert sc_mac_share(smollm2(sc_lm_head=True)) == 1
    assert sc_mac_share(smollm2(preset=PRESETS["float"])) == 0


@pytest.fixture(scope="module")
def skipping_model(tmp_path_factory):
    """A tiny model of whose three layers the middle one is skipped."""
    from scspec.models import load_model

    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))), skip_layers=(1,))


def test_modules_are_those_of_a_patched_model_also_where_layers_are_skipped(skipping_model):
    from scspec.sc.linear import SCLinear

    linears = {
        name: module.in_features * module.out_features
        for name, module in skipping_model.named_modules()
        if isinstance(module, SCLinear)
    }
    assert len(linears) == 2 * 7 + 1
    macs = module_macs(skipping_model.config)
    products = {name: macs.pop(name) for name in list(macs) if name not in linears}
    assert macs == linears
    # 4 heads of 12 dimensions, 256 positions, q k^T and p v
    assert products == {"model.layers.0.self_attn": 24_576, "model.layers.1.self_attn": 24_576}
    assert all(skipping_model.get_submodule(name) for name in products)
    assert cost_per_token(skipping_model.config)["linear"]["mac_cycles"] == 128 * sum(
        count for name, count in linears.items() if name != "lm_head"
    )


def test_cost_of_smollm2_by_hand():
    cost = cost_per_token(smollm2(sc_stoc_len=96))
    assert cost == {
        "linear": {"macs": LINEAR, "mac_cycles": 10_192_158_720, "weight_bytes": 106_168_320},
        "attention": {"macs": ATTENTION, "mac_cycles": 849_346_560, "weight_bytes": 0},
        "lm_head": {"macs": LM_HEAD, "mac_cycles": 2_717_908_992, "weight_bytes": 28_311_552},
    }
    assert json.loads(json.dumps(cost)) == cost
    assert total_cost(cost, "mac_cycles", lm_head=False) == 11_041_505_280
    assert total_cost(cost, "mac_cycles", lm_head=True) == 13_759_414_272
    assert total_cost(cost, "weight_bytes", lm_head=True) == 134_479_872


@pytest.mark.parametrize(
    ("knobs", "stoc_len"),
    [
        ({}, 128),
        ({"sc_halve_bipolar": False}, 256),
        ({"sc_mode": "unipolar"}, 256),
        ({"sc_prec": 6}, 32),
        ({"sc_stoc_len": 200}, 200),  # given, so kept, although 2**(8 - 1) is less
    ],
)
def test_the_length_is_the_one_that_the_knobs_resolve_to(knobs, stoc_len):
    cost = cost_per_token(smollm2(**knobs))
    assert [of_part["mac_cycles"] / of_part["macs"] for of_part in cost.values()] == [stoc_len] * 3


def test_a_weight_has_sc_prec_bits():
    assert cost_per_token(smollm2(sc_prec=6))["linear"]["weight_bytes"] == 79_626_240  # three quarters


def test_the_lm_head_costs_the_same_whether_or_not_it_is_under_sc():
    assert cost_per_token(smollm2()) == cost_per_token(smollm2(sc_lm_head=True))


def test_floating_point_has_macs_and_no_cycles():
    cost = cost_per_token(smollm2(preset=PRESETS["float"], sc_stoc_len=64))
    assert [of_part["macs"] for of_part in cost.values()] == [LINEAR, ATTENTION, LM_HEAD]
    assert {of_part[name] for of_part in cost.values() for name in ("mac_cycles", "weight_bytes")} == {None}
    assert total_cost(cost, "macs", lm_head=True) == 143_327_232
    assert np.isnan(total_cost(cost, "mac_cycles", lm_head=True))


def test_a_model_partly_in_floating_point_has_no_total():
    cost = cost_per_token(smollm2(use_sc_attn=False))
    assert cost["linear"]["mac_cycles"] == 128 * LINEAR
    assert cost["lm_head"]["mac_cycles"] == 128 * LM_HEAD
    assert cost["attention"]["mac_cycles"] is None
    assert np.isnan(total_cost(cost, "mac_cycles", lm_head=False))


def test_relative_cost_by_hand_with_and_without_lm_head():
    target, shorter, fewer = smollm2(), smollm2(sc_stoc_len=64), smollm2(layers=20, sc_stoc_len=96)
    for lm_head in (False, True):  # the same shapes: the ratio of lengths
        assert relative_cost(mac_cycles(shorter, lm_head=lm_head), mac_cycles(target, lm_head=lm_head)) == 0.5
    # 20 layers of 30 at three quarters of the length: 2/3 * 3/4; the LM head stays whole
    assert relative_cost(mac_cycles(fewer, lm_head=False), mac_cycles(target, lm_head=False)) == 0.5
    found = relative_cost(mac_cycles(fewer, lm_head=True), mac_cycles(target, lm_head=True))
    assert found == 104_988_672 * 96 / (143_327_232 * 128)


def test_speedups_and_energy_by_hand():
    assert speedup_at_once(3, 4, 0.5) == 1.0  # 3 / (2 + 1)
    assert speedup_in_turn(3, 4, 0.5) == close_to(3 / 7)
    assert energy_ratio(3, 4, 0.5) == close_to(7 / 3)
    found = speedup_at_once([[1.0], [3.0]], [1, 4], [1.0, 0.25])
    assert found.tolist() == [[0.5, 0.5], [1.5, 1.5]]


def test_rows_in_turn_never_gain_time_and_speculation_never_saves_energy():
    gamma = np.array([1, 2, 4, 8, 16])[:, None, None]
    tau = 1 + gamma * np.linspace(0, 1, 11)[:, None]
    c = np.array([0.0, 1e-300, 1e-17, 0.3, 1.0, 5.0])
    assert (speedup_in_turn(tau, gamma, c) <= 1).all()
    assert (energy_ratio(tau, gamma, c) >= 1).all()
    assert energy_ratio(5, 4, 0) == 1  # all accepted, of a draft that costs nothing


def test_a_speedup_over_another_length_by_hand():
    # Plain decoding at 64 takes half the time that it takes at 128: what was twice as fast is as fast.
    assert speedup_over_other_length(2.0, 128 * LINEAR, 64 * LINEAR) == 1.0
    assert speedup_over_other_length([2.0, 1.5], 128, [96, 128]).tolist() == [1.5, 1.5]


# --- the roofline --------------------------------------------------------------------------------------------------


def test_passes_by_hand():
    # 5 rows, 2 at once: 3 groups of 100 cycles; 10 bytes at 40 cycles each are later, at 20 earlier.
    assert pass_cycles(5, 100, 10, rows_at_once=2, cycles_per_byte=20) == 300
    assert pass_cycles(5, 100, 10, rows_at_once=2, cycles_per_byte=40) == 400
    assert pass_cycles([1, 4, 5, 8], 100, 10, rows_at_once=4, cycles_per_byte=0).tolist() == [100, 100, 200, 200]
    # gamma 4: plain pass max(100, 200) = 200, draft pass max(25, 100) = 100, verification max(300, 200) = 300
    found = speedup_roofline(3, 4, (25, 5), (100, 10), rows_at_once=2, cycles_per_byte=20)
    assert found == close_to(600 / 700)


def test_a_lone_row_waits_for_weights_where_the_balance_is_above_its_stream_length():
    cost = cost_per_token(smollm2(sc_stoc_len=64))["linear"]
    for balance, cycles in ((63, 64), (64, 64), (65, 65)):
        found = pass_cycles(1, cost["mac_cycles"], cost["weight_bytes"], rows_at_once=1, cycles_per_byte=balance)
        assert found == cycles * LINEAR


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
@pytest.mark.parametrize("c", [0.1, 0.5, 1.5])
def test_the_roofline_meets_both_row_models(gamma, c):
    tau, draft, target = 1 + 0.6 * gamma, (c * 1e9, 1e6), (1e9, 2e6)
    roofline = partial(speedup_roofline, tau, gamma, draft, target)
    at_once, in_turn = speedup_at_once(tau, gamma, c), speedup_in_turn(tau, gamma, c)
    assert roofline(rows_at_once=1, **NO_MEMORY_BOUND) == close_to(in_turn)
    for rows_at_once in (gamma + 1, gamma + 2, 1000):
        assert roofline(rows_at_once=rows_at_once, **NO_MEMORY_BOUND) == close_to(at_once)
    # One row short of gamma + 1 is a second group: as slow as any P that needs two.
    short = roofline(rows_at_once=gamma, **NO_MEMORY_BOUND)
    assert short == close_to(tau / (gamma * c + 2))
    assert short < at_once


@pytest.mark.parametrize("cycles_per_byte", [0, 10, 200, 700, 3000])
def test_more_rows_at_once_are_never_slower(cycles_per_byte):
    rows = np.arange(1, 12)
    array = {"rows_at_once": rows, "cycles_per_byte": cycles_per_byte}
    found = speedup_roofline(4.2, 8, (0.25e9, 1e6), (1e9, 2e6), **array)
    assert (np.diff(found) >= 0).all()
    assert found[0] < found[-1]  # 9 rows in turn take 9e9, the weights at most 6e9


def test_where_memory_bounds_every_pass_short_streams_gain_nothing():
    array = {"rows_at_once": np.array([[1], [3]]), "cycles_per_byte": 1e6}
    draft_cycles = np.array([1e6, 1e8, 1e9])
    found = speedup_roofline(3, 4, (draft_cycles, 1e6), (1e9, 2e6), **array)
    assert found.shape == (2, 3)
    assert found == close_to(np.full((2, 3), speedup_at_once(3, 4, 0.5)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({"rows_at_once": 0, "cycles_per_byte": 0}, r"rows_at_once=0: must be 1 or more"),
        ({"rows_at_once": 1, "cycles_per_byte": -1}, r"cycles_per_byte=-1: must be 0 \(no limit\) or more"),
    ],
)
def test_arrays_that_cannot_be_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        speedup_roofline(3, 4, (1, 1), (1, 1), **array)


def simulated_pass(rows: int, row_cycles: float, tile_arrival: float, rows_at_once: int, tiles: int = 1000) -> float:
    """Return when the last row has met the last tile of weights.

    Tiles arrive one after the other, `tile_arrival` apart, into enough memory; a tile is used once it is here and the
    one before is done, by each row on the first of the array's P lanes that is free, for row_cycles / tiles.
    """
    done = 0.0
    for tile in range(tiles):
        lanes = [max(done, (tile + 1) * tile_arrival)] * rows_at_once
        for _ in range(rows):
            heapq.heappush(lanes, heapq.heappop(lanes) + row_cycles / tiles)
        done = max(lanes)
    return done


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("cycles_per_byte", [0, 40, 150, 900])
def test_passes_against_a_simulated_array(rows_at_once, cycles_per_byte):
    # With n tiles the last row is done at max(n t_c + t_w, n t_w + t_c), t_c and t_w a tile's arithmetic and arrival:
    # later than max(n t_c, n t_w), by at most a part of 1 / n. 1e-9 for the rounding of the running sums.
    tiles = 1000
    for rows, mac_cycles_, weight_bytes in ((1, 300.0, 4.0), (5, 1000.0, 8.0)):
        arrival = weight_bytes * cycles_per_byte / tiles
        simulated = simulated_pass(rows, mac_cycles_, arrival, rows_at_once, tiles)
        array = {"rows_at_once": rows_at_once, "cycles_per_byte": cycles_per_byte}
        modelled = float(pass_cycles(rows, mac_cycles_, weight_bytes, **array))
        assert modelled * (1 - 1e-9) <= simulated <= modelled * (1 + 1 / tiles + 1e-9)


def simulated_decoding(rows_at_once: int, gamma: int, draft_cycles: float, target_cycles: float):
    """Return (tau, speedup, energy ratio) of 200 blocks on an array whose memory never limits, each row counted."""
    generator = np.random.default_rng(5)
    time = energy = tokens = blocks = 0
    for _ in range(200):
        accepted = 0
        while accepted < gamma and generator.random() < 0.7:
            accepted += 1
        passes = [(1, draft_cycles)] * gamma + [(gamma + 1, target_cycles)]
        for rows, cycles in passes:
            time += simulated_pass(rows, cycles, 0.0, rows_at_once, tiles=1)
            energy += rows * cycles
        tokens, blocks = tokens + accepted + 1, blocks + 1
    return tokens / blocks, tokens * target_cycles / time, energy / (tokens * target_cycles)


@pytest.mark.parametrize("gamma", [1, 4])
def test_row_models_and_energy_against_simulated_decoding(gamma):
    # The sums are of whole numbers, so exact.
    tau, fastest, energy = simulated_decoding(gamma + 1, gamma, 48, 128)
    assert 1 < tau < gamma + 1
    assert fastest == close_to(speedup_at_once(tau, gamma, 48 / 128))
    assert energy == close_to(energy_ratio(tau, gamma, 48 / 128))
    _, slowest, same_energy = simulated_decoding(1, gamma, 48, 128)
    assert slowest == close_to(speedup_in_turn(tau, gamma, 48 / 128))
    assert same_energy == energy
    _, between, _ = simulated_decoding(2, gamma, 48, 128)
    array = {"rows_at_once": 2, **NO_MEMORY_BOUND}
    assert between == close_to(speedup_roofline(tau, gamma, (48, 1), (128, 1), **array))


def test_modules_with_streams_of_their_own_cost_what_those_do():
    cost = cost_per_token(smollm2(sc_modules={"*.mlp.*": {"sc_stoc_len": 64}, "*.self_attn": {"sc_prec": 6}}))
    assert cost["linear"]["mac_cycles"] == 30 * (884_736 * 128 + 2_654_208 * 64)
    assert cost["attention"]["mac_cycles"] == ATTENTION * 32  # halved: 2**(6 - 1)
    assert cost["lm_head"]["mac_cycles"] == LM_HEAD * 128


def test_a_summary_gains_what_its_cells_cost():
    """A draft half as long costs half, with and without LM head; a skipped layer costs nothing; floats have no cost."""
    whole, skipped = cost_per_token(smollm2()), cost_per_token(smollm2(layers=15, sc_stoc_len=64))
    half = cost_per_token(smollm2(sc_stoc_len=64))
    floating = cost_per_token(smollm2(preset=PRESETS["float"]))
    pairs = {"half": half, "fewer layers too": skipped, "float": floating}
    summary = pd.DataFrame({"cell_id": list(pairs), "tau": 2.4, "gamma": 4})
    found = modelled(summary, {name: {"cost": {"target": whole, "draft": draft}} for name, draft in pairs.items()})
    found = found.set_index("cell_id")
    assert found.loc["half", ["c", "c_with_head"]].to_list() == [1 / 2, 1 / 2]
    assert found.loc["fewer layers too", "c"] == 1 / 4
    body, head = 128 * (LINEAR + ATTENTION), 128 * LM_HEAD
    assert found.loc["fewer layers too", "c_with_head"] == close_to((body / 4 + head / 2) / (body + head))
    assert found.loc["half", "speedup_at_once"] == close_to(2.4 / (4 / 2 + 1))
    assert found.loc["half", "speedup_in_turn_with_head"] == close_to(2.4 / (4 / 2 + 5))
    assert found.loc["half", "energy_ratio"] == close_to((4 / 2 + 5) / 2.4)
    assert found.loc["half", ["target_cycles", "draft_cycles_with_head"]].to_list() == [body, (body + head) / 2]
    assert found.loc["float"].drop(["tau", "gamma", "target_cycles", "target_cycles_with_head"]).isna().all()


def test_the_model_of_hardware_loads_no_torch():
    code = "import scspec.hardware, sys; print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
