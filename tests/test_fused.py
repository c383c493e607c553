"""The fused forward of a tiny Llama: the contract of exactness, in the interpreter where there is no GPU.

What only a GPU has, captured graphs and backend `cuda`, is marked gpu.
"""

import pytest
import torch
from interpreter import DEVICE, DTYPES
from tiny import tiny_model

from scspec import fused
from scspec.decoding import SamplingConfig, generate_autoregressive, generate_cached
from scspec.patching import patch_model

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]], device=DEVICE)
SC, FLOAT = {}, {"preset": "float"}
#: Arms of a grid, and knobs that the fused forward takes. attention_bias is the model's, not a knob.
ARMS = {
    "sc": SC,
    "float": FLOAT,
    "float linears": {"use_sc_linear": False},
    "float attention": {"use_sc_attn": False},
    "sc lm head": {"sc_lm_head": True, "sc_stoc_len": 40, "sc_seed": 3},
    "p 4": {"sc_prec": 4, "sc_stoc_len": 16, "sc_halve_bipolar": False},
}
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(do_sample=True, temperature=0.9, top_k=20, top_p=0.95)

pytestmark = pytest.mark.usefixtures("wide_steps")
on_gpu = pytest.mark.gpu


def patched(overrides=None, *, backend="triton", dtype=torch.float32, layers=2, device=None, **changed):
    kept = changed.pop("keep_float_weights", False)
    device = device or ("cpu" if backend == "cpu" else DEVICE)
    model = tiny_model(num_hidden_layers=layers, **changed)
    return patch_model(model, overrides, device=device, dtype=dtype, backend=backend, keep_float_weights=kept)


def logits(model, ids=IDS, **arguments):
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), **arguments).logits


def in_pieces(model, sizes, capacity, ids=IDS):
    """Return the logits of `ids` (B, T) fed to a cache of `capacity` in pieces of `sizes`."""
    with torch.inference_mode():
        cache = model.new_kv_cache(len(ids), capacity)
    return torch.cat([logits(model, piece, kv_cache=cache) for piece in ids.split(sizes, dim=1)], dim=1)


def check_partition(model, *partitions, ids=IDS):
    """Return the cache-free logits, after seeing that they come in pieces (sizes, capacity) too, bit for bit."""
    assert fused.fits(model)
    whole = logits(model, ids)
    assert torch.isfinite(whole).all()
    for sizes, capacity in partitions:
        assert torch.equal(in_pieces(model, sizes, capacity, ids), whole), (sizes, capacity)
    return whole


# ---------------------------------------------------------------------------------------------- one sequence


def test_cached_equals_cache_free():
    check_partition(patched(), ([1] * 6, 16), ([3, 1, 2], 64))


def test_more_rows_than_a_tile_of_floats():
    check_partition(patched(FLOAT), ([17, 1], 64), ([1, 16, 1], 64), ids=IDS.repeat(1, 3))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "sc"])
