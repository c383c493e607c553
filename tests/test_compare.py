"""Two cells and two grids side by side: what is paired, how texts part, and the command line."""

import json

import numpy as np
import pandas as pd
import pytest
from fake_cells import as_blocks, blocks_of_text, fake_keys, fake_metadata, fake_rows, write_fake_grid

from scspec import cli
from scspec.compare import MATCH_COLUMNS, TEXT_COLUMNS, UNMATCHED_COLUMNS, compare, plain_tables, read_side
from scspec.results import KEY_COLUMNS, read_cell, write_cell
from scspec.stats import DIFFERENCE_COLUMNS, Tally, paired_differences

TOKENS = (5, 6, 7, 8, 9, 10, 11, 12)


def side_of(*cells, **metadata):
    """(blocks, metadata) of the rows of some cells."""
    keys = [{name: rows[0][name] for name in KEY_COLUMNS} for rows in cells]
    blocks = as_blocks([row for rows in cells for row in rows])
    return blocks, {its["cell_id"]: fake_metadata(its, **metadata) for its in keys}


def text_rows(keys, texts, *, agree=1, prompt_tokens=20):
    """Rows of a cell with these texts, {(prompt_id, turn): tokens}; the margin of each token is its id / 10."""
    rows = []
    for (prompt_id, turn), tokens in texts.items():
        options = {"gamma": keys["gamma"], "max_new_tokens": len(tokens), "prompt_tokens": prompt_tokens}
        padded = np.array([*tokens, *[99] * (keys["gamma"] + 1)])  # the last block is completed beyond the budget
        for block in blocks_of_text(padded, np.full(len(padded), agree), np.ones(len(padded)), **options):
            margin = [token / 10 for token in block["emitted_ids"]]
            rows.append({**keys, "prompt_id": prompt_id, "category": "code", "turn": turn, **block, "margin": margin})
    return rows


def parting(texts_a, texts_b, **options):
    """The rows of the table of texts, gamma 2 against gamma 4."""
    a = side_of(text_rows(fake_keys(gamma=2), texts_a))
    return compare(a, side_of(text_rows(fake_keys(gamma=4), texts_b, **options))).texts.to_dict("records")


def test_texts_are_equal_whatever_blocks_they_came_in():
    (found,) = parting({("p", 0): TOKENS}, {("p", 0): TOKENS}, agree=0)
    assert list(found) == list(TEXT_COLUMNS)
    assert found["equal"]
    assert pd.isna([found[name] for name in TEXT_COLUMNS[4:]]).all()


def test_texts_part_at_the_first_other_token():
    other = (*TOKENS[:5], 77, *TOKENS[6:])
    (found,) = parting({("p", 0): TOKENS}, {("p", 0): other})
    assert not found["equal"]
    assert (found["turn"], found["position"]) == (0, 20 + 5)
    assert (found["token_a"], found["token_b"]) == (10, 77)
    assert (found["margin_a"], found["margin_b"]) == (pytest.approx(1.0), pytest.approx(7.7))


def test_a_text_that_ends_parts_where_the_other_goes_on():
    """In the first turn, though the shorter one has a second turn with other tokens at later positions."""
    shorter = {("p", 0): TOKENS[:6], ("p", 1): TOKENS}
    (found,) = parting(shorter, {("p", 0): TOKENS, ("p", 1): TOKENS})
    assert (found["turn"], found["position"], found["token_b"], found["margin_b"]) == (0, 26, 11, pytest.approx(1.1))
    assert pd.isna([found["token_a"], found["margin_a"]]).all()
    (mirrored,) = parting({("p", 0): TOKENS, ("p", 1): TOKENS}, shorter)
    assert (mirrored["position"], mirrored["token_a"]) == (26, 11)
    assert pd.isna(mirrored["token_b"])
    (last,) = parting({("p", 0): TOKENS}, {("p", 0): TOKENS[:6]})
    assert (last["position"], last["token_a"]) == (26, 11)
    assert pd.isna(last["token_b"])


def test_turns_and_prompts_are_told_apart():
    a = {("p", 0): TOKENS, ("p", 1): TOKENS, ("q", 0): TOKENS}
    found = parting(a, {**a, ("p", 1): (*TOKENS[:7], 50)})
    assert [its["prompt_id"] for its in found] == ["p", "q"]
    assert [its["equal"] for its in found] == [False, True]
    assert (found[0]["turn"], found[0]["position"], found[0]["token_b"]) == (1, 27, 50)


