"""Configuration: what is accepted, what is filled in, and what the refusals say."""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from scspec.config import BACKENDS, DTYPES, SCHEMA_PATH, Sampling, load_experiment, read_config

REPOSITORY = Path(__file__).resolve().parents[1]
MINIMAL = {
    "pairs": {"tiny": {"target": {"model": "big"}, "draft": {"model": "small"}}},
    "prompt_file": "prompts/smoke.jsonl",
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the minimal configuration with one key set; `path` is dotted."""
    config = deepcopy(MINIMAL)
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    return config


def schema_nodes(schema: dict[str, Any], path: str = "config") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, schema) of every node of the schema outside `anyOf`, which speaks for its branches."""
    yield path, schema
    for key, sub in schema.get("properties", {}).items():
        yield from schema_nodes(sub, f"{path}.{key}")
    for key in ("items", "propertyNames", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from schema_nodes(schema[key], f"{path}.{key}")


@pytest.mark.parametrize("name", ["config.yaml", "docs/examples/full-grid.yaml"])
def test_the_files_of_the_repository_are_valid_and_state_every_knob(name: str) -> None:
    config = read_config(REPOSITORY / name)
    load_experiment(config)
    schema = yaml.safe_load(SCHEMA_PATH.read_text())
    for place in ((), ("sampling",), ("controls",)):
        said, known = config, schema
        for key in place:
            said, known = said[key], known["properties"][key]
        assert set(said) == set(known["properties"]), place


def test_the_full_grid_is_the_one_that_was_asked_for() -> None:
    experiment = load_experiment(read_config(REPOSITORY / "docs/examples/full-grid.yaml"))
    assert experiment.stoc_len == (256, 128, 96, 64, 48, 32)
    assert (experiment.sc_prec, experiment.gamma, experiment.sc_seed) == ((8,), (1, 2, 4, 8), (0, 1, 2))
    assert experiment.prompt_file == "prompts/bench48.jsonl"
    assert experiment.controls.stoc_len == experiment.stoc_len  # null in the file: as the grid
    assert not experiment.demonstration


def test_every_object_of_the_schema_refuses_unknown_keys_and_every_node_says_what_is_allowed() -> None:
    schema = yaml.safe_load(SCHEMA_PATH.read_text())
    nodes = dict(schema_nodes(schema))
    assert len(nodes) > 50
    for path, node in nodes.items():
        assert node.get("description"), path
        if node.get("type") == "object":
            assert "additionalProperties" in node, path
        if node.get("additionalProperties") is not False and node.get("type") == "object":
            assert path == "config.pairs" or ".sc_modules" in path  # keys are the researcher's own names


def test_defaults_are_filled_in() -> None:
    experiment = load_experiment(MINIMAL)
    (pair,) = experiment.pairs
    assert (pair.draft_ratios, pair.draft_stoc_lens, pair.draft_sc_prec) == ((1.0,), (), None)
    assert (pair.target.sc, pair.target.skip_layers, pair.dtype) == ({}, (), "float32")
    assert experiment.sampling == Sampling(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
    assert experiment.controls.gamma == experiment.gamma == (4,)
    assert (experiment.device, experiment.backend, experiment.prompt_limit) == ("cpu", "cpu", None)
    assert set(MINIMAL) == {"pairs", "prompt_file"}  # and the argument was left as it was


@pytest.mark.parametrize(
    ("stoc_len", "ratios", "lengths"),
    [
        ("same", (1.0,), ()),
        ({"ratio": 0.5}, (0.5,), ()),
        ({"ratio": [0.75, "0.5"]}, (0.75, 0.5), ()),
        ({"ratio": 1}, (1.0,), ()),
        (96, (), (96,)),
        ("96", (), (96,)),
        ([96, 64], (), (96, 64)),
    ],
)
def test_the_ways_to_give_the_drafts_length(stoc_len: object, ratios: tuple, lengths: tuple) -> None:
    (pair,) = load_experiment(changed("pairs.tiny.draft.stoc_len", stoc_len)).pairs
    assert (pair.draft_ratios, pair.draft_stoc_lens) == (ratios, lengths)


def test_strings_from_the_command_line_become_what_they_spell() -> None:
    typed = load_experiment(
        {
            **MINIMAL,
            "gamma": ["1", "2"],  # snakemake --config gamma='[1,2]'
            "stoc_len": "[128, 64]",
            "sampling": {"do_sample": "true", "temperature": "0.5", "top_p": 1},
            "prompt_limit": "null",
            "max_new_tokens": "8",
            "demonstration": "false",
            "controls": {"enabled": "false", "gamma": "null"},
        }
    )
    meant = load_experiment(
        {
            **MINIMAL,
            "gamma": [1, 2],
            "stoc_len": [128, 64],
            "sampling": {"do_sample": True, "temperature": 0.5},
            "max_new_tokens": 8,
            "controls": {"enabled": False},
        }
    )
    assert typed == meant
    assert [type(value) for value in typed.gamma] == [int, int]
    assert type(typed.sampling.top_p) is float


def test_strings_stay_strings_where_strings_are_meant() -> None:
    experiment = load_experiment(changed("pairs.tiny.target.model", "123"))
    assert experiment.pairs[0].target.model == "123"


def test_whole_floats_become_integers() -> None:
    experiment = load_experiment({**MINIMAL, "gamma": [2.0]})
    assert [type(value) for value in experiment.gamma] == [int]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("gama", [1]), "config: unknown key 'gama' (did you mean 'gamma'?); allowed: pairs, "),
        (changed("sampling.topk", 1), "sampling: unknown key 'topk' (did you mean 'top_k'?)"),
        (changed("controls.arm", []), "controls: unknown key 'arm' (did you mean 'arms'?)"),
        (
            changed("pairs.tiny.draft.skip_layer", []),
            "pairs.tiny.draft: unknown key 'skip_layer' (did you mean",
        ),
        (
            changed("pairs.tiny.target.stoc_len", 8),
            "pairs.tiny.target: unknown key 'stoc_len'; allowed: model",
        ),
        (changed("pairs.tiny.target.sc", {"sc_prec": 7}), "pairs.tiny.target.sc: unknown key 'sc_prec'"),
        (changed("pairs.tiny.target.sc", {"sc_seed": 7}), "pairs.tiny.target.sc: unknown key 'sc_seed'"),
        (
            changed("pairs.tiny.draft.sc", {"sc_stoc_len": 7}),
            "pairs.tiny.draft.sc: unknown key 'sc_stoc_len'",
        ),
        (changed("pairs.a/b", MINIMAL["pairs"]["tiny"]), "pairs: 'a/b' is not allowed; allowed: letters"),
        (changed("pairs", {}), "pairs: {} is not allowed; allowed: a mapping of pair names"),
        ({"pair": {}}, "config: unknown key 'pair' (did you mean 'pairs'?)"),
        ({"pairs": MINIMAL["pairs"]}, "config: missing key 'prompt_file'; needed: pairs, prompt_file"),
        (changed("pairs.tiny.draft", {}), "pairs.tiny.draft: missing key 'model'; needed: model"),
        (
            changed("gamma", [2, 0]),
            "gamma[1]: 0 is not allowed; allowed: a whole number of tokens, at least 1",
        ),
        (changed("gamma", 4), "gamma: 4 is not allowed; allowed: a list of different numbers"),
        (changed("gamma", [2, 2]), "gamma: [2, 2] is not allowed; allowed: a list of different numbers"),
        (changed("gamma", ["two"]), "gamma[0]: 'two' is not allowed; allowed: a whole number"),
        (changed("gamma", [True]), "gamma[0]: True is not allowed"),
        (changed("stoc_len", []), "stoc_len: [] is not allowed"),
        (
            changed("sc_prec", [9]),
            "sc_prec[0]: 9 is not allowed; allowed: a whole number of bits from 2 to 8",
        ),
        (
            changed("sampling.temperature", 0),
            "sampling.temperature: 0.0 is not allowed; allowed: a number above 0",
        ),
        (changed("sampling.temperature", float("nan")), "sampling.temperature: nan is not allowed"),
        (changed("sampling.temperature", float("inf")), "sampling.temperature: inf is not allowed"),
        (changed("sampling.top_p", 1.5), "sampling.top_p: 1.5 is not allowed"),
        (
            changed("controls.arms", ["identiy"]),
            "controls.arms[0]: 'identiy' is not allowed; allowed: float_float",
        ),
        (changed("device", "gpu"), "device: 'gpu' is not allowed; allowed: cpu"),
        (
            changed("dtype", "float64"),
            "dtype: 'float64' is not allowed; allowed: float32, float16 or bfloat16",
        ),
        (
            changed("dtype", "float16"),
            "pairs.tiny: dtype 'float16' is not allowed with device: 'cpu'; allowed: float32",
        ),
        (changed("gpus", 0), "gpus: 0 is not allowed; allowed: a whole number of GPUs"),
        (changed("gpus", 2), "gpus: 2 is not allowed with device: 'cpu'; allowed: 1"),
        (
            changed("pairs.tiny.draft.sc", {"sc_mode": "unipolar"}),
            "pairs.tiny.draft.sc: sc_granularity='causal': with sc_mode='unipolar' allowed are 'per_row', 'per_tensor'",
        ),
        (
            changed("pairs.tiny.draft.stoc_len", {"ratio": 0}),
            "pairs.tiny.draft.stoc_len: {'ratio': 0} is not",
        ),
        (
            changed("pairs.tiny.draft.stoc_len", "some"),
            "pairs.tiny.draft.stoc_len: 'some' is not allowed; allowed",
        ),
        (changed("pairs.tiny.draft.skip_layers", [-1]), "pairs.tiny.draft.skip_layers[0]: -1 is not allowed"),
        (changed("pairs.tiny.enabled", False), "pairs: none of tiny is enabled; allowed: at least one"),
        (changed("sampling_seed", [0, 1]), "sampling_seed: [0, 1] repeats the same tokens"),
        (None, "config: None is not allowed; allowed: a mapping of settings"),
        (changed("prompt_file", {"a\nb": "c" * 500}), "prompt_file: {'a\\nb': 'ccc"),
    ],
)
def test_a_refusal_is_one_line_that_names_key_value_and_what_is_allowed(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_experiment(config)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 400


def test_a_file_that_is_missing_or_no_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^config file .*none.yaml does not exist$"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ValueError, match=r"^.*bad.yaml: not YAML: .*$"):
        read_config(tmp_path / "bad.yaml")


def test_devices_backends_and_dtypes_are_those_of_the_models() -> None:
    """The configuration keeps a list of its own because it imports no torch."""
    import torch

    from scspec.placement import GPU_DTYPES, model_backend
    from scspec.sc import matmul

    refused = "reference"  # it packs no weights of a model
    with pytest.raises(ValueError, match=refused):
        model_backend(refused, torch.device("cpu"))
    assert set(BACKENDS["cuda"]) == set(matmul.GPU_BACKENDS)
    assert set(BACKENDS["cpu"]) == set(matmul.BACKENDS) - set(matmul.GPU_BACKENDS) - {refused}
    assert {device: backends[0] for device, backends in BACKENDS.items()} == matmul.DEFAULT_BACKEND
    assert [getattr(torch, name) for name in DTYPES["cuda"]] == list(GPU_DTYPES)
    properties = yaml.safe_load(SCHEMA_PATH.read_text())["properties"]
    assert properties["device"]["enum"] == list(BACKENDS)
    assert set(properties["backend"]["enum"]) == {name for names in BACKENDS.values() for name in names}
    of_pair = properties["pairs"]["additionalProperties"]["properties"]["dtype"]["enum"]
    assert properties["dtype"]["enum"] == of_pair[:-1] == list(DTYPES["cuda"])


def test_the_schema_knows_the_knobs_of_the_models() -> None:
    from scspec.sc.knobs import PRESETS, SC_CONFIG_DEFAULTS

    pair = yaml.safe_load(SCHEMA_PATH.read_text())["properties"]["pairs"]["additionalProperties"]["properties"]
    for side in ("target", "draft"):
        knobs = pair[side]["properties"]["sc"]["properties"]
        assert knobs["preset"]["enum"] == list(PRESETS)
        assert set(knobs) - {"preset"} == set(SC_CONFIG_DEFAULTS) - {"sc_prec", "sc_stoc_len", "sc_seed"}
        for name, default in SC_CONFIG_DEFAULTS.items():
            assert jsonschema.Draft202012Validator(knobs.get(name, {})).is_valid(default), name


@pytest.mark.parametrize(
    ("side", "sc", "wrong"),
    [
        ("target", {"preset": "published"}, "batch_invariant=False is not allowed with method: replay; allowed: True"),
        ("draft", {"sc_granularity": "per_row"}, "sc_granularity='per_row' is .*; allowed: 'causal'"),
        ("target", {"sc_linear_granularity": "per_tensor"}, "sc_linear_granularity='per_tensor' is .*: 'per_row'"),
    ],
)
def test_replay_refuses_scopes_that_look_at_other_tokens(side: str, sc: dict[str, Any], wrong: str) -> None:
    pair = {"target": {"model": "a"}, "draft": {"model": "b"}}
    pair[side]["sc"] = sc
    config = {"pairs": {"p": pair}, "prompt_file": "x.jsonl"}
    load_experiment(config)
    with pytest.raises(ValueError, match=rf"^pairs\.p\.{side}\.sc: {wrong}"):
        load_experiment({**config, "method": "replay"})
