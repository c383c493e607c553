"""`sc_modules`: streams of their own for some modules, in the module tree, the compiled forward and the fused one."""

import pytest
import torch
from interpreter import DEVICE
from tiny import tiny_model

from scspec import fused, fused_cpu, sc_matmul
from scspec.decoding import generate_autoregressive, generate_cached
from scspec.invariant import cpu as invariant
from scspec.patching import knobs_of, patch_model
from scspec.sc.attention import sc_attention
from scspec.sc.knobs import PRESETS, SC_CONFIG_DEFAULTS, resolve_knobs
from scspec.sc.linear import SCLinear
from scspec.sc.streams import resolve_streams

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 32]])
ATTENTION, MLP = {"*.self_attn*": {"sc_stoc_len": 48}}, {"*.mlp.*": {"sc_stoc_len": 24, "sc_prec": 6}}
#: By layer, by kind of module, the products of an attention apart from its projections.
MIXED = {
    "model.layers.1.*": {"sc_stoc_len": 40},
    "model.layers.[02].self_attn": {"sc_stoc_len": 200},
    "model.layers.[02].*.[qkv]_proj": {"sc_stoc_len": 21, "sc_prec": 5},
    "model.layers.[02].*.o_proj": {"sc_stoc_len": 90},
    "model.layers.[02].mlp.*": {"sc_prec": 6},
    "lm_head": {"sc_stoc_len": 256},
}
#: The same for one layer: Triton's interpreter is slow.
MIXED_LAYER = {pattern: own for pattern, own in MIXED.items() if pattern != "model.layers.1.*"}
LM_HEAD = {"sc_lm_head": True}


def patched(sc_modules=None, overrides=None, seed=0, backend=None, **changed):
    kept = changed.pop("keep_float_weights", False)
    device = DEVICE if backend == "triton" else "cpu"
    modules = {} if sc_modules is None else {"sc_modules": sc_modules}
    model = tiny_model(seed, **changed)
    return patch_model(model, {**(overrides or {}), **modules}, backend=backend, device=device, keep_float_weights=kept)


def logits(model, ids=IDS, **arguments):
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), **arguments).logits.cpu()


def in_pieces(model, sizes, ids=IDS):
    with torch.inference_mode():
        cache = model.new_kv_cache(len(ids), ids.shape[1] + 3)
    return torch.cat([logits(model, piece, kv_cache=cache) for piece in ids.split(sizes, dim=1)], dim=1)


def settings(sc_modules):
    """Return {name: (sc_stoc_len, sc_prec)} of a tiny model in `sc_modules`, which is ATTENTION, MLP or MIXED."""
    found = {}
    for index in range(3):
        layer = f"model.layers.{index}"
        attention, mlp = ((48, 8), (128, 8)) if sc_modules is ATTENTION else ((128, 8), (24, 6))
        of_qkv = of_o = of_products = attention
        if sc_modules is MIXED:
            of_qkv, of_o, of_products, mlp = (21, 5), (90, 8), (200, 8), (32, 6)
            if index == 1:
                of_qkv = of_o = of_products = mlp = (40, 8)
        found |= {f"{layer}.self_attn.{name}_proj": of_qkv for name in "qkv"}
        found |= {f"{layer}.self_attn.o_proj": of_o, f"{layer}.self_attn": of_products}
        found |= {f"{layer}.mlp.{name}_proj": mlp for name in ("gate", "up", "down")}
    return {**found, "lm_head": (256 if sc_modules is MIXED else 128, 8)}


class RecordedAttention:
    """The attention of a layer, which notes the arguments and the result of its calls."""

    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def __call__(self, query, key, value, store, starts, scaling):
        out = self.inner(query, key, value, store, starts, scaling)
        self.calls.append((query, key, value, scaling, out))
        return out


def recorded(model):
    """Return {name: (input, output)} of every linear in a forward, and {name: (query, key, value, scaling, output)}."""
    linears, attentions = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, SCLinear):
            module.register_forward_hook(
                lambda module, inputs, out, name=name: linears.update({name: (inputs[0].clone(), out.clone())})
            )
        elif name.endswith(".self_attn"):
            calls = attentions[name] = []
            module.scspec_attention = RecordedAttention(module.scspec_attention, calls)
    logits(model)
    return linears, {name: calls[0] for name, calls in attentions.items()}


