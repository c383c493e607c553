"""Quality of a target in SC: worked by hand, against the library's own logits, and refusals."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_cells, tiny_model
from transformers import AutoModelForCausalLM

from scspec import task
from scspec.cells import GREEDY
from scspec.decoding import CachedScorer
from scspec.jobs import Quality
from scspec.quality import WINDOW_TOKENS, log_softmax, run_quality, score_text
from scspec.replay import run_trajectory
from scspec.results import QUALITY_KEYS, QUALITY_SCHEMA, read_rows

PROMPTS = [
    {"question_id": "one", "category": "letters", "turns": ["Hello there"]},
    {"question_id": "two", "category": "letters", "turns": ["What is this?", "And that?"]},
]


class FixedScorer:
    """Says the same logits at every position."""

    def __init__(self, *logits: float):
        self.logits = torch.tensor(logits)

    def prefill(self, slot, tokens):
        pass

    def feed(self, ids, rows):
        return self.logits.expand(1, rows, -1)


def test_worked_by_hand():
    """q = (3/4, 1/4), p = (1/2, 1/2), the text is 0, 0, 1."""
    found = score_text(FixedScorer(np.log(3.0), 0.0), FixedScorer(0.0, 0.0), np.array([0]), np.array([0, 0, 1]))
    assert found["tokens"] == 3
    assert found["nll"] == pytest.approx(-2 * np.log(3 / 4) - np.log(1 / 4))
    assert found["float_nll"] == pytest.approx(3 * np.log(2))
    assert found["tv"] == pytest.approx(3 * 1 / 4)
    assert found["kl"] == pytest.approx(3 * (np.log(2 / 3) / 2 + np.log(2) / 2))


def test_a_token_that_cannot_be_adds_nothing_to_the_divergence():
    found = score_text(FixedScorer(0.0, -np.inf), FixedScorer(0.0, -np.inf), np.array([0]), np.array([0]))
    assert (found["kl"], found["tv"], found["nll"]) == (0, 0, 0)


def test_log_softmax_stands_large_logits():
    assert log_softmax(np.array([1e30, 1e30], dtype=np.float32)) == pytest.approx([-np.log(2)] * 2)


def test_a_model_is_at_no_distance_from_itself():
    from scspec.patching import patch_model

    scorers = [CachedScorer(patch_model(tiny_model(), {"sc_stoc_len": 64}), 200) for _ in range(2)]
    found = score_text(*scorers, np.arange(5), np.arange(150) % 61)  # more than one pass
    assert (found["tv"], found["kl"]) == (0, 0)
    assert found["nll"] == found["float_nll"] > 0


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A quality with a text file, its folder, and where the float target's texts lie."""
    folder = tmp_path_factory.mktemp("quality")
    cell = dataclasses.replace(tiny_cells(folder, PROMPTS)["sc_sc"], sampling=GREEDY)
    trajectory = dataclasses.replace(cell, target=dataclasses.replace(cell.target, sc=None)).trajectory(past_end=8)
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question? " * 14)
    quality = Quality(trajectory, cell.target, str(text), hashlib.sha256(text.read_bytes()).hexdigest())
    run_trajectory(trajectory, folder / "texts.parquet")
    return quality, folder / "texts.parquet"


@pytest.fixture(scope="module")
def measured(planned, tmp_path_factory):
    quality, texts = planned
    output = tmp_path_factory.mktemp("measured") / "quality.parquet"
    run_quality(quality, texts, output)
    return read_rows(output, QUALITY_SCHEMA, QUALITY_KEYS)


def test_every_text_has_a_row(planned, measured):
    rows, metadata = measured
    assert rows["text_id"].to_list() == ["one/0", "two/0", "two/1", "0", "1"]
    assert (rows["tokens"][:3] <= planned[0].trajectory.max_new_tokens).all()
    characters = len("To be, or not to be, that is the question? " * 14)  # one token each
    assert rows["tokens"][3:].to_list() == [WINDOW_TOKENS - 1, characters - WINDOW_TOKENS - 1]
    assert (rows[["tv", "kl"]] > 0).all(axis=None)
    assert metadata["settings"]["target"]["use_sc_linear"]
    assert not metadata["settings"]["float"]["use_sc_linear"]


def test_the_float_targets_likelihood_is_the_librarys(planned, measured):
    """Hugging Face's own forward in float64, over the same ids. 1e-5: float32 against it, over 10 or 500 tokens."""
    quality, path = planned
    model = AutoModelForCausalLM.from_pretrained(quality.target.model, dtype=torch.float64)
    from scspec.models import load_tokenizer
    from scspec.replay import read_trajectory

    texts, _ = read_trajectory(path, quality.trajectory)
    ids = load_tokenizer(quality.target.model).encode(Path(quality.text_file).read_text(), add_special_tokens=False)
    wanted = [(text.prompt_ids, text.text_ids[: text.tokens]) for text in texts.itertuples()]
    wanted += [(ids[:1], ids[1:WINDOW_TOKENS]), (ids[WINDOW_TOKENS : WINDOW_TOKENS + 1], ids[WINDOW_TOKENS + 1 :])]
    for (before, after), nll in zip(wanted, measured[0]["float_nll"], strict=True):
        whole = torch.tensor([[*before, *after]], dtype=torch.int64)
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(before) - 1 : -1]
        wanted_nll = torch.nn.functional.cross_entropy(logits, whole[0, len(before) :], reduction="sum")
        assert nll == pytest.approx(float(wanted_nll), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "planned_hash", "message"),
    [
        (b"Another text.", "0" * 64, "its SHA-256 is .*, the quality was planned with 000"),
        (b"\xff\xfe", None, "allowed: text in UTF-8"),
        (b"x", None, "1 tokens; allowed: at least 2"),
    ],
)
def test_a_text_file_that_cannot_be_scored_is_named(planned, tmp_path, monkeypatch, content, planned_hash, message):
    quality, texts = planned
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    sha256 = planned_hash or hashlib.sha256(content).hexdigest()
    if "tokens" not in message:
        monkeypatch.setattr(task, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=rf"quality\.text_file.*{message}"):
        run_quality(
            dataclasses.replace(quality, text_file=str(text), text_sha256=sha256), texts, tmp_path / "q.parquet"
        )
    assert not (tmp_path / "q.parquet").exists()


def test_texts_of_another_platform_are_refused(planned, tmp_path, monkeypatch):
    quality, texts = planned
    monkeypatch.setattr("scspec.provenance.device_name", lambda device: "another")
    with pytest.raises(ValueError, match="this run were made with different device"):
        run_quality(quality, texts, tmp_path / "quality.parquet")


def test_prompts_scored_before_a_kill_are_not_scored_again(planned, measured, tmp_path, monkeypatch):
    from scspec import quality as module

    output, scored = tmp_path / "quality.parquet", []

    def dies(scorers, turn):
        if scored:
            raise KeyboardInterrupt
        scored.append(turn.prompt_id)
        return score(scorers, turn)

    score = module._continuation_row
    with monkeypatch.context() as patched:
        patched.setattr(module, "_continuation_row", dies)
        with pytest.raises(KeyboardInterrupt):
            run_quality(*planned, output)
    again = []
    monkeypatch.setattr(module, "_continuation_row", lambda *its: again.append(its[1].prompt_id) or score(*its))
    run_quality(*planned, output)
    assert (scored, again) == (["one"], ["two", "two"])
    rows, _ = read_rows(output, QUALITY_SCHEMA, QUALITY_KEYS)
    assert rows.equals(measured[0])
