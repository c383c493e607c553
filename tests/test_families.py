"""Each family of models: its floating-point self when SC is off, and the contract of exactness when it is on."""

import copy

import pytest
import torch
from interpreter import DEVICE
from test_contract import GREEDY, SAMPLED, check_batch, check_identity, check_partition, random_partition
from test_fused import assert_near
from test_fused import check_partition as check_fused_partition
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2ForSequenceClassification

from scspec import fused_cpu
from scspec.hardware import module_macs
from scspec.models import load_model
from scspec.patching import patch_model
from scspec.sc.linear import SCLinear

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 32]
PROMPTS = (IDS, [27, 18, 28, 1], [60, 2, 8, 45, 9, 0, 4])
#: SmolLM is a tied Llama, Qwen2.5 of 3B and less a tied Qwen2; Qwen3 may have biases, also on the output projection.
MODELS = {
    "smollm": {"family": "llama", "tie_word_embeddings": True},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3"},
    "qwen3 tied, biased": {"family": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
}
LAYERS = 2
FLOAT = {"preset": "float"}
ARMS = {"sc": {}, "float": FLOAT, "sc lm head": {"sc_lm_head": True, "sc_stoc_len": 40, "sc_seed": 3}}
#: Of the largest logit: in each layer some eight sums one after another, of at most 72 terms each, if no two errors
#: cancel.
ROUNDING = LAYERS * 8 * 72 * 2**-24


def float_model(name: str, layers: int = LAYERS):
    """Return the float model, its norms and biases random: as they begin, one lost or exchanged goes unseen."""
    model = tiny_model(**MODELS[name], num_hidden_layers=layers)
    generator = torch.Generator().manual_seed(5)
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) + (-0.5 if path.endswith("bias") else 0.5)
    return model


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("family")
    float_model(request.param).save_pretrained(folder)
    return str(folder)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits


def transformers_own(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def check_rounding(found, wanted):
    assert (found - wanted).abs().max() <= ROUNDING * wanted.abs().max()


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_sc_off_is_the_float_model(folder, batch_invariant):
    model = load_model(folder, sc_overrides={**FLOAT, "batch_invariant": batch_invariant})
    check_rounding(logits(model), logits(transformers_own(folder)))


def test_layers_may_be_left_out(folder):
    whole = transformers_own(folder)
    del whole.model.layers[1]
    whole.config.num_hidden_layers, whole.config.use_cache = 1, False  # its cache counts layers by their old numbers
    check_rounding(logits(load_model(folder, sc_overrides=FLOAT, skip_layers=(1,))), logits(whole))


@pytest.mark.parametrize("arm", ["sc", "float"])
def test_logits_vary_with_context(folder, arm):
    """Else what follows could not see a cache that is wrong: the first token reaches the last row, far above noise."""
    model = load_model(folder, sc_overrides=ARMS[arm])
    found = logits(model)
    changed = logits(model, [50, *IDS[1:]])
    assert (found - changed)[0, -1].abs().max() > 0.1 * found.std()


@pytest.mark.parametrize("arm", ARMS)
def test_cached_equals_cache_free(folder, arm):
    model = load_model(folder, sc_overrides=ARMS[arm])
    check_partition(model, IDS, [1] * len(IDS))
    check_partition(model, IDS, random_partition(len(IDS), seed=1), capacity=200)


@pytest.mark.parametrize("arm", ["sc", "float"])
def test_identity_accepts_everything(folder, arm):
    pair = [load_model(folder, sc_overrides=ARMS[arm]) for _ in range(2)]
    for gamma, sampling in ((4, GREEDY), (3, SAMPLED)):
        check_identity(*pair, IDS, sampling, gamma, new_tokens=10)


def test_a_batch_is_its_prompts_alone(folder):
    target, draft = load_model(folder), load_model(folder, sc_overrides={"sc_stoc_len": 32})
    check_batch(target, draft, PROMPTS, SAMPLED, 2, [(2, 200)], new_tokens=8)


def test_macs_are_those_of_the_modules(folder):
    """Both products of attention as well: a query meets each of 10 keys, a probability each value."""
    model = load_model(folder)
    macs = module_macs(model.config, context_tokens=10)
    linears = {name: each for name, each in model.named_modules() if isinstance(each, SCLinear)}
    assert {name: macs.pop(name) for name in linears} == {
        name: each.in_features * each.out_features for name, each in linears.items()
    }
    query = model.model.layers[0].self_attn.q_proj.out_features
    assert macs == {f"model.layers.{index}.self_attn": 2 * 10 * query for index in range(LAYERS)}


# ---------------------------------------------------------------------------------------------- fused forwards


@pytest.mark.parametrize("name", MODELS)
def test_who_takes_the_compiled_forward(name):
    """It knows neither biases nor norms of heads; what it would leave out goes through the module tree."""
    plain = name in ("smollm", "mistral")
    assert fused_cpu.fits(patch_model(float_model(name))) == plain


@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("overrides", [{}, FLOAT], ids=["sc", "float"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_gpu_forward_knows_their_parts(name, overrides):
    """One layer and three tokens: the interpreter is slow."""
    ids = torch.tensor([IDS[:3]], device=DEVICE)
    model = float_model(name, layers=1)
    wanted = logits(patch_model(copy.deepcopy(model), overrides), IDS[:3])
    found = check_fused_partition(patch_model(model.to(DEVICE), overrides, backend="triton"), ([2, 1], 16), ids=ids)
    assert_near(found, wanted)


# ---------------------------------------------------------------------------------------------- what weights tell


def test_parameters_that_attention_would_leave_out_are_refused():
    model = tiny_model(family="qwen3")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM: parameter model\.layers\.1\.self_attn\.sinks is not mod"):
        patch_model(model)


def test_a_model_without_lm_head_is_refused():
    with pytest.raises(ValueError, match="SequenceClassification: has no LM head; modelled is Qwen2ForCausalLM"):
        patch_model(Qwen2ForSequenceClassification(tiny_config(family="qwen2", pad_token_id=0)))
