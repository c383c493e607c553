"""What cells share: models, an audit, the quality of a target; and noise and modules with streams of their own."""

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from experiments import cells_of, experiment_of, pair_of, quality_of

from scspec.cells import expand, manifest_names
from scspec.config import load_experiment
from scspec.jobs import Cell, Quality, Side


def test_manifests_have_safe_names_of_their_own() -> None:
    (cell,) = cells_of(pairs={"tiny": {"target": {"model": "org/big"}, "draft": {"model": "small"}}}).values()
    assert manifest_names([cell]) == {"org--big": "org/big", "small": "small"}
    assert cell.manifests() == [Path("results/models/org--big.json"), Path("results/models/small.json")]
    clash = replace(cell, draft=Side("org--big", None, ()))
    with pytest.raises(ValueError, match=r"'org/big' and 'org--big' would share the manifest org--big.json"):
        manifest_names([clash])


def test_a_replayed_grid_has_one_loop_more_as_an_audit() -> None:
    """It is one of the grid's cells, the same one each time."""
    loops = cells_of(stoc_len=[128, 64], gamma=[2, 4])
    replays = cells_of(stoc_len=[128, 64], gamma=[2, 4], method="replay")
    (audit,) = [cell for cell in replays.values() if cell.method == "loop"]
    assert len(replays) == len(loops) + 1
    assert audit.arm == "audit"
    derived = replays[audit.id.replace("/audit/", "/sc_sc/") + "_replay"]
    assert replace(derived, id=audit.id, arm="audit", method="loop") == audit
    assert {cell_id.removesuffix("_replay") for cell_id in replays} - {audit.id} == set(loops)
    assert cells_of(stoc_len=[128, 64], gamma=[2, 4], method="replay") == replays


def test_each_target_in_sc_has_one_quality_and_all_have_one_text() -> None:
    """Whatever gamma, the draft and the pair's name are; a float target is what others are measured against."""
    found, experiment = quality_of(stoc_len=[128, 64], gamma=[2, 4], sc_seed=[0, 1])
    cells, _ = expand(experiment)
    assert {cell.id for cell in cells if cell.target.sc is None}.isdisjoint(found)
    assert {cell.id for cell in cells if cell.target.sc is not None} == set(found)
    targets = {json.dumps(asdict(cell.target)) for cell in cells if cell.target.sc is not None}
    assert len({quality.id for quality in found.values()}) == len(targets) == 4  # two lengths, two seeds
    (text,) = {quality.trajectory for quality in found.values()}
    assert text.target == Side("big", None, ())
    assert all(Quality.from_json(quality.to_json()) == quality for quality in found.values())


def test_a_text_file_is_part_of_a_quality_and_none_is_measured_if_none_is_wanted(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    without, _ = quality_of()
    found, _ = quality_of(quality={"text_file": str(text)})
    assert {its.text_sha256 for its in found.values()} == {hashlib.sha256(b"Some text.").hexdigest()}
    assert not {its.id for its in found.values()} & {its.id for its in without.values()}
    assert quality_of(quality={"enabled": False})[0] == {}
    with pytest.raises(FileNotFoundError, match=r"^quality\.text_file: 'absent\.txt' cannot be read"):
        quality_of(quality={"text_file": "absent.txt"})


def test_a_length_that_some_modules_cannot_have_is_an_impossible_combination() -> None:
    """Those of 6 bits have at most 64 cycles; here it is the draft that goes with them."""
    draft = {"model": "small", "sc": {"sc_modules": {"*.mlp.*": {"sc_prec": 6}}}}
    config = experiment_of(pairs={"tiny": {"target": {"model": "big"}, "draft": draft}}, stoc_len=[32, 128])
    cells, (invalid,) = expand(load_experiment(config))
    assert [cell.stoc_len for cell in cells] == [32]
    assert (invalid.stoc_len, invalid.draft_stoc_len) == (128, 128)
    assert invalid.reason == "draft sc_modules['*.mlp.*']: stoc_len=128: must be from 1 to 64 (2**sc_prec, sc_prec=6)"


def test_a_drafts_noise_is_the_targets_or_its_own() -> None:
    """In the grid and with a float target; identity and reseed are what they are anyway."""

    def seeds(**draft: Any) -> dict[str, int]:
        cells = cells_of(pairs=pair_of(**draft), sc_seed=[3], controls={"arms": ["float_sc", "identity", "reseed"]})
        return {cell.arm: cell.draft.sc["sc_seed"] for cell in cells.values()}

    assert seeds() == seeds(noise="shared") == {"sc_sc": 3, "float_sc": 3, "identity": 3, "reseed": 1003}
    assert seeds(noise="independent") == {"sc_sc": 1003, "float_sc": 1003, "identity": 3, "reseed": 1003}


def test_the_grid_may_give_some_modules_streams_of_their_own() -> None:
    """In every side in SC, on top of its own; cells without are as they were, and float cells do not depend on it."""
    attention = {"*.self_attn*": {"sc_stoc_len": 128}}
    axes = {"stoc_len": [64], "controls": {"arms": ["float_float", "sc_float"]}}
    pairs = pair_of(sc={"sc_modules": {"lm_head": {"sc_prec": 7}}})
    plain = cells_of(**axes, pairs=pairs)
    mixed = cells_of(**axes, pairs=pairs, sc_modules=[{}, attention])
    assert {cell_id: mixed[cell_id] for cell_id in plain} == plain
    added = {cell.arm: cell for cell_id, cell in mixed.items() if cell_id not in plain}
    assert set(added) == {"sc_sc", "sc_float"}
    assert added["sc_sc"].target.sc["sc_modules"] == attention
    assert added["sc_sc"].draft.sc["sc_modules"] == {"lm_head": {"sc_prec": 7}, **attention}
    assert re.fullmatch(r"tiny/sc_sc/L64_d64_p8_g4_s0_n0_m[0-9a-f]{6}", added["sc_sc"].id)
    assert Cell.from_json(added["sc_sc"].to_json()) == added["sc_sc"]
    assert len({cell.predictions().trajectory.id for cell in mixed.values()}) == 3
