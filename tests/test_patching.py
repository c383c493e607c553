"""One instance rewired: knobs, refusals, what takes effect when, and the four attentions against each other."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from scspec.decoding import generate_cached
from scspec.patching import knobs_of, patch_model
from scspec.sc.knobs import PRESETS, SC_CONFIG_DEFAULTS, resolve_knobs
from scspec.sc.linear import SCLinear

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 32]])


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def patched(overrides=None, seed=0, keep_float_weights=False, device=None, **changed):
    return patch_model(tiny_model(seed, **changed), overrides, device=device, keep_float_weights=keep_float_weights)


def check_pieces(model, sizes=(4, 1, 5, 1)):
    with torch.inference_mode():
        cache = model.new_kv_cache(1, 16)
        pieces = [model(input_ids=piece, kv_cache=cache).logits for piece in IDS.split(sizes, dim=1)]
    assert cache.lengths == (IDS.shape[1],)
    assert torch.equal(torch.cat(pieces, dim=1), logits(model))


def test_sc_off_is_the_float_model():
    """With SC off only rounding differs: float32 sums over at most 72 terms, three layers deep."""
    wanted = logits(tiny_model())
    for preset in ("float", {"preset": "float", "batch_invariant": False}):
        torch.testing.assert_close(logits(patched(preset)), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_sc_comes_near_the_float_model_as_streams_grow():
    wanted = logits(tiny_model())
    error = [
        (logits(patched({"sc_stoc_len": stoc_len, "sc_halve_bipolar": False})) - wanted).abs().mean().item()
        for stoc_len in (256, 32, 4)
    ]
    assert error[0] < error[1] < error[2]
    assert error[0] < 0.2 * wanted.abs().mean().item()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sc_stoc_len": 40, "sc_seed": 3, "sc_lm_head": True},
        {"sc_prec": 5, "sc_linear_chunk_d": 16},
        {"use_sc_attn": False},
        {"use_sc_linear": False},
        {"use_sc_linear": False, "use_sc_attn": False},
        {"sc_linear_chunk_d": 0},
    ],
)
def test_causal_models_do_not_depend_on_the_partition(overrides):
    check_pieces(patched(overrides))


@pytest.mark.parametrize("overrides", [{}, {"use_sc_attn": False}, "float"])
def test_slots_are_independent(overrides):
    """Slots filled one by one through views, then fed together at different positions, one of them put back."""
    model = patched(overrides)
    batch = torch.stack([IDS[0], IDS[0].flip(0), (IDS[0] * 7) % 61])
    wanted = logits(model, batch)
    with torch.inference_mode():
        cache = model.new_kv_cache(3, 16)
        for b, held in ((2, 6), (0, 2)):
            out = model(input_ids=batch[b : b + 1, :held], kv_cache=cache.slot(b), logits_to_keep=1).logits
            assert torch.equal(out[0, 0], wanted[b, held - 1])
        assert cache.lengths == (2, 0, 6)
        for step in range(5):  # slot 1 is idle: fed anything, then put back
            ids = torch.stack([batch[0, 2 + step], batch[0, step], batch[2, 6 + step]])[:, None]
            out = model(input_ids=ids, kv_cache=cache).logits
            assert torch.equal(out[0, 0], wanted[0, 2 + step])
            assert torch.equal(out[2, 0], wanted[2, 6 + step])
            cache.rollback(1, 0)
        assert torch.equal(model(input_ids=batch[1:2], kv_cache=cache.slot(1)).logits, wanted[1:2])
        assert cache.lengths == (7, 11, 11)


@pytest.mark.parametrize("overrides", [{"sc_granularity": "per_row"}, {"preset": "float", "batch_invariant": False}])
def test_generic_attentions_read_their_own_slot(overrides):
    """The same rows in both calls; plain float32 arithmetic may round otherwise, sums of at most 72 terms."""
    model = patched(overrides)
    with torch.inference_mode():
        cache, alone = model.new_kv_cache(2, 16), model.new_kv_cache(1, 16)
        model(input_ids=IDS[:, :6], kv_cache=cache.slot(1))
        model(input_ids=IDS[:, :6], kv_cache=alone)
        together = model(input_ids=torch.cat([IDS[:, :2], IDS[:, 6:8]]), kv_cache=cache).logits[1:]
        torch.testing.assert_close(together, model(input_ids=IDS[:, 6:8], kv_cache=alone).logits, rtol=1e-4, atol=1e-4)


def test_a_batch_of_another_size_than_the_caches_is_refused():
    model = patched()
    with pytest.raises(ValueError, match="input_ids has 1 sequences; the KV cache was made for 2"):
        model(input_ids=IDS, kv_cache=model.new_kv_cache(2, 16))


def test_published_scopes_do_depend_on_the_partition():
    """The reason for scope `causal`: a published scale looks at later tokens."""
    with pytest.raises(AssertionError):
        check_pieces(patched({"sc_granularity": "per_row"}))


@pytest.mark.parametrize(
    "overrides",
    [
        "published",
        {"sc_granularity": "per_head"},
        {"sc_granularity": "per_tensor"},
        {"sc_mode": "unipolar", "sc_granularity": "per_row"},
        {"sc_linear_granularity": "per_tensor"},
    ],
)
def test_published_scopes_run_and_follow_the_float_model(overrides):
    """Unipolar noise on signed data is large: correlation, not distance, tells it from a wrong product."""
    both = torch.stack([logits(tiny_model()).flatten(), logits(patched(overrides)).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.5


def test_batch_rows_equal_rows_alone():
    model = patched()
    batch = torch.stack([IDS[0], IDS[0].flip(0), (IDS[0] * 7) % 61])
    assert torch.equal(logits(model, batch), torch.cat([logits(model, ids[None]) for ids in batch]))


def test_a_later_token_changes_no_earlier_logit():
    model = patched()
    changed = IDS.clone()
    changed[0, -1] = 60
    assert torch.equal(logits(model, changed)[:, :-1], logits(model)[:, :-1])
    assert not torch.equal(logits(model, changed)[:, -1], logits(model)[:, -1])


def test_two_instances_share_nothing():
    first, second = patched(), patched({"sc_stoc_len": 8})
    before = logits(first)
    second.config.sc_stoc_len = 3
    logits(second)
    untouched = logits(tiny_model())
    assert torch.equal(logits(first), before)
    assert torch.equal(untouched, logits(tiny_model()))
    assert {type(m) for m in tiny_model().modules()}.isdisjoint({SCLinear})


def test_rollback_moves_an_integer():
    model = patched()
    with torch.inference_mode():
        cache = model.new_kv_cache(1, 16)
        model(input_ids=IDS[:, :9], kv_cache=cache)
        cache.rollback(0, 4)
        rest = model(input_ids=IDS[:, 4:], kv_cache=cache).logits
    assert torch.equal(rest, logits(model)[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids: torch.int64 \(11,\)"),
        ({"input_ids": IDS[:, :0]}, r"input_ids: torch.int64 \(1, 0\)"),
        ({"input_ids": IDS.float()}, r"input_ids: torch.float32 \(1, 11\)"),
        ({"input_ids": IDS > 9}, r"input_ids: torch.bool"),
        ({"input_ids": IDS + 26}, r"input_ids: 29 to 61; the vocabulary has 0..60"),
        ({"input_ids": IDS - 4}, r"input_ids: -1 to 31"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep=-1: must be 0"),
        ({"input_ids": IDS, "logits_to_keep": 12}, "logits_to_keep=12: must be 0 .* to 11"),
    ],
)
def test_wrong_tokens_are_named_before_anything_is_written(arguments, message):
    model = patched()
    cache = model.new_kv_cache(1, 16)
    with pytest.raises(ValueError, match=message):
        model(kv_cache=cache, **arguments)
    assert cache.lengths == (0,)


def test_positions_that_the_model_does_not_have_are_refused():
    """When the cache is made, so that no text is lost on the way."""
    model = patched(max_position_embeddings=11)
    logits(model)
    model.new_kv_cache(1, 11)
    message = r"KV cache: capacity 12; the model has 11 positions \(max_position_embeddings\)"
    with pytest.raises(ValueError, match=message):
        model.new_kv_cache(1, 12)
    with pytest.raises(ValueError, match=message):
        logits(model, IDS[:, [0] * 12])
    with pytest.raises(ValueError, match=r"capacity 15; the model has 11"):
        generate_cached(model, model, IDS[:, :4], max_new_tokens=8, gamma=2, eos_token_id=[])


def test_a_full_cache_is_refused_before_anything_is_written():
    model = patched()
    cache = model.new_kv_cache(1, 8)
    with torch.inference_mode():
        model(input_ids=IDS[:, :6], kv_cache=cache)
        with pytest.raises(ValueError, match="6 \\+ 3 tokens; its capacity is 8"):
            model(input_ids=IDS[:, 6:9], kv_cache=cache)
    assert cache.lengths == (6,)


@pytest.mark.parametrize("knob", ["sc_stoc_len", "sc_seed"])
def test_streams_change_at_the_next_forward(knob):
    model = patched({"sc_stoc_len": 64})
    before = logits(model)
    setattr(model.config, knob, 17)
    after = logits(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(patched({"sc_stoc_len": 64, knob: 17})))


@pytest.mark.parametrize(
    ("knob", "value"),
    [("sc_prec", 6), ("sc_linear_chunk_d", 8), ("use_sc_linear", False), ("sc_lm_head", True), ("sc_mode", "unipolar")],
)
def test_knobs_that_need_the_weights(knob, value):
    kept = patched({"sc_granularity": "per_row"}, keep_float_weights=True)
    logits(kept)
    setattr(kept.config, knob, value)
    assert torch.equal(logits(kept), logits(patched({"sc_granularity": "per_row", knob: value})))
    dropped = patched({"sc_granularity": "per_row"})
    setattr(dropped.config, knob, value)
    with pytest.raises(ValueError, match=f"(?s){knob}.*dropped"):
        logits(dropped)


def test_float_copies_are_dropped():
    model = patched()
    linears = [module for module in model.modules() if isinstance(module, SCLinear)]
    assert len(linears) == 3 * 7 + 1
    assert all(linear.weight is None for linear in linears)


def test_attention_may_not_change_under_a_cache():
    model = patched()
    cache = model.new_kv_cache(1, 16)
    model.config.sc_granularity = "per_row"
    with pytest.raises(ValueError, match="sc_granularity"), torch.inference_mode():
        model(input_ids=IDS, kv_cache=cache)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sc_stoclen": 3}, "unknown SC knob 'sc_stoclen'"),
        ("publish", "preset='publish'"),
        ({"sc_stoc_len": 257}, "stoc_len=257"),
        ({"sc_prec": 9}, "sc_prec=9"),
        ({"sc_granularity": "per_col"}, "sc_granularity='per_col'"),
        ({"sc_mode": "unipolar"}, "sc_granularity='causal'"),
        ({"sc_linear_chunk_d": -1}, "sc_linear_chunk_d=-1"),
        ({"use_sc_attn": 1}, "use_sc_attn=1"),
    ],
)
def test_wrong_knobs_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        patched(overrides)


def test_wrong_knobs_set_later_are_named():
    model = patched()
    model.config.sc_stoc_len = 0
    with pytest.raises(ValueError, match="stoc_len=0"):
        logits(model)
    model.config.sc_stoc_len = 64
    model.config.batch_invariant = False
    with pytest.raises(ValueError, match="batch_invariant"):
        logits(model)


def test_a_given_length_is_kept_with_halving_and_without():
    for halving in (True, False):
        knobs = resolve_knobs({"sc_stoc_len": 200, "sc_halve_bipolar": halving})
        assert knobs["sc_stoc_len"] == 200
        model = patched({"sc_stoc_len": 200, "sc_halve_bipolar": halving})
        assert knobs_of(model)["sc_stoc_len"] == 200
        assert not torch.equal(logits(model), logits(patched({"sc_stoc_len": 128, "sc_halve_bipolar": halving})))


def test_presets_hold_every_knob():
    assert all(set(preset) == set(SC_CONFIG_DEFAULTS) for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ],
)
def test_features_we_do_not_model_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        patched(**changed)


def test_other_models_leaves_and_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16: on backend 'cpu'"):
        patch_model(tiny_model().to(torch.bfloat16))
    with pytest.raises(ValueError, match="already patched"):
        patch_model(patched())
    strange = tiny_model()
    strange.model.layers[1].mlp.extra = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"mlp\.extra"):
        patch_model(strange)


@pytest.mark.parametrize("argument", ["attention_mask", "past_key_values", "inputs_embeds"])
def test_arguments_we_would_ignore_are_refused(argument):
    with pytest.raises(ValueError, match=argument):
        patched()(input_ids=IDS, **{argument: torch.ones(1)})


def test_biases_are_added():
    model = tiny_model(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.5)
    wanted = logits(model)
    torch.testing.assert_close(logits(patch_model(copy.deepcopy(model), "float")), wanted, rtol=1e-3, atol=1e-3)


def test_nan_reaches_the_logits():
    model = tiny_model()
    model.model.embed_tokens.weight.data[int(IDS[0, 3])] = float("nan")
    out = logits(patch_model(model))
    assert torch.isfinite(out[:, :3]).all()
    assert torch.isnan(out[:, 3:]).all()
