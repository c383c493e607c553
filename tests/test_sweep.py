"""One prompt at several lengths: what each point is, models that are loaded once, and checks before they are."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

from scspec import models, sweep
from scspec.cli import main
from scspec.decoding import SamplingConfig, generate_autoregressive, generate_cached
from scspec.models import load_tokenizer
from scspec.prompts import encode_turn
from scspec.sc.knobs import PRESETS
from scspec.sweep import Sweep, run_sweep

PROMPT, TOKENS, GAMMA = "Hello there", 8, 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tuple(str(save_tiny_model(tmp_path_factory.mktemp("model"), seed)) for seed in (0, 1))


def options(pair: tuple[str, str], **changed: object) -> Sweep:
    given = {
        "target_model": pair[0],
        "draft_model": pair[1],
        "prompt": PROMPT,
        "new_tokens": TOKENS,
        "gamma": GAMMA,
        "do_sample": False,
        "temperature": 1.0,
        "stoc_lens": "64,16",
        "sc_prec": 8,
        "sc_granularity": "causal",
        "seed": 0,
        "device": "cpu",
        "dtype": None,
        "backend": None,
    }
    return Sweep.of(**{**given, **changed})


def test_each_point_is_what_models_loaded_for_it_decode(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, **options: loads.append(name) or load(name, **options))
    points = list(run_sweep(options(pair)))
    assert loads == list(pair)
    assert [point.stoc_len for point in points] == [None, 64, 16]
    tokenizer = load_tokenizer(pair[0])
    ids = torch.tensor([encode_turn(tokenizer, [], PROMPT)])
    for point in points:
        knobs = PRESETS["float"] if point.stoc_len is None else {"sc_stoc_len": point.stoc_len}
        target, draft = (load(name, sc_overrides=knobs) for name in pair)
        eos = {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": TOKENS}
        sequence, stats = generate_cached(target, draft, ids, gamma=GAMMA, **eos)
        assert point.text == tokenizer.decode(sequence[0, ids.shape[1] :], skip_special_tokens=True)
        assert (point.stats.alpha, point.stats.tau) == (stats.alpha, stats.tau)
        assert torch.equal(sequence, generate_autoregressive(target, ids, **eos))
        assert point.tokens_per_s > 0
    assert len({point.text for point in points}) == 3


def test_knobs_draws_and_seed_reach_the_decoder(pair: tuple[str, str]) -> None:
    def texts(**changed: object) -> list[str]:
        return [point.text for point in run_sweep(options(pair, stoc_lens="16", **changed))]

    greedy, sampled = texts(), texts(do_sample=True, temperature=2.0)
    assert sampled == texts(do_sample=True, temperature=2.0)
    assert sampled[0] != greedy[0]
    assert sampled != texts(do_sample=True, temperature=2.0, seed=1)
    assert sampled != texts(do_sample=True, temperature=0.1)
    for changed in ({"sc_prec": 5}, {"sc_granularity": "per_row"}):
        found = texts(**changed)
        assert found[0] == greedy[0]
        assert found[1] != greedy[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stoc-lens", ""], "stoc_lens: is empty; allowed: stream lengths with commas between them"),
        (["--stoc-lens", "64,,32"], "stoc_lens='64,,32': allowed are whole numbers"),
        (["--stoc-lens", "64,many"], "stoc_lens='64,many': allowed are whole numbers"),
        (["--stoc-lens", "300"], "stoc_len=300"),
        (["--stoc-lens", "64", "--sc-prec", "5"], "stoc_len=64"),
        (["--sc-prec", "9"], "'--sc-prec'"),
        (["--sc-attn-granularity", "per_column"], "sc_granularity='per_column': allowed are"),
        (["--gamma", "0"], "'--gamma'"),
        (["--new-tokens", "many"], "'--new-tokens'"),
        (["--temperature", "0"], "temperature is 0.0; allowed: a finite number > 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--prompt", " "], "prompt=' ': is empty"),
        (["--target-model", ""], "target_model='': is empty"),
        (["--device", "tpu"], "device='tpu': allowed are cpu, cuda"),
        (["--device", "cuda"], "device='cuda': torch"),
        (["--dtype", "float16"], "dtype='float16': with device 'cpu' allowed are float32"),
        (["--backend", "triton"], "backend='triton': with device 'cpu' allowed are cpu"),
    ],
)
def test_what_is_wrong_is_one_line_before_a_name_is_looked_up(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sweep, "local_folder", lambda name: pytest.fail("looked up"))
    assert main(["sweep", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scspec: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_names_vocabularies_and_room_are_checked_before_weights_are_read(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "load_spec_models", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other = str(save_tiny_model(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text(
        (tmp_path / "other" / "config.json").read_text().replace('"vocab_size": 61', '"vocab_size": 60')
    )
    for changed, message in (
        ({"draft_model": str(tmp_path / "none")}, "model '.*none': not an alias"),
        ({"draft_model": other}, "their vocabularies differ"),
        ({"new_tokens": 600}, r"prompt: \d+ tokens, 600 new ones and a block need \d+ positions; the models have 512"),
    ):
        with pytest.raises(ValueError, match=message):
            list(run_sweep(options(pair, **changed)))


def test_what_the_device_is_not_told_is_the_machines(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    monkeypatch.setattr(sweep, "check_placement", lambda *_: None)
    for gpu, found in ((False, ("cpu", "float32", "cpu")), (True, ("cuda", "float16", "cuda"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        made = options(pair, device=None)
        assert (made.device, made.dtype, made.backend) == found


def test_environment_variables_stand_for_options(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    variables = {
        "TARGET_MODEL": pair[0],
        "DRAFT_MODEL": pair[1],
        "PROMPT": "Hi",
        "NEW_TOKENS": "5",
        "GAMMA": "3",
        "DO_SAMPLE": "1",
        "TEMPERATURE": "0.5",
        "SC_PREC": "6",
        "STOC_LENS": "32, 8",
        "SC_ATTN_GRANULARITY": "per_row",
        "SEED": "7",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(sweep, "run_sweep", lambda given: asked.append(given) or [])
    assert main(["sweep", "--device", "cpu"]) == 0
    assert asked == [
        Sweep(*pair, "Hi", 5, 3, SamplingConfig(True, 0.5), (32, 8), 6, "per_row", 7, "cpu", "float32", "cpu")
    ]
    monkeypatch.setenv("DO_SAMPLE", "perhaps")
    assert main(["sweep", "--device", "cpu"]) == 2
    assert "(env var: 'DO_SAMPLE')" in capsys.readouterr().err


def test_the_command_prints_each_point(pair: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    models = ["--target-model", pair[0], "--draft-model", pair[0], "--device", "cpu"]
    assert main(["sweep", *models, "--prompt", "Hi", "--new-tokens", "6", "--gamma", "2", "--stoc-lens", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device cpu, dtype float32, backend cpu"
    assert lines[1].startswith("floating point: alpha 1.0000, tau 3.000, acceptance rate 1.0000, ")
    assert lines[1].endswith(" tokens/s")
    assert any(line.startswith("stoc_len 16: alpha 1.0000, tau 3.000, ") for line in lines)
