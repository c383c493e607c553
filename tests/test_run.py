"""run_cell on a tiny model: the rows of one cell, its metadata, refusals before loading, several turns."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import tiny_cells

from scspec import preflight, run, task
from scspec.decoding import CachedScorer, Draws, SamplingConfig, decode_tokens, key_from
from scspec.models import load_model, load_tokenizer
from scspec.prompts import encode_turn
from scspec.provenance import sha256_of
from scspec.results import check_identities, read_cell

PROMPTS = [
    {"question_id": "one", "category": "letters", "turns": ["Hello there"]},
    {"question_id": "two", "category": "letters", "turns": ["What is this?", "And that?"]},
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return tiny_cells(tmp_path_factory.mktemp("run"), PROMPTS)


def of_prompts(cell, folder, prompts):
    """The cell with other prompts, which are written to the folder."""
    file = str(folder / "prompts.jsonl")
    Path(file).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return dataclasses.replace(cell, prompt_file=file, prompt_sha256=sha256_of(file))


def run_to(path, cell, **arguments):
    run.run_cell(cell, path, **arguments)
    return read_cell(path)


def test_rows_and_metadata_of_a_cell(cells, tmp_path):
    blocks, metadata = run_to(tmp_path / "cell.parquet", cells["sc_sc"])
    check_identities(blocks)
    assert set(zip(blocks["prompt_id"], blocks["turn"], strict=True)) == {("one", 0), ("two", 0), ("two", 1)}
    assert (blocks["target_stoc_len"] == 64).all()
    assert (blocks["draft_stoc_len"] == 32).all()
    assert json.loads(blocks["draft_settings"].iloc[0])["skip_layers"] == [1]
    assert metadata["cell"] == json.loads(cells["sc_sc"].to_json())
    assert metadata["prompts"]["count"] == 2
    assert 0 < metadata["sc_mac_share"]["target"] < 1
    assert metadata["models"]["target"]["sha256"] == metadata["models"]["draft"]["sha256"]
    assert [attempt["prompts"] for attempt in metadata["attempts"]] == [2]
    assert metadata["wall_time_s"] == metadata["attempts"][0]["wall_time_s"] > 0


def test_a_run_again_and_on_two_threads_gives_the_same_rows(cells, tmp_path):
    times = ["draft_time_s", "verify_time_s"]
    first, _ = run_to(tmp_path / "1.parquet", cells["sc_sc"])
    second, _ = run_to(tmp_path / "2.parquet", cells["sc_sc"], threads=2)
    assert first.drop(columns=times).map(str).equals(second.drop(columns=times).map(str))


@pytest.mark.parametrize("arm", ["sc_sc", "float_float"])
def test_prompts_side_by_side_give_the_same_rows(cells, tmp_path, arm):
    """More prompts than slots, of different lengths and numbers of turns; also more slots than prompts."""
    texts = [["Hi"], *(prompt["turns"] for prompt in PROMPTS), ["Why? " * 9], ["No", "Yes", "No"]]
    prompts = [{"question_id": str(i), "turns": turns, "max_new_tokens": 4 * i + 1} for i, turns in enumerate(texts)]
    cell = of_prompts(cells[arm], tmp_path, prompts)
    runs = [run_to(tmp_path / f"{n}.parquet", cell, prompts_per_batch=n) for n in (1, 2, 3, 8)]
    rows = [blocks.drop(columns=["draft_time_s", "verify_time_s"]).map(str) for blocks, _ in runs]
    places = [(int(row.prompt_id), int(row.turn), int(row.block)) for row in rows[0].itertuples()]
    assert places == sorted(places)
    assert len({place[:2] for place in places}) == sum(map(len, texts))
    for found, (_, metadata) in zip(rows[1:], runs[1:], strict=True):
        assert found.equals(rows[0])
        assert metadata["prompts"] == runs[0][1]["prompts"]


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("arm", ["sc_sc", "identity"])
def test_what_blocks_feed_has_been_fed_before_the_first_that_counts(cells, tmp_path, monkeypatch, arm, slots):
    """A shape seen for the first time is compiled, on a GPU captured: seconds that are no block's."""
    fed, phases, feed, decode = [], [], task.CachedScorer.feed, task.decode_batch

    def noted(scorer, ids, rows):
        fed.append((len(phases), (id(scorer), tuple(ids.shape), rows)))
        return feed(scorer, ids, rows)

    def begun(*scorers, **options):
        phases.append(scorers[:2])
        return decode(*scorers, **options)

    monkeypatch.setattr(task.CachedScorer, "feed", noted)
    monkeypatch.setattr(task, "decode_batch", begun)
    cell = dataclasses.replace(cells[arm], max_new_tokens=20)
    run_to(tmp_path / "cell.parquet", cell, prompts_per_batch=slots)
    warm, counted = ({what for phase, what in fed if phase == n} for n in (1, 2))
    assert phases[0] == phases[1]
    assert counted <= warm


