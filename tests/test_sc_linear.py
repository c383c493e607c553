"""The fused SC linear and `SCLinear`: bit for bit what `sc_matmul` gives, on any thread count and beside any row."""

from types import SimpleNamespace

import brute_force
import numpy as np
import pytest
import torch
from torch import nn

from scspec import sc_matmul
from scspec.invariant import cpu as invariant
from scspec.sc import cpu
from scspec.sc.encoding import encode
from scspec.sc.knobs import stream_spec
from scspec.sc.linear import SCLinear, SharedInput
from scspec.sc.matmul import chunk_slices
from scspec.sc.streams import resolve_streams, scrambles

#: rows, columns, depth, chunk_d: odd ones, groups of four rows, units of 64, chunks wider than D, columns past 256
SHAPES = [
    (1, 1, 1, 128),
    (1, 3, 63, 64),
    (3, 5, 65, 64),
    (4, 7, 64, 0),
    (5, 2, 200, 128),
    (7, 31, 257, 100),
    (9, 300, 130, 128),
    (2, 513, 40, 7),
    (6, 11, 576, 128),
    (3, 4, 1000, 0),
]


def operands(rows, columns, depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator), torch.randn(columns, depth, generator=generator)


def packed(weight, spec, chunk_d):
    slices = chunk_slices(weight.shape[1], chunk_d)
    return cpu.pack([encode(weight[:, s], spec, "per_row") for s in slices], chunk_d or weight.shape[1])


@pytest.mark.parametrize(("rows", "columns", "depth", "chunk_d"), SHAPES)
@pytest.mark.parametrize(
    ("sc_prec", "stoc_len", "grid"), [(8, 128, 128), (8, 256, 256), (8, 1, 256), (5, 21, 16), (2, 3, 4)]
)
def test_fused_linear_equals_sc_matmul(rows, columns, depth, chunk_d, sc_prec, stoc_len, grid):
    x, weight = operands(rows, columns, depth)
    spec = resolve_streams("bipolar", sc_prec, stoc_len, grid)
    knobs = {"sc_prec": sc_prec, "stoc_len": stoc_len, "rng_levels": grid, "chunk_d": chunk_d}
    out = cpu.linear(x, packed(weight, spec, chunk_d), spec)
    assert torch.equal(out, sc_matmul(x, weight, backend="reference", **knobs))


@pytest.mark.parametrize(("rows", "columns", "depth", "chunk_d"), SHAPES)
def test_fused_linear_does_not_depend_on_rows_or_threads(rows, columns, depth, chunk_d, threads):
    x, weight = operands(rows, columns, depth)
    spec = resolve_streams("bipolar", 8, 96)
    prepared = packed(weight, spec, chunk_d)
    outs = []
    for count in (1, 2):
        threads(count)
        outs.append(cpu.linear(x, prepared, spec))
        alone = torch.cat([cpu.linear(x[i : i + 1], prepared, spec) for i in range(rows)])
        assert torch.equal(outs[-1], alone)
    assert torch.equal(*outs)


@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("depth", [64, 128, 200, 576, 1536])
@pytest.mark.parametrize("chunk_d", [0, 128, 256])
def test_fused_linear_does_not_overflow(depth, stoc_len, chunk_d):
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])[:, None]
    x, weight = signs.expand(5, depth).contiguous(), signs[:3].expand(3, depth)
    spec = resolve_streams("bipolar", 8, stoc_len)
    out = cpu.linear(x, packed(weight, spec, chunk_d), spec)
    assert torch.equal(out, sc_matmul(x, weight, stoc_len=stoc_len, chunk_d=chunk_d, backend="reference"))
    assert torch.equal(out.round(), signs * signs[:3].T * depth)  # rounding errors stay far below 0.5


def test_fused_linear_of_zero_rows():
    x, weight = operands(5, 6, 150)
    x[1:4] = 0
    weight[2] = 0
    spec = resolve_streams("bipolar", 8, 128)
    out = cpu.linear(x, packed(weight, spec, 64), spec)
    assert torch.equal(out[1:4], torch.zeros(3, 6))
    assert torch.equal(out[:, 2], torch.zeros(5))
    assert torch.equal(out, sc_matmul(x, weight, stoc_len=128, chunk_d=64, backend="reference"))


# ---------------------------------------------------------------------------------------------- SCLinear


def knobs(**changes):
    config = {
        "use_sc_linear": True,
        "sc_prec": 8,
        "sc_stoc_len": 128,
        "sc_mode": "bipolar",
        "sc_linear_granularity": "per_row",
        "sc_linear_chunk_d": 64,
        "sc_halve_bipolar": True,
        "sc_seed": 0,
        "batch_invariant": True,
    }
    return SimpleNamespace(**config | {"backend": "cpu"} | changes)


def layer(config, columns=9, depth=150, bias=True, seed=0):
    """Return (SCLinear, weight, bias)."""
    linear = nn.Linear(depth, columns, bias=bias).requires_grad_(False)
    linear.weight.copy_(operands(1, columns, depth, seed)[1])
    if bias:
        linear.bias.copy_(torch.linspace(-1, 1, columns))
    return SCLinear(linear, config, "use_sc_linear"), linear.weight.clone(), linear.bias


