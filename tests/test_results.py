"""The Parquet file of a cell: what it accepts, what it refuses, and that it is whole or absent."""

import errno
import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_cells import fake_keys, fake_metadata, fake_rows

from scspec.results import (
    KEY_COLUMNS,
    METADATA_KEY,
    SCHEMA,
    atomic_file,
    check_identities,
    read_cell,
    read_cells,
    write_cell,
)


@pytest.fixture
def keys():
    return fake_keys()


@pytest.fixture
def rows(keys):
    return fake_rows(keys, prompts=3, eos_rate=0.02)


@pytest.fixture
def cell(tmp_path, keys, rows):
    path = tmp_path / "cell.parquet"
    write_cell(path, rows, fake_metadata(keys))
    return path


def plain(value):
    if isinstance(value, list | np.ndarray):
        return list(value)
    return None if pd.isna(value) else value


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_is_written_is_read(cell, keys, rows):
    blocks, metadata = read_cell(cell)
    assert metadata == fake_metadata(keys)
    assert list(blocks.columns) == SCHEMA.names
    assert len(blocks) == len(rows)
    for name in SCHEMA.names:
        assert [plain(value) for value in blocks[name]] == [row[name] for row in rows], name
    assert pq.ParquetFile(cell).metadata.row_group(0).column(0).compression == "ZSTD"


def test_numpy_values_are_written(tmp_path, keys, rows):
    for row in rows:
        row["beta"], row["margin"] = np.array(row["beta"]), np.array(row["margin"], dtype=np.float32)
        row["accepted"], row["do_sample"] = np.int64(row["accepted"]), np.bool_(row["do_sample"])
    write_cell(tmp_path / "cell.parquet", rows, fake_metadata(keys))
    assert read_cell(tmp_path / "cell.parquet")[0]["beta"].map(list).tolist() == [list(row["beta"]) for row in rows]


def test_float_sides_are_null(tmp_path):
    keys = fake_keys(arm="float_float")
    write_cell(tmp_path / "cell.parquet", fake_rows(keys, prompts=1), fake_metadata(keys))
    blocks, _ = read_cell(tmp_path / "cell.parquet")
    for name in ("stoc_len", "sc_prec", "sc_seed", "target_stoc_len", "draft_sc_seed"):
        assert blocks[name].dtype == "Int32"
        assert blocks[name].isna().all()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("accepted", 1.5),  # pyarrow would cut it to 1
        ("accepted", True),
        ("accepted", None),
        ("accepted", 2**31),
        ("gamma", "4"),
        ("beta", [None]),
        ("beta", 1.0),
        ("emitted_ids", [1.0]),
        ("do_sample", 0),
        ("prompt_id", 7),
        ("pair", None),
    ],
)
def test_wrong_values_are_refused(tmp_path, keys, rows, column, value):
    for row in rows:
        row[column] = value
    with pytest.raises(ValueError, match=column if value != 2**31 else "too large"):
        write_cell(tmp_path / "cell.parquet", rows, fake_metadata(keys))
    assert list(tmp_path.iterdir()) == []


def test_columns_are_exactly_the_schema(tmp_path, keys, rows):
    rows[1]["extra"] = rows[1].pop("kept")
    with pytest.raises(ValueError, match=r"row 1: unknown columns \['extra'\], missing columns \['kept'\]"):
        write_cell(tmp_path / "cell.parquet", rows, fake_metadata(keys))


def test_a_file_is_one_cell(tmp_path, keys, rows):
    rows[-1]["gamma"] = 5
    with pytest.raises(ValueError, match=r"gamma has the values \[4, 5\]"):
        write_cell(tmp_path / "cell.parquet", rows, fake_metadata(keys))
    with pytest.raises(ValueError, match="no rows"):
        write_cell(tmp_path / "cell.parquet", [], fake_metadata(keys))


def test_metadata_is_complete(tmp_path, keys, rows):
    metadata = fake_metadata(keys)
    del metadata["commit"], metadata["schema_version"]  # the second is filled in
    with pytest.raises(ValueError, match=r"missing metadata keys \['commit'\]"):
        write_cell(tmp_path / "cell.parquet", rows, metadata)
    with pytest.raises(ValueError, match="schema_version is 1"):
        write_cell(tmp_path / "cell.parquet", rows, fake_metadata(keys, schema_version=1))


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync", "pyarrow.parquet.write_table"])
def test_a_failed_write_leaves_the_old_cell_and_nothing_else(cell, keys, rows, monkeypatch, fails):
    before = cell.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(fails, fail)
    with pytest.raises(OSError, match="disk full"):
        write_cell(cell, rows[:1], fake_metadata(keys))
    assert cell.read_bytes() == before
    assert [path.name for path in cell.parent.iterdir()] == [cell.name]