def softmax(scores, visible):
    return torch.from_numpy(invariant.softmax_rows(scores.contiguous().numpy(), visible.numpy()))


# ---------------------------------------------------------------------------------------------- which module has what


@pytest.mark.parametrize("sc_modules", [ATTENTION, MLP, MIXED], ids=["attention", "mlp", "mixed"])
def test_each_module_has_its_own_streams(sc_modules):
    """Each linear is `sc_matmul`, each attention the obvious one, at the length and precision its name is given."""
    weights = {
        name: module.weight.detach() for name, module in tiny_model().named_modules() if hasattr(module, "weight")
    }
    wanted = settings(sc_modules)
    linears, attentions = recorded(patched(sc_modules, LM_HEAD))
    assert set(linears) | set(attentions) == set(wanted)
    for name, (x, out) in linears.items():
        stoc_len, sc_prec = wanted[name]
        options = {"sc_prec": sc_prec, "stoc_len": stoc_len, "chunk_d": 128, "halve_bipolar_stoc_len": True}
        product = sc_matmul(x.flatten(0, 1), weights[name], backend="reference", **options)
        assert torch.equal(out.flatten(0, 1), product), name
    for name, (query, key, value, scaling, out) in attentions.items():
        stoc_len, sc_prec = wanted[name]
        spec = resolve_streams("bipolar", sc_prec, stoc_len, None, True)
        assert torch.equal(out, sc_attention(query, key, value, scaling, spec, "causal", softmax, "reference")), name


@pytest.mark.parametrize("own", [{"sc_stoc_len": 48}, {"sc_prec": 6}, {"sc_stoc_len": 17, "sc_prec": 5}], ids=str)
def test_an_override_of_every_module_is_the_global_setting(own):
    found = logits(patched({"*": own}, LM_HEAD))
    assert torch.equal(found, logits(patched(None, {**LM_HEAD, **own})))
    assert not torch.equal(found, logits(patched(None, LM_HEAD)))


def test_patterns_that_match_one_module_must_agree():
    """Whatever order they come in: JSON and YAML keep none."""
    first, second = {"*.down_proj": {"sc_stoc_len": 30}}, {"*.mlp.*": {"sc_stoc_len": 60}}
    for sc_modules in ({**first, **second}, {**second, **first}):
        with pytest.raises(ValueError, match=r"sc_modules: '.*' and '.*' both match .*\.mlp\.down_proj and set dif"):
            patched(sc_modules)
    reordered = patched(dict(reversed(MIXED.items())))
    assert torch.equal(logits(reordered), logits(patched(MIXED)))


def test_published_scopes_take_overrides_too():
    unipolar = {"preset": "published", "sc_mode": "unipolar"}
    found = logits(patched({"*": {"sc_stoc_len": 48}}, unipolar))
    assert torch.equal(found, logits(patched(None, {**unipolar, "sc_stoc_len": 48})))
    assert not torch.equal(found, logits(patched(ATTENTION, unipolar)))


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("sc_modules", [ATTENTION, MLP, MIXED], ids=["attention", "mlp", "mixed"])
def test_the_compiled_forward_has_the_bits_of_the_module_tree(sc_modules, monkeypatch):
    model = patched(sc_modules, LM_HEAD)
    assert fused_cpu.fits(model)
    whole = logits(model)
    assert torch.equal(in_pieces(model, (4, 1, 5, 1)), whole)
    monkeypatch.setattr(fused_cpu, "fits", lambda model: False)
    assert torch.equal(logits(model), whole)
    assert torch.equal(in_pieces(model, (4, 1, 5, 1)), whole)


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 0.9, "top_k": 20}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.usefixtures("wide_steps")
def test_identity_accepts_everything(backend, sampling):
    target, twin = (patched(MIXED_LAYER, LM_HEAD, backend=backend, num_hidden_layers=1) for _ in range(2))
    arguments = {"max_new_tokens": 6, "eos_token_id": [], **sampling}
    ids = IDS[:, :2].to(target.device)
    text, stats = generate_cached(target, twin, ids, gamma=2, **arguments)
    assert [block.accepted for block in stats.blocks] == [2, 2]
    assert all(beta == 1.0 for block in stats.blocks for beta in block.beta)
    assert torch.equal(text, generate_autoregressive(target, ids, **arguments))