def test_blocks_may_come_in_any_order():
    texts = {("p", 0): TOKENS, ("p", 1): TOKENS[::-1]}
    blocks, metadata = side_of(text_rows(fake_keys(gamma=2), texts))
    found = compare((blocks, metadata), (blocks.iloc[::-1].reset_index(drop=True), metadata))
    assert found.texts["equal"].tolist() == [True]


def test_other_tokenizers_have_no_common_positions():
    assert parting({("p", 0): TOKENS}, {("p", 0): TOKENS}, prompt_tokens=21) == []


def test_sampled_cells_have_no_texts_to_compare():
    cells = [fake_rows(fake_keys(do_sample=True, sc_seed=seed), prompts=8, seed=seed) for seed in (0, 1)]
    found = compare(side_of(cells[0]), side_of(cells[1]))
    assert found.texts.empty
    assert found.differences[["texts", "equal_texts"]].to_numpy().tolist() == [[0, 0]]
    assert found.differences["interval"].tolist() == ["bootstrap"]
    assert "texts are equal" not in plain_tables(found)


def test_two_cells_are_a_pair_whatever_their_settings():
    rows = [fake_rows(fake_keys(stoc_len=length, gamma=gamma), seed=length) for length, gamma in ((64, 2), (128, 4))]
    found = compare(side_of(rows[0]), side_of(rows[1]), resamples=500, seed=3)
    blocks, metadata = side_of(*rows)
    expected = paired_differences(Tally.of(blocks), metadata, [tuple(metadata)], resamples=500, seed=3)
    pd.testing.assert_frame_equal(found.differences[list(DIFFERENCE_COLUMNS)], expected)
    assert found.differences["texts"].tolist() == [16]
    assert found.unmatched.empty


def grid(alphas, **changed):
    """A cell for each (stoc_len, gamma); seeds of the texts do not depend on the side."""
    return [
        fake_rows(fake_keys(stoc_len=stoc_len, gamma=gamma, **changed), alpha=alpha, seed=stoc_len + gamma)
        for (stoc_len, gamma), alpha in alphas.items()
    ]


def test_grids_are_matched_by_their_keys():
    a = grid({(64, 2): 0.5, (128, 2): 0.6, (128, 4): 0.7})
    a += [fake_rows(fake_keys(arm="float_float"), prompts=16)]  # its lengths and seeds are null
    b = grid({(128, 4): 0.8, (128, 2): 0.6, (256, 2): 0.6})
    b += [[{**row, "cell_id": "elsewhere"} for row in a[-1]]]
    found = compare(side_of(*a), side_of(*b))
    ids = [rows[0]["cell_id"] for rows in a]
    assert found.differences["cell_id_a"].tolist() == ids[1:]
    assert found.differences["cell_id_b"].tolist() == [ids[1], ids[2], "elsewhere"]
    assert found.differences["interval"].tolist() == ["unanimous", "bootstrap", "unanimous"]
    assert found.differences["equal_texts"].tolist()[::2] == [16, 16]
    assert list(found.unmatched.columns) == list(UNMATCHED_COLUMNS)
    assert found.unmatched[["side", "cell_id"]].to_numpy().tolist() == [["a", ids[0]], ["b", b[2][0]["cell_id"]]]
    shown = plain_tables(found)
    assert "Without a partner" in shown
    assert "greedy texts are equal" not in shown  # a grid's would be a row per cell and prompt


def test_cells_that_differ_in_the_streams_of_some_modules_are_two_points():
    """But those of other settings, such as a scope, are one."""
    plain, mixed = (json.dumps({"sc_modules": modules}) for modules in ({}, {"*.mlp.*": {"sc_prec": 6}}))
    cells = [
        [{**row, "cell_id": name, "target_settings": text} for row in rows]
        for rows in grid({(64, 2): 0.5})
        for name, text in (("plain", plain), ("mixed", mixed))
    ]
    published = [{**row, "target_settings": json.dumps({"sc_granularity": "per_row"})} for row in cells[0]]
    found = compare(side_of(*cells), side_of(published, cells[1]))
    assert found.differences[["cell_id_a", "cell_id_b"]].to_numpy().tolist() == [["plain"] * 2, ["mixed"] * 2]


