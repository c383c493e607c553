"""The estimate before a run, by hand; what it does not know it says, and fetches nothing."""

import json
from pathlib import Path

import pytest

from scspec import estimate
from scspec.cells import expand, qualities
from scspec.config import load_experiment
from scspec.estimate import Estimator, Rates, plan_lines

#: A layer: q, k, v, o 2 * 2 each, gate, up, down 2 * 3 each, so 34; attention 2 * 2 * 256. LM head 2 * 5.
LAYERS, WEIGHTS, MACS = 2, 2 * 34 + 10, 2 * (34 + 1024) + 10
SIZES = {
    "hidden_size": 2,
    "intermediate_size": 3,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "vocab_size": 5,
}
NOTHING = Rates(start=0, pack=0, layer=0, weight=0, mac=0)
#: Two prompts of 40 characters, 10 tokens and the template's 30.
TURNS, PROMPT_ROWS = 2, 80
BUDGET = 10


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES))
    return str(tmp_path / "model")


@pytest.fixture
def config(model: str, tmp_path: Path) -> dict:
    prompts = [{"question_id": str(number), "turns": ["abcd" * 10]} for number in range(TURNS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return {
        "pairs": {"tiny": {"target": {"model": model}, "draft": {"model": model, "skip_layers": [1]}}},
        "stoc_len": [64],
        "gamma": [4],
        "prompt_file": str(tmp_path / "prompts.jsonl"),
        "max_new_tokens": BUDGET,
        "prompts_per_batch": 2,
        "controls": {"enabled": False},
        "quality": {"enabled": False},
    }


def seconds(monkeypatch: pytest.MonkeyPatch, config: dict, alpha: float = 0.0, **rates: float) -> float:
    """Return the estimate for all pairs where nothing but `rates` costs anything."""
    monkeypatch.setitem(estimate.RATES, "cpu", Rates(**{**vars(NOTHING), **rates}))
    experiment = load_experiment(config)
    cells, _ = expand(experiment)
    found = Estimator(experiment, alpha).by_pair(cells, qualities(experiment, cells))
    return sum(its.hours for its in found) * 3600


# alpha 0: 20 blocks of a token, 10 for each of the two side by side; alpha 1: 4 blocks of 5 tokens.
@pytest.mark.parametrize(("alpha", "blocks"), [(0.0, 20), (1.0, 4)])
def test_a_loop_by_hand(monkeypatch: pytest.MonkeyPatch, config: dict, alpha: float, blocks: int) -> None:
    target_passes, draft_passes = TURNS + blocks / 2, TURNS + 4 * blocks / 2
    draft_macs = MACS - (34 + 1024)  # it leaves a layer out
    rows = MACS * (PROMPT_ROWS + 5 * blocks) + draft_macs * (PROMPT_ROWS + 4 * blocks)
    assert seconds(monkeypatch, config, alpha, start=7) == pytest.approx(7)
    assert seconds(monkeypatch, config, alpha, pack=1) == pytest.approx(WEIGHTS + WEIGHTS - 34)
    assert seconds(monkeypatch, config, alpha, layer=1) == pytest.approx(2 * target_passes + draft_passes)
    assert seconds(monkeypatch, config, alpha, weight=1) == pytest.approx(
        WEIGHTS * target_passes + (WEIGHTS - 34) * draft_passes
    )
    assert seconds(monkeypatch, config, alpha, mac=1) == pytest.approx(rows)


def test_replay_by_hand(monkeypatch: pytest.MonkeyPatch, config: dict) -> None:
    """A text, predictions on it, and the audit, which is a loop; texts go on for 8 tokens past their end."""
    loop = seconds(monkeypatch, config, layer=1)
    many = {**config, "method": "replay", "gamma": [1, 2, 4]}
    text, predictions = LAYERS * (TURNS + TURNS * (BUDGET + 8) / 2), TURNS * (1 + 1)
    audited = [loop, *(seconds(monkeypatch, {**config, "gamma": [gamma]}, layer=1) for gamma in (1, 2))]
    assert seconds(monkeypatch, many, layer=1) - text - predictions in [pytest.approx(loop) for loop in audited]


def test_quality_by_hand(monkeypatch: pytest.MonkeyPatch, config: dict, tmp_path: Path) -> None:
    """On top of the loop: the float target's text, and two models over it and over a text file of 1000 tokens."""
    (tmp_path / "text.txt").write_text("abcd" * 1000)
    measured = {**config, "quality": {"enabled": True, "text_file": str(tmp_path / "text.txt")}}
    added = seconds(monkeypatch, measured, mac=1) - seconds(monkeypatch, config, mac=1)
    text = PROMPT_ROWS + TURNS * (BUDGET + 8)
    assert added == pytest.approx(MACS * (text + 2 * (PROMPT_ROWS + TURNS * BUDGET + 1000)))


def test_a_later_turn_prefills_what_was_said_before(monkeypatch: pytest.MonkeyPatch, config: dict) -> None:
    one = seconds(monkeypatch, config, mac=1)
    prompt = {"question_id": "two", "turns": ["abcd" * 10, "abcd" * 5]}
    Path(config["prompt_file"]).write_text(json.dumps(prompt) + "\n")
    assert one > 0
    loop_rows = MACS * 5 * 20 + (MACS - 34 - 1024) * 4 * 20
    prefilled = 40 + (40 + BUDGET + 5)
    expected = loop_rows + (MACS + MACS - 34 - 1024) * prefilled
    assert seconds(monkeypatch, config, mac=1) == pytest.approx(expected)


def test_what_pairs_share_counts_once_and_identity_accepts_all(monkeypatch: pytest.MonkeyPatch, config: dict) -> None:
    shared = {**config, "quality": {"enabled": True}}
    twice = {**shared, "pairs": {"tiny": config["pairs"]["tiny"], "again": config["pairs"]["tiny"]}}
    # A cell, a text and a quality; of the second pair the cell alone.
    assert seconds(monkeypatch, shared, start=1) == pytest.approx(3)
    assert seconds(monkeypatch, twice, start=1) == pytest.approx(4)
    identity = {**config, "controls": {"arms": ["identity"], "stoc_len": [64], "gamma": [4]}}
    loop, passes_of_both = seconds(monkeypatch, config, layer=1), (TURNS + 4 / 2) + (TURNS + 4 * 4 / 2)
    assert seconds(monkeypatch, identity, layer=1) - loop == pytest.approx(LAYERS * passes_of_both)


def on_gpus(config: dict, **changed: object) -> dict:
    return {**config, "device": "cuda", "backend": "cuda", "dtype": "float16", **changed}


def test_hours_of_every_gpu_that_a_model_is_spread_over(config: dict) -> None:
    one, two = (list(plan_lines(on_gpus(config, gpus=gpus), 0.7)) for gpus in (1, 2))
    hours = [float(line.split()[-3]) for lines in (one, two) for line in lines if line.split()[0] == "tiny"]
    assert all(line.endswith("GPU hours") for line in one if "tokens to decode" in line)
    assert hours[2] == pytest.approx(2 * hours[0], rel=0.01)


def test_both_methods_are_estimated_the_configured_one_first(config: dict) -> None:
    lines = list(plan_lines({**config, "method": "replay"}, 0.7))
    assert [line for line in lines if line.startswith("  method")] == ["  method replay:", "  method loop:"]
    assert (
        "every turn uses its whole budget of 10 tokens, alpha 0.7"
        in lines[lines.index("2 cells, 0 invalid combinations") + 1]
    )
    knob = {"target": {"model": config["pairs"]["tiny"]["target"]["model"], "sc": {"sc_granularity": "per_row"}}}
    other = {**config, "pairs": {"tiny": {**config["pairs"]["tiny"], **knob}}}
    assert list(plan_lines(other, 0.7))[-1].startswith("  method replay: not possible: pairs.tiny.target.sc:")


def test_what_is_not_known_is_said(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    absent = {**config, "pairs": {"far": {"target": {"model": "no/such"}, "draft": {"model": "no/such"}}}}
    lines = list(plan_lines(absent, 0.7))
    assert "    unknown: no/such is not on this machine; fetch it: scspec models fetch no/such" in lines
    assert all(line.endswith("unknown core hours") for line in lines if "tokens to decode" in line)
    assert any(line.split()[:5] == ["total", "1", "jobs", "20", "tokens"] for line in lines)
    lines = list(plan_lines(on_gpus(config, backend="triton"), 0.7))
    assert "    unknown: no rates of backend triton have been measured" in lines


@pytest.mark.parametrize("text", ["{", '{"hidden_size": 2}', "[]"])
def test_a_configuration_of_no_llama_is_named(config: dict, model: str, text: str) -> None:
    (Path(model) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{model}/config.json: no configuration of a Llama model"):
        list(plan_lines(config, 0.7))


def test_an_alpha_that_is_none_is_refused(config: dict) -> None:
    with pytest.raises(ValueError, match=r"alpha=1.5: must be from 0 to 1"):
        list(plan_lines(config, 1.5))


def test_rates_reproduce_what_they_rest_on() -> None:
    """benchmarks/LOG.md, 2026-11-28: forwards of 8B and 1B shapes; a token of SmolLM2 on a CPU, with prefill."""

    def pass_s(backend: str, layers: int, weights: float, rows: int) -> float:
        rates = estimate.RATES[backend]
        return layers * rates.layer + weights * (rates.weight + rows * rates.mac)

    assert pass_s("cuda", 32, 7.5e9, 5) == pytest.approx(8.93e-3, rel=0.15)
    assert pass_s("cuda", 16, 1.24e9, 1) == pytest.approx(1.94e-3, rel=0.15)
    assert pass_s("cuda", 32, 7.5e9, 512) == pytest.approx(422e-3, rel=0.15)
    assert pass_s("cpu", 30, 134.5e6, 1) == pytest.approx(61.3 / 512, rel=0.25)