def test_every_arm_is_exact(arm):
    check_partition(patched(ARMS[arm], layers=1), ([1, 3], 16), ids=IDS[:, :4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("overrides", [SC, FLOAT], ids=["sc", "float"])
def test_every_dtype_is_exact(overrides, dtype):
    model = patched(overrides, dtype=dtype, layers=1)
    whole = check_partition(model, ([3, 1], 64), ids=IDS[:, :4])
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("overrides", [SC, FLOAT], ids=["sc", "float"])
def test_biases_are_added(overrides):
    """Random ones, in the attention as in the mlp: with zeros (how a model begins) a lost bias goes unseen."""

    def biased(backend):
        model = tiny_model(num_hidden_layers=1, attention_bias=True, mlp_bias=True).to(
            "cpu" if backend == "cpu" else DEVICE
        )
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        return patch_model(model, overrides, backend=backend)

    whole = check_partition(biased("triton"), ([2, 1], 16), ids=IDS[:, :3])
    assert_near(whole, logits(biased("cpu"), IDS[:, :3]))


@pytest.mark.parametrize("arm", ARMS)
def test_the_cpu_engine_says_nearly_the_same(arm):
    ids = IDS[:, :4]
    assert_near(logits(patched(ARMS[arm]), ids), logits(patched(ARMS[arm], backend="cpu"), ids))


def assert_near(found, wanted):
    """Rounding alone differs, so rows are near to 1e-5, but where a code flipped there or before: in a minority."""
    near = (found.cpu() - wanted).abs().amax(-1) <= 1e-5 * wanted.abs().max()
    assert near.float().mean() > 0.5, near


def test_kept_rows_are_the_last():
    model = patched(FLOAT)
    assert torch.equal(logits(model, logits_to_keep=2), logits(model)[:, -2:])


@pytest.mark.parametrize("change", [{"sc_stoc_len": 40}, {"sc_seed": 5}], ids=["stoc_len", "seed"])
def test_streams_may_change_between_forwards(change):
    """The codes in the cache outlive the change; the forwards before and after give what they would have given."""
    ids = IDS[:, :3]
    model, changed = patched(layers=1), patched(change, layers=1)
    before = logits(model, ids[:, :1])
    vars(model.config).update(change)
    after = logits(model, ids)
    assert torch.equal(after, logits(changed, ids))
    assert not torch.equal(after[:, :1], before)
    rests = []
    for sizes in ([1, 1], [2]):  # a cache begun before the change, then fed in two partitions
        vars(model.config).update({"sc_stoc_len": None, "sc_seed": 0})
        with torch.inference_mode():
            cache = model.new_kv_cache(1, 16)
        assert torch.equal(logits(model, ids[:, :1], kv_cache=cache), before)
        vars(model.config).update(change)
        rests.append(torch.cat([logits(model, x, kv_cache=cache) for x in ids[:, 1:].split(sizes, dim=1)], dim=1))
    assert torch.equal(*rests)


# ---------------------------------------------------------------------------------------------- which forward


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (SC, True),
        (FLOAT, True),
        ({"use_sc_attn": False, "sc_mode": "unipolar"}, False),
        ({"sc_granularity": "per_row"}, False),
        ({"sc_linear_chunk_d": 64}, False),
        ({"sc_linear_granularity": "per_tensor"}, False),
        ({"use_sc_linear": False, "use_sc_attn": False, "sc_lm_head": True, "sc_linear_chunk_d": 64}, False),
        ({"preset": "float", "batch_invariant": False}, False),
    ],
)
def test_knobs_choose_the_forward(overrides, fits, monkeypatch):
    """What does not fit runs through the module tree, and comes as near to the CPU engine."""
    taken = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *arguments: (taken.append(True), forward(*arguments))[1])
    model, ids = patched(overrides, layers=1), IDS[:, :3]
    found = logits(model, ids)
    assert bool(taken) == fused.fits(model) == fits
    assert_near(found, logits(patched(overrides, backend="cpu", layers=1), ids))


def test_causal_knobs_are_exact_outside_the_fused_forward_too():
    model = patched({"sc_linear_chunk_d": 64}, layers=1)
    assert not fused.fits(model)
    assert torch.equal(in_pieces(model, [1, 2], 16, IDS[:, :3]), logits(model, IDS[:, :3]))


def test_a_cache_of_another_attention_is_refused():
    model = patched(FLOAT, keep_float_weights=True)
    with torch.inference_mode():
        cache = model.new_kv_cache(1, 16)
    model.config.use_sc_attn = True
    with pytest.raises(ValueError, match="use_sc_attn"):
        logits(model, kv_cache=cache)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("overrides", [SC, FLOAT], ids=["sc", "float"])
