"""Cells: which combinations run, what each one says, and that ids and JSON lines are stable."""

import gzip
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from experiments import PROMPTS, REPOSITORY, cells_of, control, experiment_of, pair_of
from hypothesis import given, settings
from hypothesis import strategies as st

from scspec.cells import RESEED_OFFSET, Invalid, expand, plan, qualities
from scspec.config import BACKENDS, DTYPES, load_experiment, read_config
from scspec.jobs import Cell, Side

ARMS = ["float_float", "sc_float", "float_sc", "identity", "reseed"]
FILE_SYSTEM_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){2}")


def test_the_default_grid_has_21_cells() -> None:
    experiment = load_experiment({**read_config(REPOSITORY / "config.yaml"), "prompt_file": PROMPTS})
    cells, invalid = expand(experiment)
    assert cells[0].pair == "smollm2-distilled"
    assert Counter((cell.pair, cell.arm) for cell in cells) == {
        ("smollm2-distilled", "sc_sc"): 2,
        ("smollm2-distilled", "float_float"): 1,
        ("smollm2-distilled", "sc_float"): 1,
        ("smollm2-distilled", "float_sc"): 1,
        ("smollm2-distilled", "identity"): 1,
        ("smollm2-distilled", "reseed"): 1,
        ("smollm2-shorter", "sc_sc"): 2,
        ("smollm2-shorter", "float_float"): 1,
        ("smollm2-shorter", "sc_float"): 1,
        ("smollm2-shorter", "float_sc"): 1,
        ("smollm2-shorter", "identity"): 1,
        ("smollm2-shorter", "reseed"): 1,
        ("smollm2-skip", "sc_sc"): 2,
        ("smollm2-skip", "float_float"): 1,
        ("smollm2-skip", "sc_float"): 1,
        ("smollm2-skip", "float_sc"): 1,
        ("smollm2-skip", "identity"): 1,
        ("smollm2-skip", "reseed"): 1,
    }
    assert invalid == []
    assert "smollm2-shorter/sc_sc/L128_d64_p8_g4_s0_n0" in {cell.id for cell in cells}


def test_one_line_of_json_and_one_path() -> None:
    (cell,) = cells_of(pairs=pair_of(stoc_len=96, sc={"sc_lm_head": True})).values()
    assert cell.to_json() == (
        '{"arm":"sc_sc","backend":"cpu","device":"cpu",'
        '"draft":{"model":"small","sc":{"sc_lm_head":true,"sc_prec":8,"sc_seed":0,"sc_stoc_len":96},'
        '"skip_layers":[]},"dtype":"float32","gamma":4,"id":"tiny/sc_sc/L128_d96_p8_g4_s0_n0",'
        f'"max_new_tokens":128,"method":"loop","pair":"tiny","prompt_file":{json.dumps(PROMPTS)},"prompt_limit":null,'
        f'"prompt_sha256":"{hashlib.sha256(Path(PROMPTS).read_bytes()).hexdigest()}",'
        '"sampling":{"do_sample":false,"temperature":1.0,"top_k":0,"top_p":1.0},"sampling_seed":0,'
        '"sc_prec":8,"sc_seed":0,"stoc_len":128,'
        '"target":{"model":"big","sc":{"sc_prec":8,"sc_seed":0,"sc_stoc_len":128},"skip_layers":[]}}'
    )
    assert cell.path("out") == Path("out/cells/tiny/sc_sc/L128_d96_p8_g4_s0_n0.parquet")