@pytest.mark.usefixtures("wide_steps")
def test_the_fused_forward_has_streams_of_each_module():
    """Against the CPU's: other roundings, so that rows are near to 1e-5 but where a code flipped, in a minority."""
    ids = IDS[:, :4]
    model = patched(MIXED, LM_HEAD, backend="triton", num_hidden_layers=2)
    assert fused.fits(model)
    found = logits(model, ids)
    assert torch.equal(in_pieces(model, (1, 3), ids), found)
    wanted = logits(patched(MIXED, LM_HEAD, num_hidden_layers=2), ids)
    near = (found - wanted).abs().amax(-1) <= 1e-5 * wanted.abs().max()
    assert near.float().mean() > 0.5, near


@pytest.mark.usefixtures("wide_steps")
def test_the_fused_forward_of_an_override_of_every_module():
    ids = IDS[:, :3]
    one = patched({"*": {"sc_stoc_len": 17, "sc_prec": 5}}, LM_HEAD, backend="triton", num_hidden_layers=1)
    every = patched(None, {**LM_HEAD, "sc_stoc_len": 17, "sc_prec": 5}, backend="triton", num_hidden_layers=1)
    assert torch.equal(logits(one, ids), logits(every, ids))


# ---------------------------------------------------------------------------------------------- changed later


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.usefixtures("wide_steps")
def test_lengths_may_change_between_forwards(backend):
    """In place as well, where the dict on the config stays the same object; three steps, since graphs replay then."""
    model, ids = patched(ATTENTION, backend=backend, num_hidden_layers=1), IDS[:, :1]
    with torch.inference_mode():
        cache = model.new_kv_cache(1, 16)
    for sc_modules in (ATTENTION, {"*.self_attn*": {"sc_stoc_len": 20}}, {"*.mlp.*": {"sc_stoc_len": 20}}, {}):
        model.config.sc_modules.clear()
        model.config.sc_modules.update(sc_modules)
        wanted = logits(patched(sc_modules, backend=backend, num_hidden_layers=1), ids)
        for _ in range(3):
            assert torch.equal(logits(model, ids, kv_cache=cache), wanted), sc_modules
            cache.rollback(0, 0)
    assert ATTENTION == {"*.self_attn*": {"sc_stoc_len": 48}}, "a change on one model reached what it was made with"
    assert SC_CONFIG_DEFAULTS["sc_modules"] == {}


def test_a_global_knob_still_reaches_modules_with_an_override():
    model = patched(ATTENTION, {"sc_stoc_len": 64})
    logits(model)
    model.config.sc_seed, model.config.sc_stoc_len = 5, 100
    assert torch.equal(logits(model), logits(patched(ATTENTION, {"sc_stoc_len": 100, "sc_seed": 5})))


def test_a_precision_needs_the_weights():
    kept, dropped = patched(keep_float_weights=True), patched()
    for model in (kept, dropped):
        logits(model)
        model.config.sc_modules = MLP
    assert torch.equal(logits(kept), logits(patched(MLP)))
    with pytest.raises(ValueError, match=r"(?s)sc_prec.*dropped"):
        logits(dropped)


def test_a_cache_of_another_precision_is_refused():
    model = patched()
    cache = model.new_kv_cache(1, 16)
    model.config.sc_modules = {"model.layers.2.self_attn": {"sc_prec": 6}}
    with pytest.raises(ValueError, match="sc_prec=6: the KV cache was encoded with largest code 127"):
        logits(model, kv_cache=cache)


def test_a_wrong_mapping_set_later_leaves_the_model_as_it_was():
    model = patched(ATTENTION)
    before = logits(model)
    for wrong, message in (({"*.mpl.*": {"sc_prec": 6}}, "matches no module"), (None, "must be a mapping")):
        model.config.sc_modules = wrong
        with pytest.raises(ValueError, match=message):
            logits(model)
        model.config.sc_modules = dict(ATTENTION)
        assert torch.equal(logits(model), before)