def test_alone_equals_in_a_ragged_batch(overrides):
    """Slots filled one by one through views, then fed together at different positions, one of them put back."""
    model = patched(overrides, layers=1)
    batch = torch.cat([IDS, (IDS * 7) % 61])[:, :4]
    alone = [logits(model, row[None])[0] for row in batch]
    with torch.inference_mode():
        cache = model.new_kv_cache(3, 16)
        for slot, row, held in ((2, 1, 2), (0, 0, 1)):
            out = logits(model, batch[row : row + 1, :held], kv_cache=cache.slot(slot))
            assert torch.equal(out[0], alone[row][:held])
        assert cache.lengths == (1, 0, 2)
        for step in range(2):  # slot 1 is idle: fed anything, then put back
            ids = torch.stack([batch[0, 1 + step], batch[1, step], batch[1, 2 + step]])[:, None]
            out = logits(model, ids, kv_cache=cache)
            cache.rollback(1, 0)
            assert torch.equal(out[0, 0], alone[0][1 + step])
            assert torch.equal(out[2, 0], alone[1][2 + step])
        cache.rollback(0, 2)
        assert cache.lengths == (2, 0, 4)
        out = logits(model, batch[:1, 2:4], kv_cache=cache.slot(0))
        assert torch.equal(out[0], alone[0][2:])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("gamma", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("overrides", [SC, FLOAT], ids=["sc", "float"])
def test_identity_accepts_everything(overrides, gamma, sampling):
    target, twin = (patched(overrides, layers=1) for _ in range(2))
    arguments = {"max_new_tokens": 2 * (gamma + 1), **vars(sampling)}
    text, stats = generate_cached(target, twin, IDS[:, :2], gamma=gamma, eos_token_id=[], **arguments)
    assert [block.accepted for block in stats.blocks] == [gamma] * 2
    assert all(beta == 1.0 for block in stats.blocks for beta in block.beta)
    assert torch.equal(text, generate_autoregressive(target, IDS[:, :2], eos_token_id=[], **arguments))


# ---------------------------------------------------------------------------------------------- several devices


@pytest.fixture
def two_devices():
    """Two GPUs; without any, the CPU under two names: other keys for each, though torch sees nothing to move there."""
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    return [f"{DEVICE.type}:0", f"{DEVICE.type}:1"]


def check_spread(devices, overrides, backend):
    """Spread over devices, in pieces and as a target, a model gives the bits that it gives on one."""
    options = {"layers": 3, "tie_word_embeddings": True, "backend": backend}
    alone, spread = patched(overrides, **options), patched(overrides, device=devices, **options)
    assert [attention.device for attention in spread.attentions] == [torch.device(devices[i]) for i in (0, 0, 1)]
    whole, ids = logits(alone, IDS[:, :3]), IDS[:, :3]
    found = logits(spread, ids)
    assert found.device == torch.zeros(0, device=devices[1]).device
    assert torch.equal(found.to(DEVICE), whole)
    if spread.config.sc_granularity != "causal":  # there rows depend on the partition, on one device too
        return
    assert torch.equal(in_pieces(spread, [1, 1, 1], 16, ids).to(DEVICE), whole)
    text, stats = generate_cached(spread, alone, ids, max_new_tokens=3, gamma=2, eos_token_id=[])
    assert all(block.accepted == 2 for block in stats.blocks)
    assert torch.equal(text, generate_autoregressive(alone, ids, max_new_tokens=3, eos_token_id=[]))


SPREAD = {"sc": SC, "float": FLOAT, "published scope": {"sc_granularity": "per_row"}, "published": "published"}


@pytest.mark.parametrize("arm", SPREAD)
def test_a_model_spread_over_devices_is_exact(two_devices, arm):
    check_spread(two_devices, SPREAD[arm], "triton")


@on_gpu
@pytest.mark.parametrize("arm", SPREAD)
def test_a_model_spread_over_devices_is_exact_in_cuda(two_devices, arm):
    check_spread(two_devices, SPREAD[arm], "cuda")


# ---------------------------------------------------------------------------------------------- what would break it


def test_a_norm_over_all_rows_would_be_caught(monkeypatch):
    model = patched(FLOAT)
    check_partition(model, ([5, 1], 16))
    norm = fused._norm
    monkeypatch.setattr(fused, "_norm", lambda module, x: norm(module, x) * x.square().mean())
    with pytest.raises(AssertionError, match="16"):
        check_partition(model, ([5, 1], 16))


def test_positions_that_ignore_the_cache_would_be_caught(monkeypatch):
    model = patched(FLOAT)
    monkeypatch.setattr(fused._State, "place", lambda state, _: [start.zero_() for start in state.starts.values()])
    with pytest.raises(AssertionError, match="16"):
        check_partition(model, ([5, 1], 16))


# ---------------------------------------------------------------------------------------------- graphs


@on_gpu
def test_each_device_captures_its_own_graphs(two_devices):
    """After a capture on the first: torch would capture on a stream of that one, and replay nothing on the second."""
    found = []
    for device in two_devices:
        model, ids = patched(SC, device=device), IDS.to(device)
        cache = model.new_kv_cache(1, 16)
        for _ in range(3):  # launched, captured and replayed, replayed
            found.append(model(input_ids=ids, kv_cache=cache).logits.cpu())
            cache.rollback(0, 0)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("arm", ARMS)
def test_a_graph_gives_the_bits_of_the_launches(arm, dtype, backend):
    """Steps of 1 and 3 tokens, each launched, captured, then replayed, at rising positions and after a rollback."""
    model = patched(ARMS[arm], dtype=dtype, backend=backend)
    ids = (torch.arange(30, device=DEVICE)[None] * 17 + 3) % 61
    whole = logits(model, ids)
    for capacity in (64, 512):
        with torch.inference_mode():
            cache = model.new_kv_cache(1, capacity)
        for again in range(2):
            for first, last in [(0, 4), *((i, i + 1) for i in range(4, 9)), *((i, i + 3) for i in range(9, 30, 3))]:
                out = logits(model, ids[:, first:last], kv_cache=cache)
                assert torch.equal(out, whole[:, first:last]), (capacity, again, first)
            cache.rollback(0, 0)
        graphs = cache.layers.state.graphs
        assert [graphs[key] is not None for key in graphs] == [True] * 3, "4, 1 and 3 rows came twice"


@on_gpu
def test_graphs_survive_a_change_of_knobs():
    """Weights are packed anew when a linear knob changes; a graph of before must not read what was freed."""
    model = patched({"sc_stoc_len": 64}, keep_float_weights=True)
    with torch.inference_mode():
        cache = model.new_kv_cache(1, 64)

    def step():
        cache.rollback(0, 0)
        return logits(model, IDS[:, :1], kv_cache=cache)

    wanted = {}
    for use_sc_linear in (True, False):
        model.config.use_sc_linear = use_sc_linear
        wanted[use_sc_linear] = logits(model, IDS[:, :1])
    assert not torch.equal(wanted[True], wanted[False])
    for use_sc_linear in (True, False, True, False):
        model.config.use_sc_linear = use_sc_linear
        for _ in range(3):
            assert torch.equal(step(), wanted[use_sc_linear])
        assert len(cache.layers.state.graphs) == 1, "outdated graphs are kept"
        junk = [torch.full((n,), 255, dtype=torch.uint8, device=DEVICE) for n in range(512, 65536, 512)]
        del junk


@on_gpu
def test_graphs_serve_a_ragged_batch():
    model = patched()
    batch = torch.cat([IDS, (IDS * 7) % 61, (IDS * 11) % 61])
    alone = [logits(model, row[None])[0] for row in batch]
    with torch.inference_mode():
        cache = model.new_kv_cache(3, 64)
    for b in (1, 2):
        logits(model, batch[b : b + 1, :b], kv_cache=cache.slot(b))
    for _ in range(4):  # launched, captured, replayed, replayed
        assert cache.lengths == (0, 1, 2)
        for step in range(4):
            ids = torch.stack([batch[b, b + step] for b in range(3)])[:, None]
            out = logits(model, ids, kv_cache=cache)
            for b in range(3):
                assert torch.equal(out[b, 0], alone[b][b + step])
        for b in range(3):
            cache.rollback(b, b)


@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_agree_bit_for_bit(backend):
    assert torch.equal(logits(patched(backend=backend)), logits(patched(backend="triton")))