def test_cells_of_another_device_backend_or_dtype_lie_beside_each_other() -> None:
    ids = [
        name
        for device in BACKENDS
        for backend, dtype in product(BACKENDS[device], DTYPES[device])
        for name in cells_of(device=device, backend=backend, dtype=dtype)
    ]
    assert len(ids) == len(set(ids)) == 7
    assert ids[:2] == ["tiny/sc_sc/L128_d128_p8_g4_s0_n0", "tiny/sc_sc/L128_d128_p8_g4_s0_n0_cuda-float32"]
    assert all(FILE_SYSTEM_SAFE.fullmatch(name) for name in ids)
    pairs = {"tiny": {**pair_of()["tiny"], "dtype": "bfloat16"}}
    (name,) = cells_of(device="cuda", backend="triton", dtype="float16", pairs=pairs)
    assert name == "tiny/sc_sc/L128_d128_p8_g4_s0_n0_triton-bfloat16"  # the pair's own dtype


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "^cell: not JSON: Expecting"),
        ("[]", "cell: wrong or missing keys"),
        ("{}", "cell: wrong or missing keys .*'arm'"),
        ('{"target": null}', "cell: wrong or missing keys"),
    ],
)
def test_a_json_line_that_is_no_cell_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell.from_json(text)


def test_a_json_line_with_a_side_that_is_none_is_refused() -> None:
    (cell,) = cells_of().values()
    line = json.loads(cell.to_json())
    del line["draft"]["sc"]
    with pytest.raises(ValueError, match=r"^draft: wrong or missing keys \['sc'\]; needed: model, sc, skip_layers$"):
        Cell.from_json(json.dumps(line))


axis = st.lists(st.integers(1, 300), min_size=1, max_size=3, unique=True)
seeds = st.lists(st.integers(0, 2000), min_size=1, max_size=2, unique=True)
bits = st.lists(st.integers(2, 8), min_size=1, max_size=2, unique=True)
side_settings = {
    "model": st.sampled_from(["big", "small", "org/name", "../here"]),
    "skip_layers": st.lists(st.integers(0, 40), max_size=3, unique=True),
    "sc": st.fixed_dictionaries({}, optional={"sc_lm_head": st.booleans(), "sc_linear_chunk_d": st.integers(0, 512)}),
}
ratios = st.sampled_from([0.125, 0.3, 0.5, 0.75, 1.0, 1.5])
pairs = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True),
    st.fixed_dictionaries(
        {
            "target": st.fixed_dictionaries(side_settings),
            "draft": st.fixed_dictionaries(
                {
                    **side_settings,
                    "stoc_len": st.just("same")
                    | axis
                    | st.fixed_dictionaries({"ratio": st.lists(ratios, min_size=1, max_size=3, unique=True)}),
                    "sc_prec": st.none() | st.integers(2, 8),
                }
            ),
        }
    ),
    min_size=1,
    max_size=3,
)
configs = st.fixed_dictionaries(
    {
        "pairs": pairs,
        "prompt_file": st.just(PROMPTS),
        "stoc_len": axis,
        "sc_prec": bits,
        "gamma": axis,
        "sc_seed": seeds,
        "sampling_seed": seeds,
        "sampling": st.just({"do_sample": True}),
        "controls": st.fixed_dictionaries({"stoc_len": st.none() | axis, "gamma": st.none() | axis}),
    }
)


@settings(max_examples=150)
@given(configs)
def test_ids_are_unique_and_safe_and_json_round_trips(config: dict[str, Any]) -> None:
    cells, invalid = expand(load_experiment(config))
    assert len({cell.id for cell in cells}) == len(cells)
    resolved = {(cell.pair, cell.arm, cell.target, cell.draft, cell.gamma, cell.sampling_seed) for cell in cells}
    assert len(resolved) == len(cells)
    for cell in cells:
        assert FILE_SYSTEM_SAFE.fullmatch(cell.id)
        assert cell.id.startswith(f"{cell.pair}/{cell.arm}/")
        line = cell.to_json()
        assert "\n" not in line
        assert Cell.from_json(line) == cell
        assert Cell.from_json(line).to_json() == line
        for side in (cell.target, cell.draft):
            assert side.sc is None or 1 <= side.sc["sc_stoc_len"] <= 2 ** side.sc["sc_prec"]
    assert len(set(invalid)) == len(invalid)