def test_the_knob_is_reported():
    assert knobs_of(patched(MIXED))["sc_modules"] == MIXED
    assert knobs_of(patched())["sc_modules"] == {}
    found = resolve_knobs({"preset": "published", "sc_modules": MLP})["sc_modules"]
    assert found == MLP
    assert found["*.mlp.*"] is not MLP["*.mlp.*"]
    assert all(preset["sc_modules"] == {} for preset in PRESETS.values())


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("sc_modules", "message"),
    [
        ([["*", {"sc_prec": 6}]], r"sc_modules=\[\['\*', .*must be a mapping of patterns"),
        ({7: {"sc_prec": 6}}, r"sc_modules\[7\]=.*must map sc_stoc_len or sc_prec, or both, to ints"),
        ({"*": 64}, r"sc_modules\['\*'\]=64: must map"),
        ({"*": {}}, r"sc_modules\['\*'\]={}: must map"),
        ({"*": {"sc_seed": 3}}, r"sc_modules\['\*'\]={'sc_seed': 3}: must map"),
        ({"*": {"sc_stoc_len": None}}, r"sc_modules\['\*'\]=.*None}: must map"),
        ({"*": {"sc_stoc_len": True}}, r"sc_modules\['\*'\]=.*True}: must map"),
        ({"*": {"sc_prec": [6]}}, r"sc_modules\['\*'\]=.*must map"),
        ({"*": {"sc_prec": 9}}, r"sc_modules\['\*'\]: sc_prec=9: must be from 2 to 8"),
        ({"*": {"sc_stoc_len": 0}}, r"sc_modules\['\*'\]: stoc_len=0: must be from 1"),
        ({"*.mlp.*": {"sc_stoc_len": 65, "sc_prec": 6}}, r"sc_modules\['\*\.mlp\.\*'\]: stoc_len=65: .*1 to 64"),
        ({"*": {"sc_prec": 6}, "x": {"sc_prec": 1}}, r"sc_modules\['x'\]: sc_prec=1"),
    ],
)
def test_wrong_overrides_are_named(sc_modules, message):
    with pytest.raises(ValueError, match=message):
        resolve_knobs({"sc_modules": sc_modules})


def test_a_length_of_the_model_must_fit_a_module_of_lower_precision():
    with pytest.raises(ValueError, match=r"sc_modules\['\*\.mlp\.\*'\]: stoc_len=128: must be from 1 to 64"):
        resolve_knobs({"sc_stoc_len": 128, "sc_modules": {"*.mlp.*": {"sc_prec": 6}}})


@pytest.mark.parametrize(
    "pattern", ["model.layers.3.*", "*.mlp.upproj", "Model.*", "self_attn", "model.norm", "*.act_fn", "model.layers.0"]
)
def test_a_pattern_without_a_module_is_named_before_anything_is_rewired(pattern):
    model = tiny_model()
    wanted = logits(model)
    with pytest.raises(ValueError, match=r"matches no module; names are 'model\.layers\.0") as refusal:
        patch_model(model, {"sc_modules": {"*": {"sc_stoc_len": 64}, pattern: {"sc_stoc_len": 64}}})
    assert f"sc_modules: {pattern!r}" in str(refusal.value)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(
    ("sc_modules", "message"),
    [
        (
            {"model.layers.1.self_attn.k_proj": {"sc_stoc_len": 64}},
            r"q_proj is set by None, model\.layers\.1\.self_attn\.k_proj by 'model\.layers\.1\.self_attn\.k_proj'; .*"
            r"self_attn\.q_proj, self_attn\.k_proj, self_attn\.v_proj share",
        ),
        ({"*.[qk]_proj": {"sc_stoc_len": 64}}, r"q_proj is set by '\*\.\[qk\]_proj', .*v_proj by None"),
        (
            {"*.up_proj": {"sc_stoc_len": 64}, "*.gate_proj": {"sc_stoc_len": 32}},
            r"0\.mlp\.gate_proj is set by '\*\.gate_proj', .*up_proj by '\*\.up_proj'; mlp\.gate_proj, mlp\.up_proj s",
        ),
    ],
)
def test_a_divided_group_is_named(sc_modules, message):
    with pytest.raises(ValueError, match=message):
        patched(sc_modules)


def test_a_group_may_be_named_piece_by_piece():
    pieces = {f"*.{name}_proj": {"sc_stoc_len": 48} for name in "qkvo"}
    assert torch.equal(logits(patched({**pieces, **ATTENTION})), logits(patched(ATTENTION)))
    assert torch.equal(logits(patched(pieces)), logits(patched({"*.self_attn.*": {"sc_stoc_len": 48}})))
