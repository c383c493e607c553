"""A cell that was killed goes on at the next prompt, and its file is that of an undisturbed run, times apart."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import tiny_cells

from scspec import preflight, provenance, run, task
from scspec.cells import expand
from scspec.checkpoint import Checkpoint, FinishedPrompt
from scspec.config import load_experiment, read_config
from scspec.jobs import Cell
from scspec.provenance import sha256_of
from scspec.results import read_cell
from scspec.task import Task

REPOSITORY = Path(__file__).resolve().parents[1]
TURNS = [["Hi"], ["What is this?", "And that?"], ["Why? " * 9], ["No", "Yes", "No"], ["So"]]
PROMPTS = [{"question_id": str(i), "category": "letters", "turns": turns} for i, turns in enumerate(TURNS)]
TIMES = ["draft_time_s", "verify_time_s"]
KEY = {"commit": "a", "cell": {"gamma": 2}, "share": 1 / 3}


class KilledError(Exception):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return tiny_cells(tmp_path_factory.mktemp("checkpoint"), PROMPTS)


def killed(cell: Cell, output: Path, blocks: int, **arguments) -> None:
    """Run a cell that dies when it has decoded so many blocks."""
    decode = Task._blocks

    def some(*its_arguments, **its_options):
        yield from islice(decode(*its_arguments, **its_options), blocks)
        raise KilledError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Task, "_blocks", some)
        with pytest.raises(KilledError):
            run.run_cell(cell, output, **arguments)


def partial(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f".{output.name}.*"))


def saved(output: Path) -> list[dict]:
    """The lines of all attempts that are prompts."""
    return [json.loads(line) for path in partial(output) for line in path.read_text().splitlines()[1:]]


def assert_same(found: Path, undisturbed: Path) -> None:
    """Both hold the same blocks to the bit and in the same order, and say the same of where they came from."""
    tables, told = [], []
    for path in (found, undisturbed):
        tables.append(pq.ParquetFile(path).read().drop_columns(TIMES))
        metadata = read_cell(path)[1]
        told.append({name: metadata[name] for name in metadata.keys() - {"started_at", "wall_time_s", "attempts"}})
    assert tables[0].num_rows == tables[1].num_rows
    assert tables[0].equals(tables[1])
    assert told[0] == told[1]


@pytest.fixture(scope="module")
def undisturbed(cells, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "cell.parquet"
    run.run_cell(cells["sc_sc"], output)
    return output


@pytest.mark.parametrize("slots", [1, 2])
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(cells, undisturbed, tmp_path, slots):
    """Before the first block, twice within prompts, some of several turns, and after the last block of all."""
    output = tmp_path / "cell.parquet"
    counts = []
    for blocks in (0, 20, 12, 1000):
        killed(cells["sc_sc"], output, blocks, prompts_per_batch=slots)
        counts.append(len(saved(output)))
        assert not output.exists()
    lines = saved(output)
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] == len(PROMPTS)
    assert sorted(line["prompt_id"] for line in lines) == [prompt["question_id"] for prompt in PROMPTS]
    run.run_cell(cells["sc_sc"], output, prompts_per_batch=slots)
    assert_same(output, undisturbed)
    assert list(tmp_path.iterdir()) == [output]


def test_what_was_decoded_is_not_decoded_again_and_keeps_its_times(cells, undisturbed, tmp_path):
    output = tmp_path / "cell.parquet"
    killed(cells["sc_sc"], output, 1000)
    lines = saved(output)
    killed(cells["sc_sc"], output, 0)  # dies at the first question for blocks, which would decode: none is asked for
    assert saved(output) == lines
    run.run_cell(cells["sc_sc"], output)
    assert_same(output, undisturbed)
    blocks, metadata = read_cell(output)
    rows = sorted((row for line in lines for row in line["rows"]), key=lambda row: row["prompt_id"])
    for name in TIMES:
        assert blocks[name].to_list() == [row[name] for row in rows]
    first, last = metadata["attempts"]
    assert (first["prompts"], last["prompts"]) == (len(PROMPTS), 0)
    assert first["wall_time_s"] == lines[-1]["wall_time_s"]
    assert metadata["wall_time_s"] == first["wall_time_s"] + last["wall_time_s"]


def pending(cell: Cell, output: Path, monkeypatch, **arguments) -> list[str]:
    """The ids of the prompts that a run would decode now; it dies before it does."""
    asked = []

    def decode(task, prompts, save, rows_of, **options):
        asked.extend(prompt.prompt_id for prompt in prompts)
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Task, "decode", decode)
        with pytest.raises(KilledError):
            run.run_cell(cell, output, **arguments)
    return asked


@pytest.fixture
def one_saved(cells, tmp_path) -> Path:
    """The output of a run that died when it had saved the first prompt."""
    output = tmp_path / "cell.parquet"
    with pytest.MonkeyPatch.context() as patched:
        finished = FinishedPrompt("0", [[1]], [{"turn": 0}])
        patched.setattr(Task, "decode", lambda task, prompts, save, *_, **__: save(finished))
        with pytest.raises(KeyError):  # the other prompts are missing
            run.run_cell(cells["sc_sc"], output)
    assert len(saved(output)) == 1
    return output


def test_speed_settings_and_a_dirty_tree_go_on(cells, one_saved, monkeypatch):
    commit = json.loads(partial(one_saved)[0].read_text().splitlines()[0])["key"]["commit"]
    monkeypatch.setattr(provenance, "commit", lambda: (commit, True))
    assert pending(cells["sc_sc"], one_saved, monkeypatch, threads=2, prompts_per_batch=3) == ["1", "2", "3", "4"]


def manifest_of(name: str) -> dict:
    return {"name": name, "source": "folder", "sha256": {"model.safetensors": "0"}, "note": ""}


VERSIONS = provenance.versions()
OTHER_RUNS = {
    "commit": lambda patch: patch.setattr(provenance, "commit", lambda: ("0", False)),
    "sources": lambda patch: patch.setattr(provenance, "sources_sha256", lambda: "0"),
    "versions.torch": lambda patch: patch.setattr(provenance, "versions", lambda: {**VERSIONS, "torch": "0"}),
    "device": lambda patch: patch.setattr(provenance, "device_name", lambda device: "another"),
    "models.target.sha256.model.safetensors": lambda patch: patch.setattr(task, "fetch_model", manifest_of),
    "schema_version": lambda patch: patch.setattr(task, "SCHEMA_VERSION", 0),
    "first_turns": lambda patch: patch.setattr(preflight, "turn_ids", lambda *_: [1, 2]),
}


@pytest.mark.parametrize("differing", OTHER_RUNS)
def test_another_run_starts_afresh_and_says_why(cells, one_saved, monkeypatch, capsys, differing):
    left = partial(one_saved)[0]
    with monkeypatch.context() as patched:
        OTHER_RUNS[differing](patched)
        assert pending(cells["sc_sc"], one_saved, monkeypatch) == ["0", "1", "2", "3", "4"]
    said = [line for line in capsys.readouterr().err.splitlines() if str(left) in line]
    assert len(said) == 1
    assert "its prompts are decoded again: this run differs in " in said[0]
    assert differing in said[0].partition(" differs in ")[2].split(", ")


def test_another_cell_starts_afresh(cells, one_saved, monkeypatch, capsys):
    cell = dataclasses.replace(cells["sc_sc"], gamma=2)
    assert pending(cell, one_saved, monkeypatch) == ["0", "1", "2", "3", "4"]
    assert "this run differs in cell.gamma\n" in capsys.readouterr().err


def test_a_budget_or_a_system_text_more_starts_afresh(cells, one_saved, tmp_path, monkeypatch, capsys):
    """They are in the prompt file's hash; of a budget the first turns say nothing."""
    file = str(tmp_path / "prompts.jsonl")
    Path(file).write_text("".join(json.dumps({**prompt, "max_new_tokens": 2}) + "\n" for prompt in PROMPTS))
    cell = dataclasses.replace(cells["sc_sc"], prompt_file=file, prompt_sha256=sha256_of(file))
    assert pending(cell, one_saved, monkeypatch) == ["0", "1", "2", "3", "4"]
    assert "this run differs in cell.prompt_file, cell.prompt_sha256\n" in capsys.readouterr().err


