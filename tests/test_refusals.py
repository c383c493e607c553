"""Models that are not modelled are refused by their configuration, before any weights are loaded or fetched."""

import json
import re

import huggingface_hub
import pytest
from tiny import tiny_config

from scspec import models
from scspec.models import fetch_model, load_model, model_config

FULL = "modelled is attention to all earlier positions"
#: (family, what its config.json says, the error after the model's name)
REFUSED = {
    "sliding window": (
        "mistral",
        {"sliding_window": 4096},
        f"sliding_window=4096: sliding-window attention is not modelled; {FULL}",
    ),
    "sliding window of a qwen": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
        "sliding_window=128: sliding-window attention",
    ),
    "sliding layers": (
        "qwen3",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        f"layer_types has 'sliding_attention': not modelled; {FULL}",
    ),
    "alternating layers of a mistral": ("mistral", {"layer_types": ["full_attention"] * 3}, "model_type='ministral'"),
    "chunked attention": ("llama", {"attention_chunk_size": 64}, "attention_chunk_size=64: chunked attention"),
    "soft-capped scores": ("qwen2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: soft-capping"),
    "soft-capped logits": ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: soft-capping"),
    "experts": ("llama", {"num_local_experts": 8}, "num_local_experts=8: mixture of experts is not modelled"),
    "experts of a qwen": ("qwen3", {"num_experts": 60}, "num_experts=60: mixture of experts"),
    "routed experts": ("llama", {"n_routed_experts": 64}, "n_routed_experts=64: mixture of experts"),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        "rope_type='yarn': not modelled; modelled are default, linear, llama3",
    ),
    "yarn as it was written": ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    "partial rotary": (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5: not modelled; modelled is 1.0",
    ),
    "activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu': not modelled; modelled is 'silu'"),
    "another type": (
        "llama",
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        "model_type='mixtral' (MixtralForCausalLM): not modelled; modelled are llama (LlamaForCausalLM), mistral (",
    ),
    "attention sinks": (
        "llama",
        {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]},
        "model_type='gpt_oss' (GptOssForCausalLM): not modelled",
    ),
    "a type that transformers does not know": ("llama", {"model_type": "llama9"}, "model_type='llama9' (no class"),
    "no type": ("llama", {"model_type": None}, "model_type=None"),
    "a type that is no name": ("llama", {"model_type": ["llama"]}, "model_type=['llama'] (no class"),
    "code of its own": (
        "llama",
        {"model_type": "own", "architectures": ["OwnLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnLM"}},
        "model_type='own' (OwnLM) with code of its own (auto_map), which is never run: not modelled",
    ),
    "code of its own for a known type": (
        "llama",
        {"architectures": ["OwnLlama"], "auto_map": {"AutoModelForCausalLM": "own.OwnLlama"}},
        "model_type='llama' (OwnLlama) with code of its own",
    ),
    "sizes that do not fit": ("llama", {"num_attention_heads": 3}, "config.json: "),
}
#: What pretrained configurations say and nobody uses.
HARMLESS = {
    "qwen2": {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1, "use_mrope": False},
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "rope_scaling": None, "layer_types": None},
    "mistral": {"sliding_window": None, "attention_dropout": 0.0},
    "llama": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "own.LlamaForCausalLM"},
        "pretraining_tp": 1,
    },
}


def written(folder, family: str, stored: dict) -> str:
    """Write a family's tiny configuration with what a test stores in it; return the folder's name."""
    config = tiny_config(family)
    config.save_pretrained(folder)
    path = folder / "config.json"
    # Neither is in a file that transformers 4 wrote; where they are, they override what a test stores.
    computed = {"layer_types", "rope_parameters"}
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in computed}
    path.write_text(json.dumps(kept | stored))
    return str(folder)


def one_line(name: str, message: str) -> str:
    return rf"^{re.escape(f'model {name!r}: {message}')}.*\Z"


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_modelled_is_named(tmp_path, case):
    family, stored, message = REFUSED[case]
    name = written(tmp_path, family, stored)
    with pytest.raises(ValueError, match=one_line(name, message)):
        load_model(name)


@pytest.mark.parametrize("family", HARMLESS)
def test_fields_that_change_nothing_pass(tmp_path, family):
    assert model_config(written(tmp_path, family, HARMLESS[family])).model_type == family


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json in it"),
        ("{", "config.json is no JSON: "),
        ("[1]", "config.json holds no object, but list"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=one_line(str(tmp_path), message)):
        load_model(str(tmp_path))


def test_of_a_model_on_the_hub_only_its_configuration_is_fetched(tmp_path, monkeypatch):
    """Before it is refused; its weights may be hundreds of GB."""
    fetched = []

    def snapshot_download(name, *, allow_patterns):
        fetched.extend(allow_patterns)
        return written(tmp_path, "llama", {"model_type": "mixtral"})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for use in (fetch_model, load_model):
        with pytest.raises(ValueError, match="model 'large/mixtral': model_type='mixtral'"):
            use("large/mixtral")
    assert set(fetched) == {"config.json"}