def test_identity_is_exactly_one_and_its_text_the_targets(cells, tmp_path):
    cell = cells["identity"]
    blocks, _ = run_to(tmp_path / "cell.parquet", cell)
    assert all(beta == 1.0 for betas in blocks["beta"] for beta in betas)
    assert (blocks["accepted"] == cell.gamma).all()
    ids = encode_turn(load_tokenizer(cell.target.model), [], "Hello there")
    assert text_of(blocks, "one") == plain_text(cell, "one", ids, cell.max_new_tokens)


def text_of(blocks, prompt_id):
    """The tokens kept of a prompt's first turn."""
    rows = blocks[(blocks["prompt_id"] == prompt_id) & (blocks["turn"] == 0)]
    return [token for ids, kept in zip(rows["emitted_ids"], rows["kept"], strict=True) for token in list(ids)[:kept]]


def plain_text(cell, prompt_id, ids, max_new_tokens):
    """What the cell's target alone says after the ids, as the first turn of that prompt."""
    scorer = CachedScorer(load_model(cell.target.model, sc_overrides=cell.target.sc), 96)
    options = {"sampling": SamplingConfig(do_sample=True), "eos_token_ids": frozenset({1})}
    draws = Draws(key_from(cell.sampling_seed, prompt_id, 0))
    return list(decode_tokens(scorer, ids, max_new_tokens=max_new_tokens, draws=draws, **options))


HISTORY = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
KINDS = [
    {"id": "ids", "prompt_token_ids": [60, 4, 4, 9, 30], "max_new_tokens": 3},
    {"id": "system", "system": "Be brief.", "prompt": "Hi"},
    {"id": "chat", "messages": [*HISTORY, {"role": "user", "content": "Why?"}], "max_new_tokens": 25},
]


def test_each_kind_of_prompt_starts_from_its_own_ids_and_ends_at_its_own_budget(cells, tmp_path):
    cell = of_prompts(cells["identity"], tmp_path, KINDS)
    blocks, _ = run_to(tmp_path / "cell.parquet", cell, prompts_per_batch=2)
    check_identities(blocks)
    tokenizer = load_tokenizer(cell.target.model)
    starts = {
        "ids": (KINDS[0]["prompt_token_ids"], 3),
        "system": (encode_turn(tokenizer, [{"role": "system", "content": "Be brief."}], "Hi"), 10),
        "chat": (encode_turn(tokenizer, HISTORY, "Why?"), 25),
    }
    for prompt_id, (ids, budget) in starts.items():
        assert text_of(blocks, prompt_id) == plain_text(cell, prompt_id, ids, budget)
        assert (blocks["prompt_tokens"][blocks["prompt_id"] == prompt_id] == len(ids)).all()
    stops = blocks.groupby("prompt_id")["stop"].last()
    assert set(stops) == {"budget"}