@settings(max_examples=60)
@given(configs, st.sampled_from(["stoc_len", "sc_prec", "gamma", "sc_seed", "sampling_seed"]), st.integers(2, 8))
def test_a_value_more_on_an_axis_leaves_the_other_cells_as_they_are(
    config: dict[str, Any], name: str, value: int
) -> None:
    before = {cell.id: cell.to_json() for cell in expand(load_experiment(config))[0]}
    longer = {**config, name: [value, *(old for old in config[name] if old != value)]}
    after = {cell.id: cell.to_json() for cell in expand(load_experiment(longer))[0]}
    assert before.items() <= after.items()


def test_the_drafts_lengths() -> None:
    for stoc_len, lengths in (
        ("same", [128]),
        ({"ratio": [0.875, 0.5]}, [112, 64]),
        (32, [32]),
        ([96, 64], [96, 64]),
    ):
        cells = cells_of(pairs=pair_of(stoc_len=stoc_len)).values()
        assert [cell.draft.sc["sc_stoc_len"] for cell in cells] == lengths
        assert all(cell.target.sc == {"sc_prec": 8, "sc_stoc_len": 128, "sc_seed": 0} for cell in cells)


def test_the_drafts_precision_is_the_targets_unless_it_is_given() -> None:
    assert [cell.draft.sc["sc_prec"] for cell in cells_of(sc_prec=[7, 8]).values()] == [7, 8]
    fixed = cells_of(sc_prec=[7, 8], pairs=pair_of(sc_prec=7)).values()
    assert [(cell.target.sc["sc_prec"], cell.draft.sc["sc_prec"]) for cell in fixed] == [(7, 7), (8, 7)]


def test_overrides_reach_their_own_side_only() -> None:
    pair = {
        "target": {"model": "big", "sc": {"use_sc_attn": False}},
        "draft": {"model": "small", "sc": {"sc_lm_head": True}, "skip_layers": [5, 3]},
    }
    (cell,) = cells_of(pairs={"tiny": pair}, sc_seed=[7]).values()
    assert cell.target == Side("big", {"use_sc_attn": False, "sc_prec": 8, "sc_stoc_len": 128, "sc_seed": 7}, ())
    assert cell.draft == Side("small", {"sc_lm_head": True, "sc_prec": 8, "sc_stoc_len": 128, "sc_seed": 7}, (3, 5))


def test_a_ratio_is_the_decimal_number_that_was_written() -> None:
    (cell,) = cells_of(stoc_len=[100], pairs=pair_of(stoc_len={"ratio": 0.57})).values()
    assert cell.draft.sc["sc_stoc_len"] == 57  # 0.57 * 100 is 56.99999999999999 in binary


@pytest.mark.parametrize(
    ("changes", "draft_stoc_len", "reason"),
    [
        ({"stoc_len": [512]}, None, "target stoc_len 512 is above 2**sc_prec = 256"),
        ({"sc_prec": [6]}, None, "target stoc_len 128 is above 2**sc_prec = 64"),
        ({"pairs": pair_of(stoc_len=257)}, 257, "draft stoc_len 257 is above 2**sc_prec = 256"),
        ({"pairs": pair_of(sc_prec=6)}, 128, "draft stoc_len 128 is above 2**sc_prec = 64"),
        ({"pairs": pair_of(stoc_len={"ratio": 0.3})}, 38.4, "draft stoc_len 38.4 is not a whole number"),
        ({"pairs": pair_of(stoc_len={"ratio": 0.001})}, 0.128, "draft stoc_len 0.128 is not a whole number"),
    ],
)
def test_what_cannot_exist_is_listed_once_with_its_reason_and_not_run(
    changes: dict[str, Any], draft_stoc_len: float | None, reason: str
) -> None:
    experiment = load_experiment(experiment_of(gamma=[1, 2, 4], sc_seed=[0, 1], **changes))
    cells, invalid = expand(experiment)
    assert cells == []
    point = experiment.stoc_len[0], experiment.sc_prec[0]
    assert invalid == [Invalid("tiny", "sc_sc", *point, draft_stoc_len, reason)]
    assert reason in str(invalid[0])


