"""SmolLM2-135M as the hardware model sees it, and equality but for rounding."""

from functools import partial
from types import SimpleNamespace

import pytest

from scspec.hardware import cost_per_token, total_cost
from scspec.sc.knobs import SC_CONFIG_DEFAULTS

#: Equal but for rounding: neither side of a comparison has more than ten operations, of relative error 2**-53 each.
close_to = partial(pytest.approx, rel=20 * 2**-53, abs=0)

# SmolLM2-135M by hand. A layer: q and o 576 * 576 = 331_776 each, k and v 576 * 192 = 110_592 each, together 884_736;
# gate, up and down 576 * 1536 = 884_736 each; so 3_538_944 in linears, and in attention 2 * 576 * 256 = 294_912.
LINEAR = 106_168_320  # 30 layers
ATTENTION = 8_847_360  # 30 layers, 256 positions
LM_HEAD = 28_311_552  # 576 * 49_152


def smollm2(layers: int = 30, preset: dict = SC_CONFIG_DEFAULTS, **knobs) -> SimpleNamespace:
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    return SimpleNamespace(**shapes, **heads, **{**preset, **knobs})


def mac_cycles(config, *, lm_head: bool) -> float:
    return total_cost(cost_per_token(config), "mac_cycles", lm_head=lm_head)
