"""The draft that comes with the package: its codes, its size, and the exactness contract with its target."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_contract import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    check_batch,
    check_identity,
    check_partition,
    encode,
    plain,
    random_partition,
    speculate,
)

from scspec import aliases
from scspec.aliases import ALIASES
from scspec.hardware import cost_per_token
from scspec.int8 import CHUNK, dequantised, from_int8, quantised, to_int8
from scspec.models import check_vocabularies, fetch_model, load_model, load_tokenizer
from scspec.sc.encoding import SCALE_FLOOR
from scspec.sc.encoding import encode as sc_encode
from scspec.sc.streams import resolve_streams

NAME = "smollm2-distilled"
FOLDER = Path(aliases.__file__).parent / "drafts" / NAME


def sc_codes(weight: torch.Tensor) -> torch.Tensor:
    """Return the codes that an SC linear with 8 bits makes of a weight (M, D)."""
    spec = resolve_streams(sc_prec=8, stoc_len=128)
    return torch.cat([sc_encode(part, spec, "per_row").codes for part in weight.split(CHUNK, 1)], 1)


@pytest.fixture(scope="module")
def stored():
    return load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def draft():
    return load_model(NAME)


def test_an_sc_linear_makes_the_stored_codes_again(stored):
    matrices = [name for name, tensor in stored.items() if tensor.dtype == torch.int8]
    assert len(matrices) == 5 * 7 + 1
    state = from_int8(stored)
    for name in matrices:
        assert torch.equal(sc_codes(state[name]).to(torch.int8), stored[name]), name
        assert torch.equal(sc_codes(state[name].half().float()).to(torch.int8), stored[name]), name
    again = to_int8(state)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e-7, 1e4])
def test_int8_weights_of_any_size_survive_another_rounding(scale):
    """Chunks under the floor of SC's scales become zero, and are zero again."""
    weight = torch.randn(37, 200, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    weight[4, :128] = SCALE_FLOOR / 2
    codes, scales = quantised(weight)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (37, 200), (37, 2))
    found = dequantised(codes, scales)
    assert torch.equal(sc_codes(found).to(torch.int8), codes)
    assert all(torch.equal(one, other) for one, other in zip(quantised(found), (codes, scales), strict=True))
    peaks = torch.stack([part.abs().amax(1) for part in weight.split(CHUNK, 1)], 1)
    step = peaks.clamp_min(2 * SCALE_FLOOR).repeat_interleave(CHUNK, 1)[:, :200] / 127
    # Half a step of a scale that bfloat16 moved by 2**-9 of itself at most; all of what is under the floor.
    bound = torch.where(step * 127 > 2 * SCALE_FLOOR, 0.5 * (1 + 2**-8), 127.0)
    assert ((found - weight).abs() <= step * bound).all()


def test_it_is_small_and_has_the_targets_tokens(target, draft):
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    share = [cost_per_token(model.config)["linear"]["macs"] for model in (draft, target)]
    assert share[0] <= 0.04 * share[1]
    check_vocabularies("smollm2-135m", NAME)
    assert load_tokenizer(NAME).chat_template == load_tokenizer("smollm2-135m").chat_template
    assert fetch_model(NAME)["source"] == f"scspec/drafts/{NAME}"


def test_other_weights_than_the_pinned_are_refused(monkeypatch, tmp_path, draft):
    """`draft` was fetched before, so that the tokenizer is here."""
    fetched = aliases.alias_folder("smollm2-135m")
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path / "cache"))
    shutil.copytree(fetched, aliases.alias_folder("smollm2-135m"))
    monkeypatch.setattr(aliases, "_DRAFTS", tmp_path)
    shutil.copytree(FOLDER, tmp_path / NAME)
    weights = tmp_path / NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=rf"{NAME}/model.safetensors has SHA-256 .*, expected {ALIASES[NAME].sha256}"):
        fetch_model(NAME)
    assert not aliases.alias_folder(NAME).exists()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_draft_alone_keeps_the_contract(draft, tokenizer, sampling):
    twin = load_model(NAME)
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt)
        check_partition(draft, ids * 3, random_partition(3 * len(ids), seed=0))
        wanted = plain(draft, ids, sampling, 16)
        for gamma in (1, 3, 8):
            check_identity(draft, twin, ids, sampling, gamma, new_tokens=16, wanted=wanted)


def test_greedy_text_is_the_targets(target, draft, tokenizer):
    ids = encode(tokenizer, PROMPTS[0])
    wanted = plain(target, ids, GREEDY, 12)
    accepted = 0
    for gamma in (1, 4):
        text, blocks = speculate(target, draft, ids, GREEDY, gamma, 12, 64)
        assert text == wanted
        accepted += sum(block.accepted for block in blocks)
    assert accepted, "nothing was accepted: is it the trained draft that runs?"


@pytest.mark.full
@pytest.mark.parametrize("gamma", range(1, 9))
def test_the_pair_keeps_the_contract_full(target, draft, tokenizer, gamma):
    """gamma 1..8: greedy text the target's, and a prompt in a batch what it is alone, greedy and sampled."""
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    for ids in prompts:
        text, _ = speculate(target, draft, ids, GREEDY, gamma, 32, 64)
        assert text == plain(target, ids, GREEDY, 32)
    for sampling in (GREEDY, SAMPLED):
        check_batch(target, draft, prompts, sampling, gamma, [(2, 64), (3, 512)])