def test_an_invalid_combination_leaves_the_valid_ones() -> None:
    cells, invalid = expand(
        load_experiment(experiment_of(stoc_len=[128, 4], pairs=pair_of(stoc_len={"ratio": [0.5, 0.125]})))
    )
    assert [cell.id for cell in cells] == [
        "tiny/sc_sc/L128_d64_p8_g4_s0_n0",
        "tiny/sc_sc/L128_d16_p8_g4_s0_n0",
        "tiny/sc_sc/L4_d2_p8_g4_s0_n0",
    ]
    assert [combination.draft_stoc_len for combination in invalid] == [0.5]


def test_float_float_has_one_cell_per_gamma() -> None:
    cells = control("float_float", stoc_len=[128, 64], sc_prec=[7, 8], sc_seed=[0, 1], gamma=[2, 4])
    assert [cell.id for cell in cells] == [
        "tiny/float_float/Lf_df_pf_g2_s0_nf",
        "tiny/float_float/Lf_df_pf_g4_s0_nf",
    ]
    assert {(cell.stoc_len, cell.sc_prec, cell.sc_seed) for cell in cells} == {(None, None, None)}
    assert {(cell.target, cell.draft) for cell in cells} == {(Side("big", None, ()), Side("small", None, (1,)))}


def test_sc_float_has_one_cell_per_target() -> None:
    cells = control("sc_float", stoc_len=[128, 64], pairs=pair_of(stoc_len={"ratio": [0.5, 0.25]}, skip_layers=[1]))
    assert [cell.id for cell in cells] == [
        "tiny/sc_float/L128_df_p8_g4_s0_n0",
        "tiny/sc_float/L64_df_p8_g4_s0_n0",
    ]
    assert cells[0].target.sc == {"sc_prec": 8, "sc_stoc_len": 128, "sc_seed": 0}
    assert cells[0].draft == Side("small", None, (1,))


def test_float_sc_has_one_cell_per_draft_even_if_two_targets_lead_to_it() -> None:
    cells = control("float_sc", stoc_len=[128, 64], pairs=pair_of(stoc_len={"ratio": [0.5, 1]}))
    assert [cell.id for cell in cells] == [f"tiny/float_sc/Lf_d{length}_p8_g4_s0_n0" for length in (64, 128, 32)]
    assert {(cell.stoc_len, cell.sc_prec, cell.sc_seed) for cell in cells} == {(None, 8, 0)}
    assert {cell.target for cell in cells} == {Side("big", None, ())}


@pytest.mark.parametrize(("arm", "draft_seed"), [("identity", 5), ("reseed", 5 + RESEED_OFFSET)])
def test_identity_and_reseed_draft_with_the_target(arm: str, draft_seed: int) -> None:
    target = {"model": "big", "sc": {"sc_lm_head": True}, "skip_layers": [9]}
    pair = {"target": target, "draft": {"model": "small", "stoc_len": 64, "skip_layers": [1], "sc_prec": 7}}
    (cell,) = control(arm, pairs={"tiny": pair}, sc_seed=[5])
    sc = {"sc_lm_head": True, "sc_prec": 8, "sc_stoc_len": 128}
    assert cell.target == Side("big", {**sc, "sc_seed": 5}, (9,))
    assert cell.draft == Side("big", {**sc, "sc_seed": draft_seed}, (9,))
    assert (cell.id, cell.sc_seed) == (f"tiny/{arm}/L128_d128_p8_g4_s0_n5", 5)


