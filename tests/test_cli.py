"""The command line: what it imports, and each mistake of a user as one line that says what, where and what to do."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from experiments import REPOSITORY, experiment_of
from huggingface_hub import errors as hub
from tiny import tiny_cells

from scspec.cli import main

PROMPTS = [{"question_id": "one", "category": "letters", "turns": ["Hello"]}]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without a config.yaml


@pytest.fixture
def refused(capsys: pytest.CaptureFixture):
    """A function that runs a command line that is refused, and returns the one line on stderr."""

    def run(*arguments: str, traceback: bool = False) -> str:
        assert main(arguments) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith("scspec: error: ")
        assert any(each.startswith("Traceback") for each in before) == traceback
        assert traceback or not before
        return line.removeprefix("scspec: error: ")

    return run


def config_file(folder: Path, **changes: object) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment_of(**changes)))
    return str(folder / "config.yaml")


def test_the_module_runs_and_tells_its_version() -> None:
    command = [sys.executable, "-m", "scspec", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "scspec"
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["models", "--help"]])
def test_help_is_plain_text(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: scspec")
    assert shown.isascii()  # no boxes, no colours
    assert "\x1b" not in shown
    assert "completion" not in shown


def test_a_plan_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from scspec.cli import main; code = main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "plan", "--configfile", config_file(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "Estimate for backend cpu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "Missing command; see: scspec --help"),
        ("models", "Missing command; see: scspec models --help"),
        ("pla", "No such command 'pla'. Did you mean 'plan', 'replay'?; see: scspec --help"),
        ("fetch x", "No such command 'fetch'; see: scspec --help"),
        ("plan --configfil x", "No such option: --configfil (Possible options: --configfile); see: scspec plan --help"),
        ("plan --alpha much", "Invalid value for '--alpha'"),
        ("plan --alpha 1.5", "Invalid value for '--alpha'"),
        ("plan x", "unexpected extra argument"),
        ("run-cell", "Missing argument"),
        ("run-cell {}", "Missing option '--output'; see: scspec run-cell --help"),
        ("run-cell {} --output x --threads two", "Invalid value for '--threads'"),
        ("run-quality {} --output x", "Missing option '--trajectory'"),
        ("replay {} --output x --trajectory y", "Missing option '--predictions'"),
        ("report --plan x", "Missing option '--output'"),
        ("compare a", "Missing argument"),
    ],
)
def test_options_that_are_none(refused, arguments: str, named: str) -> None:
    assert named in refused(*arguments.split())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "config file {path} does not exist"),
        (b"gama: 1", "config: unknown key 'gama' (did you mean 'gamma'?)"),
        (b"pairs: [", "{path}: not YAML"),
        (b"\xff\xfe\x00", "{path}: not UTF-8"),
        (b"", "config: None is not allowed"),
    ],
)
def test_a_configuration_that_is_none(refused, tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refused("plan", "--configfile", str(path)).startswith(named.format(path=path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gamma": []}, "gamma: [] is not allowed; allowed: "),
        ({"stoc_len": "many"}, "stoc_len: 'many' is not allowed; allowed: "),
        ({"device": "cuda"}, "backend: 'cpu' is not allowed with device: 'cuda'; allowed: cuda, triton"),
        ({"prompt_file": "none.jsonl"}, "prompt_file: 'none.jsonl' cannot be read"),
        ({"quality": {"text_file": "none.txt"}, "controls": {}}, "quality.text_file: 'none.txt' cannot be read"),
    ],
)
def test_settings_that_are_not_allowed(refused, tmp_path: Path, changes: dict, named: str) -> None:
    assert refused("plan", "--configfile", config_file(tmp_path, **changes)).startswith(named)


def test_impossible_combinations_are_listed_and_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--configfile", config_file(tmp_path, sc_prec=[6, 8])]) == 0
    lines = capsys.readouterr().out.splitlines()
    above = "target stoc_len 128 is above 2**sc_prec = 64"
    assert lines[1] == f"invalid, not run: tiny/sc_sc stoc_len=128 sc_prec=6: {above}"
    assert lines[2] == "1 cells, 1 invalid combinations"


def test_a_file_is_laid_over_the_config_that_is_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config_file(tmp_path)
    Path("mine.yaml").write_text(
        "gamma: [2]\npairs: {tiny: {enabled: false}, mine: {target: {model: a}, draft: {model: b}}}\n"
    )
    assert main(["plan", "--configfile", "mine.yaml"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "mine/sc_sc/L128_d128_p8_g2_s0_n0"
    assert second == "1 cells, 0 invalid combinations"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file; snakemake writes it"),
        ("{", "no plan of a run (JSONDecodeError"),
        ("{}", "no plan of a run (KeyError: 'cells')"),
        ('{"cells": [{"path": "none"}]}', "none of its 1 cells has been run yet; run: snakemake"),
    ],
)
def test_a_plan_that_is_none(refused, tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    line = refused("report", "--plan", str(path), "--output", str(tmp_path / "index.html"))
    assert line.startswith(f"{path}: {named}")


def test_a_parquet_file_that_is_none(refused, tmp_path: Path) -> None:
    (tmp_path / "cell.parquet").write_bytes(b"torn")
    line = refused("compare", str(tmp_path / "cell.parquet"), str(tmp_path / "cell.parquet"))
    assert line.startswith(f"{tmp_path}/cell.parquet: not a readable Parquet file")


def test_debug_shows_where_an_error_came_from(refused, tmp_path: Path) -> None:
    line = refused("--debug", "plan", "--configfile", str(tmp_path / "none.yaml"), traceback=True)
    assert line == f"config file {tmp_path}/none.yaml does not exist"


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.ENOSPC, "{path}: No space left on device; make room, or choose another disk"),
        (errno.EACCES, "{path}: Permission denied; choose another path, or have this one opened to you"),
        (errno.EROFS, "{path}: Read-only file system; choose another path, or have this one opened to you"),
        (errno.EISDIR, "{path}: Is a directory; check the path"),
    ],
)
def test_a_fault_of_the_system_that_the_user_can_mend(refused, tmp_path, monkeypatch, number, named) -> None:
    path = tmp_path / "config.yaml"

    def fails(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("scspec.config.read_config", fails)
    assert refused("plan", "--configfile", str(path)) == named.format(path=path)


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(errno.EIO, "Input/output error"), KeyError("x")])
def test_what_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(path: Path) -> None:
        raise error

    monkeypatch.setattr("scspec.config.read_config", fails)
    with pytest.raises(type(error)):
        main(["plan"])


# ------------------------------------------------------------------------------------------------------------- jobs


def test_a_job_that_is_none_is_a_traceback_and_one_line(refused) -> None:
    assert refused("run-cell", "{", "--output", "x", traceback=True).startswith("cell: not JSON: ")
    assert refused("run-cell", "{}", "--output", "x", traceback=True).startswith("cell: wrong or missing keys")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", "/config.json' is not a valid JSON file"),  # which the tokenizer reads first
        ("tokenizer.json", "its tokenizer cannot be read: "),
        ("model.safetensors", "its model.safetensors cannot be read: "),
    ],
)
def test_a_model_whose_file_is_torn(refused, tmp_path: Path, file: str, named: str) -> None:
    cell = tiny_cells(tmp_path, PROMPTS)["float_float"]
    torn = tmp_path / "model" / file
    torn.write_bytes(torn.read_bytes()[:100])
    line = refused("run-cell", cell.to_json(), "--output", str(tmp_path / "cell.parquet"), traceback=True)
    assert line.startswith(f"model '{tmp_path}/model': its ")
    assert named in line
    assert line.endswith(f"; check its files: scspec models verify {tmp_path}/model")


def test_a_cell_of_an_absent_gpu_and_of_a_folder_that_is_closed(refused, tmp_path, monkeypatch) -> None:
    cell = tiny_cells(tmp_path, PROMPTS)["float_float"]
    line = refused("run-cell", cell.to_json(), "--output", "/proc/none/cell.parquet", traceback=True)
    assert line.startswith("/proc/none")
    monkeypatch.setenv("PATH", str(tmp_path))
    on_gpu = replace(cell, device="cuda", backend="cuda", dtype="float16").to_json()
    line = refused("run-cell", on_gpu, "--output", str(tmp_path / "cell.parquet"), traceback=True)
    assert line.startswith("gpus=1: nvidia-smi lists 0 that are visible here")


# ----------------------------------------------------------------------------------------------------------- models


def of_hub(kind: type, message: str) -> Exception:
    answer = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind(message, response=answer) if issubclass(kind, hub.HfHubHTTPError) else kind(message)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (
            of_hub(hub.GatedRepoError, "403 Client Error"),
            "403 Client Error; ask for access on its page there, then log in",
        ),
        (of_hub(hub.RepositoryNotFoundError, "404 Client Error"), "404 Client Error; check the name"),
        (of_hub(hub.LocalEntryNotFoundError, "cannot find it on the hub"), "fetch it where there is a network"),
        (
            OSError("connection refused"),
            "connection refused; fetch it where there is a network: scspec models fetch a/b",
        ),
    ],
)
def test_a_model_that_the_hub_does_not_give(refused, monkeypatch, error: Exception, named: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    line = refused("models", "fetch", "a/b")
    assert line.startswith(
        "model 'a/b': not an alias (smollm2-135m, smollm2-distilled), not a folder, and not to be had"
    )
    assert named in line


def test_a_model_that_is_not_here_cannot_be_verified(refused, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path))
    todo = "not on this machine; fetch it: scspec models fetch smollm2-135m"
    assert refused("models", "verify", "smollm2-135m") == f"model 'smollm2-135m': {todo}"


def test_a_cache_and_a_manifest_that_cannot_be_written(refused, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path / "file" / "models"))
    assert refused("models", "fetch", "smollm2-135m") == f"{tmp_path}/file/models: Not a directory; check the path"
    monkeypatch.setattr("scspec.models.fetch_model", lambda name: pytest.fail("fetched"))
    line = refused("models", "fetch", "x", "--manifest", str(tmp_path / "file" / "x.json"))
    assert line == f"{tmp_path}/file: File exists; check the path"