def resumed(output: Path, key: dict = KEY) -> Checkpoint:
    checkpoint = Checkpoint(output)
    checkpoint.resume(key)
    return checkpoint


def prompt(name: str) -> FinishedPrompt:
    return FinishedPrompt(name, [[1, 2], [3]], [{"turn": 0, "beta": [1 / 3], "stop": None}])


def test_attempts_side_by_side_are_united(tmp_path):
    """A prompt that two of them finished counts once, for the one that began first."""
    output = tmp_path / "[1].parquet"  # a name that is a pattern, too
    first, second = resumed(output), resumed(output)
    first._header["started_at"] = first._origin["started_at"] = "2000-01-01T00:00:00+00:00"
    first._path.unlink()  # and the file begins with that time
    first.save(prompt("a"))
    first.save(prompt("b"))
    second.save(prompt("b"))
    second.save(prompt("c"))
    third = resumed(output)
    assert third.finished == {name: prompt(name) for name in "abc"}
    assert [attempt["prompts"] for attempt in third.attempts()] == [2, 1, 0]
    assert third.attempts()[0]["started_at"] == "2000-01-01T00:00:00+00:00"


def test_files_of_this_output_alone_are_removed(tmp_path):
    outputs = [tmp_path / name for name in ("1.parquet", "11.parquet")]
    for output in outputs:
        resumed(output).save(prompt("a"))
    resumed(outputs[0], {"commit": "b"}).remove()
    assert not partial(outputs[0])
    assert len(partial(outputs[1])) == 1