def test_until_complete_a_file_is_hidden_beside_its_place(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        assert len(hidden(path.parent)) == 1
    assert path.read_bytes() == b"half"
    assert hidden(path.parent) == []


def test_two_writers_do_not_share_a_temporary_name(tmp_path):
    with atomic_file(tmp_path / "x") as first, atomic_file(tmp_path / "x") as second:
        assert first.name != second.name


def test_a_key_value_folder_adds_no_column(tmp_path, keys, rows):
    path = tmp_path / "stoc_len=7" / "cell.parquet"
    write_cell(path, rows, fake_metadata(keys))
    assert set(read_cell(path)[0]["stoc_len"]) == {128}


def one_line_error(path):
    with pytest.raises(ValueError, match=path.name) as error:
        read_cell(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_a_torn_file_is_named(cell, keep):
    cell.write_bytes(cell.read_bytes()[:keep])
    assert "not a readable Parquet file" in one_line_error(cell)


def test_a_torn_middle_is_named(cell):
    content = bytearray(cell.read_bytes())
    content[200:2000] = bytes(1800)
    cell.write_bytes(content)
    assert "not a readable Parquet file" in one_line_error(cell)


def test_a_disk_that_fails_is_not_a_torn_file(cell, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(OSError, match="Input/output error"):
        read_cell(cell)


def test_a_missing_file_is_not_a_torn_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_cell(tmp_path / "cell.parquet")


def rewrite(path, table, **metadata):
    packed = table.schema.metadata
    if metadata:
        packed = {METADATA_KEY: json.dumps({**json.loads(packed[METADATA_KEY]), **metadata}).encode()}
    pq.write_table(table.replace_schema_metadata(packed), path)


def test_foreign_and_changed_files_are_named(cell):
    table = pq.ParquetFile(cell).read()
    rewrite(cell, table.drop_columns(["beta", "stop"]))
    assert "missing columns ['beta', 'stop']" in one_line_error(cell)
    rewrite(cell, table.append_column("more", pa.array([1] * len(table))))
    assert "unknown columns ['more']" in one_line_error(cell)
    rewrite(cell, table.set_column(table.schema.get_field_index("kept"), "kept", pa.array([1.0] * len(table))))
    assert "column kept is double, expected int32" in one_line_error(cell)
    rewrite(cell, table, schema_version=1)
    assert "schema_version is 1, this code reads 2" in one_line_error(cell)
    pq.write_table(pa.table({"x": [1]}), cell)
    assert "not written by scspec" in one_line_error(cell)


def test_many_cells_are_one_table(tmp_path):
    paths = []
    for gamma in (2, 4):
        keys = fake_keys(gamma=gamma)
        paths.append(tmp_path / f"{gamma}.parquet")
        write_cell(paths[-1], fake_rows(keys, prompts=2), fake_metadata(keys))
    blocks, metadata = read_cells(paths)
    assert list(metadata) == [fake_keys(gamma=gamma)["cell_id"] for gamma in (2, 4)]
    assert set(blocks["gamma"]) == {2, 4}
    assert blocks.index.is_unique
    with pytest.raises(ValueError, match="already read"):
        read_cells([*paths, paths[0]])


def test_no_cells_are_an_empty_table():
    blocks, metadata = read_cells([])
    assert list(blocks.columns) == SCHEMA.names
    assert blocks.empty
    assert metadata == {}
    check_identities(blocks)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("eos_rate", [0, 0.1])
@pytest.mark.parametrize("gamma", [1, 4])
def test_real_blocks_satisfy_the_identities(do_sample, eos_rate, gamma):
    keys = fake_keys(gamma=gamma, do_sample=do_sample)
    check_identities(pd.DataFrame(fake_rows(keys, eos_rate=eos_rate, turns=2)).sample(frac=1, random_state=0))


def one_prompt():
    """Two blocks at gamma 2: (8 accepted, 9 rejected, 10 the correction), then (11, 12 accepted, 13 the bonus)."""
    shared = {**fake_keys(gamma=2), "prompt_id": "p", "category": "maths", "turn": 0, "prompt_tokens": 5, "weight": 1.0}
    times = {"draft_time_s": 0.1, "verify_time_s": 0.2}
    first = {"block": 0, "start": 5, "proposed_ids": [8, 9], "emitted_ids": [8, 10], "accepted": 1, "kept": 2}
    second = {"block": 1, "start": 7, "proposed_ids": [11, 12], "emitted_ids": [11, 12, 13], "accepted": 2, "kept": 2}
    return [
        {**shared, **first, "beta": [1.0, 0.0], "margin": [1.0, 1.0], "stop": None, **times},
        {**shared, **second, "beta": [1.0, 1.0, 0.0], "margin": [1.0] * 3, "stop": "budget", **times},
    ]


@pytest.mark.parametrize(
    ("block", "changes", "fault"),
    [
        (0, {"proposed_ids": [8]}, "gamma tokens"),
        (0, {"accepted": 3}, "outside 0..gamma"),
        (0, {"accepted": -1}, "outside 0..gamma"),
        (0, {"accepted": 0}, "not 1..accepted"),
        (0, {"emitted_ids": []}, "not 1..accepted"),
        (0, {"beta": [1.0]}, "one value per emitted"),
        (0, {"margin": [1.0]}, "one value per emitted"),
        (0, {"stop": "length"}, "'eos' or 'budget'"),
        (0, {"accepted": 2}, "without a stop"),
        (0, {"kept": 0}, "kept is outside"),
        (0, {"kept": 3}, "kept is outside"),
        (0, {"kept": 1}, "stop is not 'budget'"),
        (1, {"stop": "eos"}, "stop is not 'budget'"),
        (0, {"emitted_ids": [9, 10]}, "begin with the accepted"),
        (1, {"beta": [1.0, 1.0, 1.1]}, "outside 0..1"),
        (1, {"beta": [1.0, 1.0, float("nan")]}, "NaN"),
        (0, {"beta": [1.0, 1.0]}, "greedy"),
        (0, {"beta": [0.5, 0.0]}, "greedy"),
        (1, {"stop": None, "kept": 3}, "no stop"),
        (0, {"stop": "budget"}, "another block follows"),
        (1, {"start": 8}, "does not start where"),
        (0, {"method": "guess"}, "'loop' or 'replay'"),
        (0, {"weight": 0.5}, "weight is not 1"),
        (0, {"draft_time_s": None}, "times are not null"),
        (0, {"method": "replay", "draft_time_s": None}, "times are not null"),
    ],
)
def test_a_violated_identity_names_the_block(block, changes, fault):
    rows = one_prompt()
    check_identities(pd.DataFrame(rows))
    rows[block].update(changes)
    where = 0 if "does not start" in fault else block
    with pytest.raises(ValueError, match=f"{fault}.*'prompt_id': 'p'.*'block': {where},"):
        check_identities(pd.DataFrame(rows))


REPLAYED = {"method": "replay", "draft_time_s": None, "verify_time_s": None}


@pytest.mark.parametrize("proposed", [[8], [8, 9]])  # up to the last accepted one, or the first rejected one
def test_a_replayed_block_knows_its_proposals_up_to_the_first_rejection(proposed):
    rows = [{**row, **REPLAYED} for row in one_prompt()]
    rows[0]["proposed_ids"] = proposed
    check_identities(pd.DataFrame(rows))


@pytest.mark.parametrize("proposed", [[], [8, 9, 9]])
def test_a_replayed_block_with_other_proposals_is_named(proposed):
    rows = [{**row, **REPLAYED} for row in one_prompt()]
    rows[0]["proposed_ids"] = proposed
    with pytest.raises(ValueError, match=r"first rejected proposal.*'block': 0"):
        check_identities(pd.DataFrame(rows))


def expected_blocks():
    """A replayed sampled text of two tokens at gamma 1, whose first token is accepted with probability 0.25."""
    shared = {**fake_keys(gamma=1, do_sample=True), **REPLAYED, "prompt_id": "p", "category": "maths", "turn": 0}
    first = {**shared, "prompt_tokens": 5, "start": 5, "beta": [0.5], "margin": [1.0]}
    rejected = {"block": 0, "weight": 0.75, "proposed_ids": [], "emitted_ids": [8], "accepted": 0, "kept": 1}
    accepted = {"block": 1, "weight": 0.25, "proposed_ids": [8], "emitted_ids": [8, 9], "accepted": 1, "kept": 2}
    last = {"block": 2, "weight": 0.75, "proposed_ids": [], "emitted_ids": [9], "accepted": 0, "kept": 1}
    return [
        {**first, **rejected, "stop": None},
        {**first, **accepted, "beta": [0.5, 0.5], "margin": [1.0, 1.0], "stop": "eos"},
        {**first, **last, "start": 6, "stop": "eos"},
    ]


def test_expected_blocks_satisfy_the_identities():
    check_identities(pd.DataFrame(expected_blocks()))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"weight": 0.0}, "weight is not 1"),
        ({"weight": 1.5}, "weight is not 1"),
        ({"weight": 0.5}, "expected to end once"),
        ({"stop": None}, "expected to end once"),
    ],
)
def test_a_violated_identity_of_expected_blocks_is_named(changes, fault):
    rows = expected_blocks()
    rows[2].update(changes)
    with pytest.raises(ValueError, match=fault):
        check_identities(pd.DataFrame(rows))


def test_an_end_of_text_may_cut_a_block():
    rows = one_prompt()
    rows[1].update(emitted_ids=[11], beta=[1.0], margin=[1.0], kept=1, stop="eos")
    check_identities(pd.DataFrame(rows))
    rows[1].update(stop="budget")  # an end of text behind the budget cuts the block, but did not stop it
    check_identities(pd.DataFrame(rows))


def test_key_columns_come_first():
    assert tuple(SCHEMA.names[: len(KEY_COLUMNS)]) == KEY_COLUMNS
    assert KEY_COLUMNS[-1] == "do_sample"
