"""Which models are here, and hashes of their files against pins, manifests and the hub's own names for them."""

import hashlib
import json
from pathlib import Path

import pytest
from tiny import tiny_config

from scspec import aliases
from scspec.cli import main
from scspec.inventory import models_here, verifiable, verify
from scspec.jobs import manifest_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "tiny/model"


class FakeModel:
    """An alias whose conversion writes two small files."""

    source, sha256, note = "nowhere", "a" * 64, "a fake"

    def convert(self, scratch: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)  # without a folder of results
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(aliases, "ALIASES", {"fake": FakeModel()})
    monkeypatch.setattr("scspec.inventory.ALIASES", aliases.ALIASES)
    return "fake"


@pytest.fixture
def snapshot(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository in the hub's cache, laid out as the hub's client does."""
    repository = tmp_path / "hub" / "models--tiny--model"
    folder = repository / "snapshots" / COMMIT
    for each in (folder, repository / "blobs", repository / "refs"):
        each.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    small, large = b"{}", b"weights"
    names = {
        "config.json": (small, hashlib.sha1(b"blob 2\0" + small).hexdigest()),
        "model.safetensors": (large, hashlib.sha256(large).hexdigest()),
    }
    for file, (content, blob) in names.items():
        (repository / "blobs" / blob).write_bytes(content)
        (folder / file).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setattr("scspec.inventory.folder_here", lambda name: folder if name == REPOSITORY else None)
    return folder


def faults(name: str, manifests: Path = Path("none")) -> dict[str, str]:
    return {verdict.file.name: verdict.fault for verdict in verify(name, manifests)}


def test_an_alias_is_listed_before_and_after_it_is_fetched(alias: str) -> None:
    (before,) = models_here()
    assert (before.name, before.folder, before.size_bytes) == (alias, None, 0)
    assert verifiable(Path("none")) == []
    folder = aliases.fetch_alias(alias)
    (after,) = models_here()
    assert after.folder == folder
    assert after.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert verifiable(Path("none")) == [alias]


def test_an_alias_is_as_its_conversion_left_it(alias: str) -> None:
    folder = aliases.fetch_alias(alias)
    assert faults(alias) == {"manifest.json": "", "config.json": "", "model.safetensors": ""}
    (folder / "model.safetensors").write_text("Weights")
    (folder / "config.json").unlink()
    found = faults(alias)
    assert found["config.json"] == "is missing"
    expected = hashlib.sha256(b"weights").hexdigest()
    assert found["model.safetensors"].endswith(f", expected {expected}")


def test_an_alias_of_another_pin_or_without_hashes_is_a_fault(alias: str) -> None:
    folder = aliases.fetch_alias(alias)
    (folder / aliases.CONVERTED_HASHES).unlink()
    (folder / "manifest.json").write_text(json.dumps({"sha256": "b" * 64}))
    found = faults(alias)
    assert found["manifest.json"] == f"was made from a file of SHA-256 {'b' * 64}, the pin is {'a' * 64}"
    assert "delete" in found[aliases.CONVERTED_HASHES]


def test_files_of_the_hubs_cache_have_the_hash_that_they_are_named_by(snapshot: Path) -> None:
    assert faults(REPOSITORY) == {"config.json": "", "model.safetensors": ""}
    assert [model.name for model in models_here()] == ["fake", REPOSITORY]
    assert verifiable(Path("none")) == [REPOSITORY]
    for file in snapshot.iterdir():
        file.resolve().write_bytes(b"other")
    assert all("expected" in fault for fault in faults(REPOSITORY).values())
    (snapshot / "config.json").resolve().unlink()
    assert faults(REPOSITORY)["config.json"] == "is missing"


def test_a_manifest_goes_before_the_cache(snapshot: Path, tmp_path: Path) -> None:
    manifest = tmp_path / f"{manifest_name(REPOSITORY)}.json"
    manifest.write_text(json.dumps({"name": REPOSITORY, "sha256": {"config.json": "c" * 64}}))
    (verdict,) = verify(REPOSITORY, tmp_path)
    assert verdict.against == str(manifest)
    assert verdict.fault.endswith(f"expected {'c' * 64}")


def test_the_command_line_lists_and_verifies(alias: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["models", "verify"]) == 0
    assert capsys.readouterr().out == "no model is on this machine; fetch one: scspec models fetch NAME\n"
    folder = aliases.fetch_alias(alias)
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out == f"fake: 0.00 GB in {folder} (a fake)\n"
    assert main(["models", "verify"]) == 0
    assert capsys.readouterr().out.count("ok    ") == 3
    (folder / "config.json").write_text("other")
    assert main(["models", "verify", alias]) == 1
    assert f"WRONG {folder}/config.json: has SHA-256" in capsys.readouterr().out


def test_a_local_folder_is_verified_by_the_manifest_that_was_fetched(
    alias: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder, manifests = tmp_path / "local", tmp_path / "manifests"
    folder.mkdir()
    tiny_config().save_pretrained(folder)
    (folder / "model.safetensors").write_text("weights")
    manifest = manifests / f"{manifest_name(str(folder))}.json"
    options = ["--manifests", str(manifests)]
    assert main(["models", "verify", str(folder), *options]) == 1
    assert (
        f"write it while they are good: scspec models fetch {folder} --manifest {manifest}" in capsys.readouterr().out
    )
    assert main(["models", "fetch", str(folder), "--manifest", str(manifest)]) == 0
    assert main(["models", "verify", *options]) == 0
    assert f"ok    {folder}/model.safetensors: as {manifest} has it" in capsys.readouterr().out
    folder.rename(tmp_path / "gone")
    assert main(["models", "verify", *options]) == 0


@pytest.mark.parametrize(("text", "named"), [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "no manifest")])
def test_a_manifest_that_is_none_is_named(snapshot: Path, tmp_path: Path, text: str, named: str) -> None:
    manifest = tmp_path / f"{manifest_name(REPOSITORY)}.json"
    manifest.write_text(text)
    with pytest.raises(ValueError, match=rf"^{manifest}: .*{named}"):
        list(verify(REPOSITORY, tmp_path))