def test_a_run_whose_file_another_removed_goes_on_saving(tmp_path):
    output = tmp_path / "cell.parquet"
    slower = resumed(output)
    slower.save(prompt("a"))
    resumed(output).remove()
    slower.save(prompt("b"))
    assert resumed(output).finished == {"b": prompt("b")}


def test_a_file_torn_anywhere_costs_what_is_torn(tmp_path, capsys):
    output = tmp_path / "cell.parquet"
    whole = resumed(output)
    for name in "abc":
        whole.save(prompt(name))
    text = whole._path.read_bytes()
    whole._path.unlink()
    torn = tmp_path / ".cell.parquet.1.a.partial"
    for length in range(0, len(text) + 1, 7):
        torn.write_bytes(text[:length])
        checkpoint, lines = resumed(output), text[:length].count(b"\n")
        assert list(checkpoint.finished) == ["a", "b", "c"][: max(lines - 1, 0)]
        said = str(torn) in capsys.readouterr().err
        assert said == (not lines or text[length - 1 : length] != b"\n")
        checkpoint._path.unlink()


def test_what_is_no_checkpoint_costs_its_prompts_only(tmp_path, capsys):
    """A line overwritten in the middle, bytes that are no text, and a folder that cannot be read as a file."""
    output = tmp_path / "cell.parquet"
    good = resumed(output)
    for name in "abc":
        good.save(prompt(name))
    lines = good._path.read_bytes().splitlines(keepends=True)
    good._path.write_bytes(b"".join([*lines[:2], b"\0" * 40 + b"\n", lines[3]]))
    (tmp_path / ".cell.parquet.1.a.partial").write_bytes(b"\xff\n\xfe")
    (tmp_path / ".cell.parquet.1.b.partial").mkdir()
    assert set(resumed(output).finished) == {"a", "c"}
    said = capsys.readouterr().err
    assert said.count("decoded again") == 3
    for path in partial(output)[:2]:
        assert str(path) in said