def test_controls_run_at_their_own_points_for_every_pair_and_can_be_switched_off() -> None:
    controls = {"arms": ARMS, "stoc_len": [32], "sc_prec": [7], "gamma": [3]}
    two = {**pair_of(), "other": pair_of()["tiny"]}
    cells = cells_of(pairs=two, controls=controls).values()
    found = [cell for cell in cells if cell.arm != "sc_sc"]
    assert Counter(cell.pair for cell in found) == {"tiny": 5, "other": 5}
    assert {cell.gamma for cell in found} == {3}
    assert {cell.stoc_len for cell in found} == {None, 32}
    off = cells_of(pairs=two, controls={**controls, "enabled": False}).values()
    assert {cell.arm for cell in off} == {"sc_sc"}


def test_disabled_pairs_have_no_cells() -> None:
    two = {**pair_of(), "other": {**pair_of()["tiny"], "enabled": False}}
    assert {cell.pair for cell in cells_of(pairs=two).values()} == {"tiny"}


def test_a_pair_can_have_its_own_dtype() -> None:
    other = {**pair_of()["tiny"], "dtype": "float32"}
    assert [cell.dtype for cell in cells_of(pairs={"other": other}, dtype="float16").values()] == ["float32"]


def test_editing_the_prompts_changes_the_cells(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 1, "prompt": "Hi"}')
    (before,) = cells_of(prompt_file=str(file)).values()
    edited = '{"id": 1, "prompt": "Hi", "max_new_tokens": 9}'
    file.write_text(edited)
    (after,) = cells_of(prompt_file=str(file)).values()
    assert after == replace(before, prompt_sha256=hashlib.sha256(edited.encode()).hexdigest()) != before


def test_the_hash_of_gzipped_prompts_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt.gz"
    file.write_bytes(gzip.compress(b"Hi"))
    (cell,) = cells_of(prompt_file=str(file)).values()
    assert cell.prompt_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jsonl", "No such file"), (".", "Is a directory"), ("a\0b", "embedded null byte"), ("x" * 999, "too long")],
)
def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^prompt_file: '.*' cannot be read \(.*{reason}.*\); allowed: "):
        cells_of(prompt_file=str(tmp_path / name))


def test_prompts_that_are_not_understood_are_refused_before_there_are_cells(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 1, "prompt": "Hi"}\n{"id": 2, "promt": "Hi"}\n')
    with pytest.raises(ValueError, match=rf"^{file}, line 2: unknown keys \['promt'\]; allowed: "):
        cells_of(prompt_file=str(file), prompt_limit=1)


def test_greedy_cells_do_not_depend_on_the_settings_of_sampling() -> None:
    greedy = cells_of(sampling={"do_sample": False})
    assert cells_of(sampling={"do_sample": False, "temperature": 0.5, "top_k": 5}) == greedy
    (sampled,) = cells_of(sampling={"do_sample": True, "temperature": 0.5}).values()
    assert sampled.sampling.temperature == 0.5


def test_what_changes_no_result_is_not_part_of_a_cell() -> None:
    assert cells_of(threads_per_cell=2, prompts_per_batch=4) == cells_of(threads_per_cell=1, prompts_per_batch=1)
    on_gpu = {"device": "cuda", "backend": "cuda"}
    assert cells_of(**on_gpu, gpus=2) == cells_of(**on_gpu)


def test_the_plan_names_every_cell_and_what_cannot_exist() -> None:
    experiment = load_experiment(experiment_of(stoc_len=[128, 512]))
    cells, invalid = expand(experiment)
    written = json.loads(json.dumps(plan(experiment, cells, invalid, qualities(experiment, cells))))
    (entry,) = written["cells"]
    assert entry.pop("quality") == qualities(experiment, cells)[cells[0].id].path().as_posix()
    assert entry.pop("log") == "results/logs/tiny/sc_sc/L128_d128_p8_g4_s0_n0.log"
    assert entry.pop("path") == "results/cells/tiny/sc_sc/L128_d128_p8_g4_s0_n0.parquet"
    assert Cell.from_json(json.dumps(entry)) == cells[0]
    assert written["invalid"][0]["reason"] == "target stoc_len 512 is above 2**sc_prec = 256"
    assert written["settings"]["stoc_len"] == [128, 512]
    assert written["demonstration"] is False
