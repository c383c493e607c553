"""The compiled forward has the bits of the module tree, refuses what the tree alone covers, and checks its cache."""

import pytest
import torch
from tiny import tiny_model

from scspec import fused_cpu
from scspec.patching import patch_model

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 32], [27, 18, 28, 1, 8, 2, 8, 45, 9, 0, 4]])


def ragged_logits(model):
    """Return the logits of two slots filled one by one, then fed together in pieces; at last without a cache."""
    with torch.inference_mode():
        cache = model.new_kv_cache(2, 11)
        out = [model(input_ids=IDS[:1, :4], kv_cache=cache.slot(0)).logits]
        out += [model(input_ids=IDS[1:, :1], kv_cache=cache.slot(1)).logits]
        out += [model(input_ids=IDS[:, first:last], kv_cache=cache).logits for first, last in ((4, 5), (5, 10))]
        out += [model(input_ids=IDS, logits_to_keep=keep).logits for keep in (0, 3)]
    return torch.cat([logits.flatten() for logits in out])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"intermediate_size": 300, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 0.1},
        {"num_attention_heads": 5, "num_key_value_heads": 1},
    ],
)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sc_stoc_len": 256, "sc_seed": 3, "sc_lm_head": True},
        {"sc_prec": 5, "sc_linear_chunk_d": 16},
        {"sc_linear_chunk_d": 0},
    ],
)
def test_bits_of_the_module_tree(overrides, changed, monkeypatch):
    model = tiny_model(**changed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms: all ones in a fresh model, and then the two of a layer could be exchanged
            weight.data = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5
    model = patch_model(model, overrides)
    assert fused_cpu.fits(model)
    fused = ragged_logits(model)
    monkeypatch.setattr(fused_cpu, "fits", lambda model: False)
    assert torch.equal(ragged_logits(model), fused)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ("published", {}),
        ({"use_sc_linear": False}, {}),
        ({"use_sc_attn": False}, {}),
        ({"sc_linear_granularity": "per_tensor"}, {}),
        ({"batch_invariant": False}, {}),
        ({}, {"attention_bias": True}),
        ({}, {"mlp_bias": True}),
    ],
)
def test_what_the_tree_alone_covers(overrides, changed):
    model = patch_model(tiny_model(**changed), overrides)
    assert not fused_cpu.fits(model)
    assert torch.isfinite(ragged_logits(model)).all()


@pytest.mark.parametrize(
    ("made_with", "knob", "value", "message"),
    [
        ({"use_sc_attn": False}, "use_sc_attn", True, "made for another attention"),
        ({}, "sc_prec", 6, "encoded with largest code 127"),
    ],
)
def test_a_cache_of_another_kind_is_refused(made_with, knob, value, message):
    model = patch_model(tiny_model(), made_with, keep_float_weights=True)
    cache = model.new_kv_cache(2, 11)
    setattr(model.config, knob, value)
    with pytest.raises(ValueError, match=message), torch.inference_mode():
        model(input_ids=IDS, kv_cache=cache)
