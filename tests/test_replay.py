"""Replay gives the loop's blocks: one by one where tokens are greedy, in expectation where they are sampled."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_cells

from scspec import provenance
from scspec.cells import GREEDY, expand
from scspec.config import load_experiment, read_config
from scspec.jobs import Cell, Predictions, Trajectory
from scspec.replay import Text, blocks_of, replay_cell, run_predictions, run_trajectory
from scspec.results import check_identities, read_cell
from scspec.run import run_cell
from scspec.stats import Tally, summarise

PROMPTS = [
    {"question_id": "one", "category": "letters", "turns": ["Hello there"]},
    {"question_id": "two", "category": "letters", "turns": ["What is this?", "And that?"]},
    {"question_id": "three", "category": "letters", "turns": ["x"]},
    {"question_id": "four", "category": "letters", "turns": ["To be, or not to be", "That", "is"]},
]
NOT_COMPARED = ["cell_id", "method", "proposed_ids", "draft_time_s", "verify_time_s"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return tiny_cells(tmp_path_factory.mktemp("replay"), PROMPTS)


def as_replay(cell: Cell) -> Cell:
    return dataclasses.replace(cell, id=f"{cell.id}_replay", method="replay")


def paths(cell: Cell, folder):
    predictions = cell.predictions()
    return predictions.trajectory.path(folder), predictions.path(folder), cell.path(folder)


def run_replay(cell: Cell, folder, **counts):
    """The blocks and metadata of a replayed cell; texts and predictions that are there already are used."""
    trajectory, predictions, output = paths(cell, folder)
    if not trajectory.exists():
        run_trajectory(cell.predictions().trajectory, trajectory, **counts)
    if not predictions.exists():
        run_predictions(cell.predictions(), trajectory, predictions)
    replay_cell(cell, trajectory, predictions, output)
    return read_cell(output)


def run_loop(cell: Cell, folder):
    run_cell(cell, cell.path(folder), threads=2)  # changes no result
    return read_cell(cell.path(folder))


def compared(blocks: pd.DataFrame) -> list[dict]:
    return blocks.drop(columns=NOT_COMPARED).map(str).to_dict("records")


def assert_replays(loop: pd.DataFrame, replay: pd.DataFrame) -> None:
    check_identities(replay)
    assert compared(replay) == compared(loop)
    for known, proposed in zip(replay["proposed_ids"], loop["proposed_ids"], strict=True):
        assert list(known) == list(proposed[: len(known)])
    assert (replay["method"] == "replay").all()
    assert replay[["draft_time_s", "verify_time_s"]].isna().all(axis=None)


FULL_ARMS = [pytest.param(arm, marks=pytest.mark.full) for arm in ("identity", "reseed", "float_sc")]


@pytest.mark.parametrize("arm", ["sc_sc", "sc_float", *FULL_ARMS])
def test_greedy_replay_is_the_loop_block_by_block(cells, tmp_path, arm):
    seen = Counter()
    for gamma in range(1, 9):
        cell = dataclasses.replace(cells[arm], gamma=gamma, id=f"a/b/{arm}{gamma}", sampling=GREEDY, max_new_tokens=21)
        (loop, _), (replay, _) = run_loop(cell, tmp_path), run_replay(as_replay(cell), tmp_path)
        assert_replays(loop, replay)
        seen.update(loop["stop"].dropna())
        seen["rejected"] += (loop["accepted"] < gamma).sum()
    assert seen["budget"]
    assert bool(seen["rejected"]) == (arm != "identity")
    assert len(list((tmp_path / "trajectories").rglob("*.parquet"))) == 1  # for all gammas
    assert len(list((tmp_path / "predictions").rglob("*.parquet"))) == 1


MIXED = [
    {"id": "ids", "prompt_token_ids": [60, 4, 4, 9, 30], "max_new_tokens": 3},
    {"id": "turns", "system": "Be brief.", "turns": ["What is this?", "And that?"], "max_new_tokens": 17},
    {"id": "chat", "messages": [{"role": "system", "content": "Hm"}, {"role": "user", "content": "Why?"}]},
]


def test_prompts_of_every_kind_with_budgets_of_their_own_replay_block_by_block(tmp_path):
    cells = tiny_cells(tmp_path, MIXED)
    for gamma in (2, 5):
        cell = dataclasses.replace(cells["sc_sc"], gamma=gamma, id=f"a/b/c{gamma}", sampling=GREEDY)
        (loop, _), (replay, _) = run_loop(cell, tmp_path), run_replay(as_replay(cell), tmp_path)
        assert_replays(loop, replay)
        tokens = loop[loop["stop"].notna()].assign(tokens=loop.groupby(["prompt_id", "turn"])["kept"].transform("sum"))
        ended = tokens[tokens["stop"] == "budget"].set_index(["prompt_id", "turn"])["tokens"].to_dict()
        assert ended == {("ids", 0): 3, ("turns", 0): 17, ("turns", 1): 17, ("chat", 0): 10}


@pytest.mark.parametrize("gamma", [2, 5])
def test_ends_of_text_cut_replayed_blocks_as_they_cut_the_loops(cells, tmp_path, monkeypatch, gamma):
    """With a token of the texts themselves as EOS, blocks end in the middle, and accepted proposals lie behind."""
    cell = dataclasses.replace(cells["identity"], gamma=gamma, sampling=GREEDY, max_new_tokens=21)
    plain, _ = run_loop(cell, tmp_path / "plain")
    common = Counter(np.concatenate(plain["emitted_ids"].to_list()).tolist()).most_common()
    end = next(token for token, count in reversed(common) if count > 1)
    monkeypatch.setattr("scspec.task.Task.eos_token_ids", frozenset({end}))
    for drafts in ("identity", "sc_sc"):
        cell = dataclasses.replace(cells[drafts], gamma=gamma, sampling=GREEDY, max_new_tokens=21)
        (loop, _), (replay, _) = run_loop(cell, tmp_path / "eos"), run_replay(as_replay(cell), tmp_path / "eos")
        assert_replays(loop, replay)
        assert (loop["stop"] == "eos").any()
        if drafts == "identity":
            assert (loop["emitted_ids"].map(len) <= loop["accepted"]).any()  # cut before what was accepted


def test_texts_of_any_batch_are_the_same(cells, tmp_path):
    cell = as_replay(cells["sc_sc"])
    (alone, _), (together, _) = (run_replay(cell, tmp_path / str(n), prompts_per_batch=n) for n in (1, 3))
    assert compared(alone) == compared(together)


def brute_force(text: Text, gamma: int) -> Counter:
    """(start, accepted) -> expected number, over every outcome of every coin. No EOS."""
    found = Counter()

    def follow(begin: int, weight: float) -> None:
        if begin >= text.tokens or weight == 0:
            return
        for accepted in range(gamma + 1):
            heads = text.acceptance[begin : begin + accepted]
            tails = [1 - text.acceptance[begin + accepted]] if accepted < gamma else []
            its_weight = weight * float(np.prod([*heads, *tails]))
            found[begin, accepted] += its_weight
            follow(begin + accepted + 1, its_weight)

    follow(0, 1.0)
    return found


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_expected_blocks_are_those_of_every_outcome_of_every_coin(gamma):
    generator, tokens = np.random.default_rng(gamma), 9
    acceptance = generator.random(tokens + gamma).tolist()
    acceptance[3], acceptance[5] = 0.0, 1.0
    lists = {"margin": [1.0] * len(acceptance), "acceptance": acceptance, "beta": acceptance}
    text = Text(5, list(range(10, 10 + len(acceptance))), tokens, "budget", draft_ids=None, **lists)
    wanted = {key: weight for key, weight in brute_force(text, gamma).items() if weight > 0}
    found = {(row["start"] - 5, row["accepted"]): row["weight"] for row in blocks_of(text, gamma, frozenset())}
    assert found == pytest.approx(wanted, rel=1e-12)  # some hundred products and sums of float64
    emitted = sum(row["weight"] * row["kept"] for row in blocks_of(text, gamma, frozenset()))
    assert emitted == pytest.approx(tokens, rel=1e-12)  # each token of the text is emitted once


def test_sampled_replay_expects_the_loops_tau_and_alpha(cells, tmp_path):
    """Both estimate the same two numbers from different texts of the same distribution.

    4.5 standard errors of the difference between means over 12 seeds and 4 prompts each; the odds of a false alarm are
    about 1e-5 for each (a t distribution with 22 degrees of freedom), and the draws are fixed.
    """
    found = {"loop": [], "replay": []}
    for seed in range(12):
        base = dataclasses.replace(cells["sc_sc"], sampling_seed=seed, max_new_tokens=24, id=f"a/b/s{seed}")
        for method, cell, run in (("loop", base, run_loop), ("replay", as_replay(base), run_replay)):
            blocks, metadata = run(cell, tmp_path)
            check_identities(blocks)
            found[method].append(
                summarise(Tally.of(blocks), {cell.id: metadata})[["tau", "alpha"]].iloc[0].to_numpy(float)
            )
    loop, replay = (np.array(found[method]) for method in ("loop", "replay"))
    error = np.sqrt(loop.var(axis=0, ddof=1) / len(loop) + replay.var(axis=0, ddof=1) / len(replay))
    assert (np.abs(loop.mean(axis=0) - replay.mean(axis=0)) < 4.5 * error).all()
    assert (loop.mean(axis=0) - [1, 0] > 5 * error).all()  # far from a draft that is never accepted


def test_sampled_identity_accepts_everything(cells, tmp_path):
    blocks, _ = run_replay(as_replay(cells["identity"]), tmp_path)
    assert (blocks["accepted"] == blocks["gamma"]).all()
    assert (blocks["weight"] == 1).all()
    assert all(beta == 1 for betas in blocks["beta"] for beta in betas)


def test_lines_of_json_round_trip(cells):
    predictions = as_replay(cells["sc_sc"]).predictions()
    assert Predictions.from_json(predictions.to_json()) == predictions
    assert Trajectory.from_json(predictions.trajectory.to_json()) == predictions.trajectory


def test_gammas_up_to_eight_share_their_texts(cells):
    def text_of(**changed):
        return dataclasses.replace(cells["sc_sc"], **changed).predictions().trajectory.id

    assert text_of(gamma=1) == text_of(gamma=8) != text_of(gamma=9)
    assert text_of(pair="another", arm="reseed", draft=cells["identity"].target) == text_of()
    assert len({text_of(), text_of(sampling_seed=1), text_of(max_new_tokens=5), text_of(sampling=GREEDY)}) == 4


@pytest.fixture(scope="module")
def derived(cells, tmp_path_factory):
    """A replayed cell, where its texts and predictions lie, and where it goes."""
    folder, cell = tmp_path_factory.mktemp("derived"), as_replay(cells["sc_sc"])
    run_replay(cell, folder)
    return cell, *paths(cell, folder)


def with_other(path, folder, **changed):
    """A copy of a Parquet file with other metadata."""
    import pyarrow.parquet as pq

    table, copy = pq.read_table(path), folder / "copy.parquet"
    metadata = {**json.loads(table.schema.metadata[b"scspec"]), **changed}
    pq.write_table(table.replace_schema_metadata({b"scspec": json.dumps(metadata)}), copy)
    return copy


@pytest.mark.parametrize("name", ["device", "backend", "versions", "sources"])
def test_mixed_platforms_are_refused(derived, tmp_path, monkeypatch, name):
    cell, trajectory, predictions, _ = derived
    copy = with_other(predictions, tmp_path, **{name: "another"})
    with pytest.raises(ValueError, match=rf"{copy} were made with different {name}: .*another.*; again: snakemake -R"):
        replay_cell(cell, trajectory, copy, tmp_path / "cell.parquet")
    assert not (tmp_path / "cell.parquet").exists()


def test_predictions_on_texts_of_another_platform_are_refused(derived, tmp_path, monkeypatch):
    cell, trajectory, _, _ = derived
    monkeypatch.setattr(provenance, "device_name", lambda device: "another")
    with pytest.raises(ValueError, match="this run were made with different device"):
        run_predictions(cell.predictions(), trajectory, tmp_path / "predictions.parquet")


def test_files_of_other_settings_are_refused(derived, tmp_path):
    cell, trajectory, predictions, _ = derived
    other = dataclasses.replace(cell, sampling_seed=1)
    with pytest.raises(ValueError, match=f"{trajectory}: made with other settings than planned"):
        replay_cell(other, trajectory, predictions, tmp_path / "cell.parquet")
    other = dataclasses.replace(cell, draft=cell.target)
    with pytest.raises(ValueError, match=f"{predictions}: made with other settings than planned"):
        replay_cell(other, trajectory, predictions, tmp_path / "cell.parquet")
    copy = with_other(predictions, tmp_path, trajectory_file_sha256="0")
    with pytest.raises(ValueError, match=f"made from another {trajectory}"):
        replay_cell(cell, trajectory, copy, tmp_path / "cell.parquet")


def test_loops_run_and_replays_derive(cells, derived, tmp_path):
    cell, trajectory, predictions, _ = derived
    with pytest.raises(ValueError, match="method='replay'"):
        run_cell(cell, tmp_path / "cell.parquet")
    with pytest.raises(ValueError, match="method='loop'"):
        replay_cell(cells["sc_sc"], trajectory, predictions, tmp_path / "cell.parquet")


# Real weights.

REPOSITORY = Path(__file__).parents[1]
QUESTIONS = [
    *(
        "Name three colours.",
        "What is 7 times 8?",
        "Write a line of Python that prints 1.",
        "Translate to French: dog.",
    ),
    *("Who wrote Hamlet?", "Give a synonym of fast.", "Is the sun a star?", "Count from one to five."),
]
PAIRS = {
    "shorter": ("smollm2-shorter", "sc_sc"),
    "skip": ("smollm2-skip", "sc_sc"),
    "identity": ("smollm2-skip", "identity"),
}


def smollm2_cell(folder, pair: str, gamma: int, *, prompts: int, max_new_tokens: int) -> Cell:
    prompt_file = folder / "prompts.jsonl"
    rows = [{"question_id": f"q{number}", "turns": [text]} for number, text in enumerate(QUESTIONS[:prompts])]
    prompt_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = read_config(REPOSITORY / "config.yaml")
    axes = {"stoc_len": [128], "gamma": [gamma], "controls": {"stoc_len": [128], "gamma": [gamma]}}
    cells, _ = expand(load_experiment({**config, **axes, "prompt_file": str(prompt_file), "prompt_limit": None}))
    name, arm = PAIRS[pair]
    cell = next(cell for cell in cells if (cell.pair, cell.arm) == (name, arm))
    return dataclasses.replace(cell, max_new_tokens=max_new_tokens)


def test_smollm2_replayed_is_the_loop_block_by_block(tmp_path):
    cell = smollm2_cell(tmp_path, "shorter", 4, prompts=2, max_new_tokens=8)
    (loop, _), (replay, _) = run_loop(cell, tmp_path), run_replay(as_replay(cell), tmp_path)
    assert_replays(loop, replay)
    assert (loop["accepted"] < 4).sum() > 0


@pytest.mark.full
@pytest.mark.parametrize("pair", PAIRS)
def test_smollm2_replayed_is_the_loop_block_by_block_full(tmp_path, pair):
    for gamma in range(1, 9):
        cell = smollm2_cell(tmp_path, pair, gamma, prompts=8, max_new_tokens=16)
        (loop, _), (replay, _) = run_loop(cell, tmp_path), run_replay(as_replay(cell), tmp_path)
        assert loop["prompt_id"].nunique() == 8
        assert_replays(loop, replay)
        assert (pair == "identity") == (loop["accepted"] == gamma).all()