def test_progress_and_warm_up_know_of_budgets(cells, tmp_path, monkeypatch):
    """The bar ends full. The first prompt's budget may be too small for what is compiled once."""
    bars, turns, decode = [], [], task.decode_batch

    class Bar(task.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    def noted(target, draft, conversations, **options):
        def watched(conversation):
            reply = None
            while True:
                try:
                    turns.append(conversation.send(reply))
                except StopIteration:
                    return
                reply = yield turns[-1]

        return decode(target, draft, [watched(each) for each in conversations], **options)

    monkeypatch.setattr(task, "tqdm", Bar)
    monkeypatch.setattr(task, "decode_batch", noted)
    prompts = [{"id": "1", "prompt": "Hi", "max_new_tokens": 1}, {"id": "2", "turns": ["No", "Yes"]}]
    run_to(tmp_path / "cell.parquet", of_prompts(cells["sc_sc"], tmp_path, prompts))
    assert [turn.max_new_tokens for turn in turns] == [4, 1, 10, 10]  # a block of gamma 3, then the prompts
    (bar,) = bars
    assert (bar.n, bar.total) == (21, 21)


def test_a_second_turn_sees_the_first_and_its_reply(cells, tmp_path):
    blocks, _ = run_to(tmp_path / "cell.parquet", cells["float_float"])
    prompt_tokens = blocks.groupby(["prompt_id", "turn"])["prompt_tokens"].first()
    assert prompt_tokens["two", 1] > prompt_tokens["two", 0] + len("And that?")


def test_float_sides_have_no_streams(cells, tmp_path):
    blocks, metadata = run_to(tmp_path / "cell.parquet", cells["sc_float"])
    assert (blocks["target_stoc_len"] == 64).all()
    assert blocks["draft_stoc_len"].isna().all()
    assert metadata["sc_mac_share"]["draft"] == 0
    knobs = json.loads(blocks["draft_settings"].iloc[0])
    assert not knobs["use_sc_linear"]
    assert not knobs["use_sc_attn"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "cuda"}, "device='cuda'"),
        ({"dtype": "float16"}, "dtype=torch.float16"),
        ({"backend": "reference"}, "backend='reference'"),
        ({"prompt_sha256": "0"}, "SHA-256"),
    ],
)
def test_what_cannot_run_is_named_before_loading(cells, tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(task, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        run.run_cell(dataclasses.replace(cells["sc_sc"], **changed), tmp_path / "cell.parquet")


def on_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(preflight, "check_placement", lambda *_: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (3, ["cuda:0", "cuda:1", "cuda:2"])])
def test_both_models_are_spread_over_the_gpus_asked_for(cells, tmp_path, monkeypatch, gpus, device):
    class LoadedError(Exception):
        pass

    def load(model, *, device, **_):
        loaded.append(device)
        if len(loaded) == 2:
            raise LoadedError

    loaded = []
    on_gpus(monkeypatch, 3)
    monkeypatch.setattr(task, "load_model", load)
    with pytest.raises(LoadedError):
        run.run_cell(dataclasses.replace(cells["sc_sc"], device="cuda"), tmp_path / "cell.parquet", gpus=gpus)
    assert loaded == [device, device]


@pytest.mark.parametrize(("device", "gpus", "here"), [("cuda", 3, 2), ("cpu", 2, 1)])
def test_more_gpus_than_there_are_is_named_before_loading(cells, tmp_path, monkeypatch, device, gpus, here):
    on_gpus(monkeypatch, 2)
    monkeypatch.setattr(task, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    cell = dataclasses.replace(cells["sc_sc"], device=device)
    with pytest.raises(ValueError, match=rf"^gpus={gpus}: allowed are 1\.\.{here} with device '{device}' here$"):
        run.run_cell(cell, tmp_path / "cell.parquet", gpus=gpus)


TOO_MUCH = {
    "budget": (
        {"prompt": "Hi", "max_new_tokens": 600},
        "turn 0: 4 tokens, 600 new ones and a block need 608",
    ),
    "later turn": ({"turns": ["Hi", "y" * 600]}, "turn 1: 606 tokens, 10 new ones and a block need 620 positions"),
    "many ids": ({"prompt_token_ids": [3] * 499}, "turn 0: 499 tokens, 10 new ones and a block need 513 positions"),
    "another id": ({"prompt_token_ids": [3, 61, 60]}, "turn 0: token id 61; the models know 0..60"),
}


@pytest.mark.parametrize(("row", "message"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_what_the_models_have_no_room_or_token_for_is_named_before_loading(cells, tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(task, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    cell = of_prompts(cells["sc_sc"], tmp_path, [{"id": "fits", "prompt": "Hi"}, {"id": "x", **row}])
    with pytest.raises(ValueError, match=f"^prompt 'x', {message}"):
        run.run_cell(cell, tmp_path / "cell.parquet")
    assert not (tmp_path / "cell.parquet").exists()


def test_a_prompt_that_the_chat_template_refuses_is_named_before_loading(cells, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(cells["sc_sc"].target.model)
    refusal = "{{ raise_exception('System role not supported') }}"
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}" + refusal + "{% endif %}Hi"
    monkeypatch.setattr(task, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(task, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    prompts = [{"id": "x", "prompt": "Hi"}, {"id": "y", "system": "Be brief.", "prompt": "Hi"}]
    with pytest.raises(ValueError, match=r"^prompt 'y', turn 0: System role not supported$"):
        run.run_cell(of_prompts(cells["sc_sc"], tmp_path, prompts), tmp_path / "cell.parquet")


def test_a_prompt_file_that_has_gone_is_named(cells, tmp_path):
    cell = dataclasses.replace(cells["sc_sc"], prompt_file=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^prompt_file: '.*' cannot be read \(Is a directory\); allowed: "):
        run.run_cell(cell, tmp_path / "cell.parquet")
