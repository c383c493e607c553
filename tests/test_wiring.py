"""What is put into a patched model by hand, whose a cache is, and on which devices its layers lie."""

import copy

import pytest
import torch
from test_patching import IDS, logits, patched
from tiny import tiny_model
from torch import nn

from scspec.patching import _fused_forward, patch_model
from scspec.placement import layer_devices, on_device


class Halved(nn.Module):
    """What it stands in for, halved."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole

    def forward(self, *arguments, **named):
        return self.whole(*arguments, **named) / 2


def halve_forward(module):
    forward = module.forward
    module.forward = lambda *arguments, **named: forward(*arguments, **named) / 2


PATHS = ["post_attention_layernorm", "mlp", "mlp.act_fn", "mlp.down_proj", "self_attn.q_proj"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", ["module", "hook", "pre-hook", "forward"])
@pytest.mark.parametrize("device", ["cpu", ["cpu:0", "cpu:1"]], ids=["one device", "two"])
def test_what_is_put_in_by_hand_is_used(path, way, device):
    """The fused forward would pass it by. Taken out again, the bits are as before."""
    model = patched(device=device)
    before, path = logits(model), f"model.layers.1.{path}"
    module = model.get_submodule(path)
    assert _fused_forward(model)
    if way == "module":
        model.set_submodule(path, Halved(module))
    elif way == "hook":
        handle = module.register_forward_hook(lambda _, arguments, out: out / 2)
    elif way == "pre-hook":
        handle = module.register_forward_pre_hook(lambda _, arguments: (arguments[0] / 2,))
    else:
        halve_forward(module)
    assert _fused_forward(model) is None
    if (path, way) != ("model.layers.1.post_attention_layernorm", "pre-hook"):  # a norm divides by the size of its rows
        assert not torch.equal(logits(model), before)
    if way == "module":
        model.set_submodule(path, module)
    elif way == "forward":
        del module.forward
    else:
        handle.remove()
    assert _fused_forward(model)
    assert torch.equal(logits(model), before)


def test_a_forward_put_over_a_spread_layers_own_is_used():
    """The layer's own moves its rows to its device, and is a forward of the instance already."""
    model = patched(device=["cpu:0", "cpu:1"])
    before, layer = logits(model), model.model.layers[1]
    moving = layer.forward
    layer.forward = lambda *arguments, **named: moving(*arguments, **named) / 2
    assert _fused_forward(model) is None
    assert not torch.equal(logits(model), before)
    layer.forward = moving
    assert _fused_forward(model)
    assert torch.equal(logits(model), before)


def test_a_device_named_twice_moves_rows_all_the_same():
    model = patched(device=["cpu:0", "cpu:1", "cpu:0"])
    assert all(layer.forward.func is on_device for layer in model.model.layers)


def test_layers_taken_out_by_hand_are_left_out():
    model, copied = patched(), copy.deepcopy(patched())
    assert _fused_forward(copied)
    before = logits(model)
    assert torch.equal(logits(copied), before)
    halve_forward(copied.model.layers[1].mlp)
    assert _fused_forward(copied) is None
    del copied.model.layers[1].mlp.forward
    assert _fused_forward(copied)
    del copied.model.layers[1]
    assert _fused_forward(copied) is None
    assert torch.equal(logits(model), before)


def test_a_cache_of_another_model_is_refused():
    model = patched()
    for other in (patched(), patched(num_hidden_layers=2), patched("float")):
        cache = other.new_kv_cache(1, 16)
        for given in (cache, cache.slot(0), object()):
            with pytest.raises(ValueError, match="kv_cache: made by another model"):
                model(input_ids=IDS, kv_cache=given)


@pytest.mark.parametrize(
    ("layers", "devices", "shares"),
    [(3, 1, [3]), (32, 2, [16, 16]), (5, 2, [3, 2]), (80, 3, [27, 27, 26]), (4, 4, [1, 1, 1, 1])],
)
def test_layers_are_spread_in_order_and_evenly(layers, devices, shares):
    names = [torch.device("cuda", index) for index in range(devices)]
    found = layer_devices(layers, names)
    assert found == sorted(found, key=names.index)
    assert [found.count(name) for name in names] == shares


def test_more_devices_than_layers_are_refused():
    with pytest.raises(ValueError, match="4 devices for 3 layers"):
        patch_model(tiny_model(), device=["cpu"] * 4)


def test_what_a_module_is_given_comes_to_its_device():
    """hidden, and cos and sin in a tuple; what is no tensor stays."""
    device = torch.device("meta")
    inputs = {"pair": (torch.ones(1), torch.ones(2)), "other": "x"}
    (found, named) = on_device(lambda x, **named: (x, named), device, torch.ones(3), **inputs)
    assert [x.device for x in (found, *named["pair"])] == [device] * 3
    assert named["other"] == "x"