def expected(x, weight, bias, config):
    out = sc_matmul(
        x,
        weight,
        config.sc_linear_granularity,
        mode=config.sc_mode,
        sc_prec=config.sc_prec,
        stoc_len=config.sc_stoc_len,
        chunk_d=config.sc_linear_chunk_d,
        halve_bipolar_stoc_len=config.sc_halve_bipolar,
        backend="reference",
    )
    return out if bias is None else out + bias


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor"])
@pytest.mark.parametrize("chunk_d", [0, 64, 200])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_sc_linear_equals_sc_matmul(mode, granularity, chunk_d, bias, dropped):
    config = knobs(sc_mode=mode, sc_linear_granularity=granularity, sc_linear_chunk_d=chunk_d)
    module, weight, offset = layer(config, bias=bias)
    if dropped:
        module.drop_float_weight()
    x = operands(6, 1, 150)[0]
    wanted = expected(x, weight, offset, config)
    assert torch.equal(module(x), wanted)
    assert torch.equal(module(x.view(2, 3, 150)), wanted.view(2, 3, 9))
    assert torch.equal(module(x.T.contiguous().T), wanted)


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
def test_length_takes_effect_at_the_next_forward(mode):
    config = knobs(sc_mode=mode)
    module, weight, offset = layer(config)
    module.drop_float_weight()
    x = operands(3, 1, 150)[0]
    outs = []
    for config.sc_stoc_len in (128, 31, None, 256, 128):
        outs.append(module(x))
        assert torch.equal(outs[-1], expected(x, weight, offset, config))
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[-1])


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
def test_seed_takes_effect_at_the_next_forward(mode):
    config = knobs(sc_mode=mode, sc_linear_chunk_d=0)
    module, weight, _ = layer(config, bias=False)
    module.drop_float_weight()
    x = operands(3, 1, 150)[0]
    outs = []
    for config.sc_seed in (0, 1, 2, 0):
        outs.append(module(x))
        oracle = brute_force.matmul(
            x, weight, mode=mode, stoc_len=128, halve_bipolar_stoc_len=True, scramble=scrambles(stream_spec(config))
        )
        assert (np.abs(outs[-1].numpy() - oracle.value) <= oracle.tolerance).all()
    assert torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize(
    "change",
    [{"sc_prec": 7}, {"sc_mode": "unipolar"}, {"sc_linear_granularity": "per_tensor"}, {"sc_linear_chunk_d": 50}],
)
def test_knobs_that_need_the_float_weight(change):
    config = knobs(sc_stoc_len=64)
    x = operands(3, 1, 150)[0]
    module, weight, offset = layer(config)
    before = module(x)
    assert module.weight is not None
    vars(config).update(change)
    assert torch.equal(module(x), expected(x, weight, offset, config))  # kept: the codes are made anew

    config = knobs(sc_stoc_len=64)
    module, *_ = layer(config)
    module.drop_float_weight()
    assert module.weight is None
    assert sum(p.numel() for p in module.parameters()) == module.out_features  # the bias alone
    kept = dict(vars(config))
    vars(config).update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        module(x)
    vars(config).update(kept)
    assert torch.equal(module(x), before)


def test_switched_off_it_is_a_float_layer():
    config = knobs(use_sc_linear=False)
    module, weight, offset = layer(config)
    x = operands(5, 1, 150)[0]
    out = invariant.linear(x.numpy(), invariant.pack_linear(weight.numpy()), 9)
    assert torch.equal(module(x), torch.from_numpy(out) + offset)
    config.batch_invariant = False
    assert torch.equal(module(x), nn.functional.linear(x, weight) + offset)
    config.use_sc_linear = True
    assert torch.equal(module(x), expected(x, weight, offset, config))
    config.use_sc_linear = False
    module.drop_float_weight()
    assert module.weight is not None  # torch's own layer reads it
    config.use_sc_linear = True
    assert torch.equal(module(x), expected(x, weight, offset, config))


def test_wrong_knobs_are_refused_at_the_forward():
    config = knobs()
    module, *_ = layer(config)
    config.sc_stoc_len = 257
    with pytest.raises(ValueError, match="stoc_len=257"):
        module(operands(3, 1, 150)[0])


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_comes_out_again(mode, granularity, rows, bad):
    """No check costs the model a pass over its data: a bad value must not leave its table, and must be seen."""
    config = knobs(sc_mode=mode, sc_linear_granularity=granularity)
    module, *_ = layer(config)
    x = operands(rows, 1, 150)[0]
    good = module(x)
    x[0, 77] = bad
    out = module(x)
    assert not torch.isfinite(out[0]).any()
    if np.isnan(bad):
        assert torch.isnan(out[0]).all()
    if granularity == "per_row":
        assert torch.equal(out[1:], good[1:])
    x[:] = bad
    assert not torch.isfinite(module(x)).any()


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor"])
def test_not_a_number_in_the_weight_comes_out_again(mode, granularity):
    module, *_ = layer(knobs(sc_mode=mode, sc_linear_granularity=granularity))
    x = operands(5, 1, 150)[0]
    good = module(x)
    module, *_ = layer(knobs(sc_mode=mode, sc_linear_granularity=granularity))
    module.weight[3, 100] = float("nan")
    out = module(x)
    assert torch.isnan(out[:, 3]).all()
    if granularity == "per_row":
        kept = [m for m in range(9) if m != 3]
        assert torch.equal(out[:, kept], good[:, kept])


def test_a_failed_preparation_is_made_up_for(monkeypatch):
    """An exception between two members must not leave one of them with the old codes."""
    config = knobs()
    members = [layer(config, bias=False, seed=seed)[0] for seed in (0, 1)]
    SharedInput.join(members)
    x = operands(3, 1, 150)[0]
    for member in members:
        member(x)
    config.sc_prec, config.sc_stoc_len, calls = 6, 32, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("scspec.sc.linear.encode", failing)
        with pytest.raises(MemoryError):
            members[0](x)
    wanted = [layer(config, bias=False, seed=seed)[0](x) for seed in (0, 1)]
    assert all(torch.equal(member(x), out) for member, out in zip(members, wanted, strict=True))