def no_space(*_, **__) -> None:
    """What a full disk makes of a write: an error that names no file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_before_anything_is_decoded(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "decode", lambda *_, **__: pytest.fail("decoded, and could not save"))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.cell\.parquet\..*\.partial'$"):
        run.run_cell(cells["sc_sc"], tmp_path / "cell.parquet")


def test_a_cell_that_cannot_be_written_keeps_what_was_decoded(cells, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "cell.parquet"
    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", no_space)
        with pytest.raises(OSError, match=r"No space left on device: '.*/cell\.parquet'$"):
            run.run_cell(cells["sc_sc"], output)
    assert not output.exists()
    assert len(saved(output)) == len(PROMPTS)
    run.run_cell(cells["sc_sc"], output)
    assert_same(output, undisturbed)


def test_a_prompt_that_cannot_be_saved_is_not_finished(tmp_path, monkeypatch):
    checkpoint = resumed(tmp_path / "cell.parquet")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.partial'$"):
        checkpoint.save(prompt("a"))
    assert not checkpoint.finished


def test_a_checkpoint_that_stays_behind_fails_no_finished_cell(tmp_path, monkeypatch, capsys):
    def denied(path, missing_ok):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    checkpoint = resumed(tmp_path / "cell.parquet")
    monkeypatch.setattr(Path, "unlink", denied)
    checkpoint.remove()
    assert f"{checkpoint._path}: not removed: Permission denied\n" == capsys.readouterr().err


# Real weights and real kills.

DIES = """
import os, signal, sys
from scspec import checkpoint, cli

save = checkpoint.Checkpoint.save

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoint.save = save_and_die
cli.main(sys.argv[1:])
"""


def smollm2_cell(**changed) -> Cell:
    cells, _ = expand(load_experiment(read_config(REPOSITORY / "config.yaml")))
    wanted = ("smollm2-shorter", "sc_sc", 64)
    cell = next(cell for cell in cells if (cell.pair, cell.arm, cell.stoc_len) == wanted)
    prompts = str(REPOSITORY / "prompts/smoke.jsonl")
    return dataclasses.replace(cell, prompt_file=prompts, prompt_sha256=sha256_of(prompts), **changed)


def start(cell: Cell, output: Path, *program: str) -> subprocess.Popen:
    command = [sys.executable, *program, "run-cell", cell.to_json(), "--output", str(output)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def test_smollm2_killed_once_ends_as_undisturbed(tmp_path):
    cell = smollm2_cell(prompt_limit=2, max_new_tokens=4)
    output, undisturbed = tmp_path / "cell.parquet", tmp_path / "undisturbed.parquet"
    assert start(cell, output, "-c", DIES).wait(120) == -signal.SIGKILL
    assert len(saved(output)) == 1
    run.run_cell(cell, undisturbed)
    run.run_cell(cell, output)
    assert_same(output, undisturbed)
    assert [attempt["prompts"] for attempt in read_cell(output)[1]["attempts"]] == [1, 1]


@pytest.mark.full
@pytest.mark.parametrize("slots", [1, 2])
def test_smollm2_killed_at_three_points_ends_as_undisturbed_full(tmp_path, slots):
    """Within the first prompts and twice within later ones, each time from outside."""
    cell = smollm2_cell(max_new_tokens=24)
    output, undisturbed = tmp_path / "cell.parquet", tmp_path / "undisturbed.parquet"
    for prompts in (0, 1, 2):
        process = start(cell, output, "-m", "scspec")
        while not any(map(Path.read_bytes, partial(output))) or len(saved(output)) < prompts:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)  # into the next prompt
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not output.exists()
    assert 2 <= len(saved(output)) < 4
    for path in (output, undisturbed):
        assert start(cell, path, "-m", "scspec").wait(600) == 0
    assert_same(output, undisturbed)
    assert len(read_cell(output)[1]["attempts"]) == 3