def test_a_replayed_cell_is_compared_with_a_loop_but_first_with_its_like():
    loop = grid({(64, 2): 0.5, (128, 2): 0.6})
    replayed = [{**row, "method": "replay", "cell_id": "replayed"} for row in loop[0]]
    one_loop = compare(side_of(*loop), side_of(replayed, loop[1]))
    assert one_loop.differences["cell_id_b"].tolist() == ["replayed", loop[1][0]["cell_id"]]
    audited = compare(side_of(*loop, replayed), side_of(replayed, loop[0]))
    assert audited.differences[["cell_id_a", "cell_id_b"]].to_numpy().tolist() == [
        [loop[0][0]["cell_id"]] * 2,
        ["replayed"] * 2,
    ]
    assert audited.unmatched["cell_id"].tolist() == [loop[1][0]["cell_id"]]
    elsewhere = compare(side_of(*loop, replayed), side_of(loop[1], *grid({(256, 2): 0.5})))
    assert elsewhere.unmatched["side"].tolist() == ["a", "a", "b"]


def test_grids_that_cannot_be_compared():
    a = side_of(*grid({(64, 2): 0.5, (128, 2): 0.6}))
    with pytest.raises(ValueError, match="no cell of a has a partner in b") as error:
        compare(a, side_of(*grid({(256, 2): 0.5, (512, 2): 0.5})))
    assert all(name in str(error.value) for name in MATCH_COLUMNS)
    with pytest.raises(ValueError, match="no cell of a has a partner in b"):
        compare(a, side_of(*grid({(64, 2): 0.5, (128, 2): 0.6}), device="cpu: another"))
    again = [{**row, "cell_id": "again"} for row in grid({(64, 2): 0.5})[0]]
    with pytest.raises(ValueError, match=r"cells 'b: .*' and 'b: again' have the same pair, arm"):
        compare(a, side_of(*grid({(64, 2): 0.5}), again))
    with pytest.raises(ValueError, match=r"cells 'a: .*' and 'b: .*' must have the same do_sample"):
        compare(side_of(fake_rows(fake_keys())), side_of(fake_rows(fake_keys(do_sample=True))))


# --- files and the command line ------------------------------------------------------------------------------


def written(path, rows, **metadata):
    write_cell(path, rows, fake_metadata(rows[0], **metadata))
    return path


def test_a_side_is_a_file_or_a_folder(tmp_path):
    write_fake_grid(tmp_path / "grid", prompts=2)
    blocks, metadata = read_side(tmp_path / "grid")
    assert len(metadata) == blocks["cell_id"].nunique() > 20
    path = next((tmp_path / "grid").rglob("*.parquet"))
    pd.testing.assert_frame_equal(read_side(path)[0], read_cell(path)[0])


def test_two_files_on_the_command_line(tmp_path, capsys):
    same = {f"p{n}": TOKENS for n in range(8)}
    other = {**same, "p3": (*TOKENS[:5], 77, *TOKENS[6:])}
    a, b = (
        written(
            tmp_path / f"{name}.parquet", text_rows(fake_keys(gamma=2), {(p, 0): text for p, text in texts.items()})
        )
        for name, texts in (("a", same), ("b", other))
    )
    assert cli.main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "7 of 8 greedy texts are equal." in shown
    assert shown.count(fake_keys(gamma=2)["cell_id"]) == 1
    assert "(unanimous)" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["p3"]]
    assert row == ["p3", "0", "25", "10", "77", "1.0000", "7.7000"]


def test_two_folders_on_the_command_line(tmp_path, capsys):
    for name, lengths in (("a", (64, 128)), ("b", (128, 256))):
        for length in lengths:
            written(tmp_path / name / f"{length}.parquet", fake_rows(fake_keys(stoc_len=length), prompts=3))
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "none" in shown
    assert "3 of 3" in shown
    assert [line.split()[:2] for line in shown.splitlines()[-2:]] == [
        ["a", fake_keys(stoc_len=64)["cell_id"]],
        ["b", fake_keys(stoc_len=256)["cell_id"]],
    ]


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    a = written(tmp_path / "a.parquet", fake_rows(fake_keys(), prompts=2))
    b = written(tmp_path / "b.parquet", fake_rows(fake_keys(), prompts=3))
    for other, named in (
        (tmp_path / "nothing", "nothing: no such file or folder"),
        (tmp_path / "empty", "empty: no Parquet file in this folder"),
        (b, "must have the same prompts to be compared, not 2 and 3, 'p02' in one of them alone"),
    ):
        assert cli.main(["compare", str(a), str(other)]) == cli.USER_ERROR
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
