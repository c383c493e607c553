"""SC attention on the GPU: the store, scores and P @ V exactly; whole rows against the CPU; which bits stay equal."""

import pytest
import torch
from compile_sm90 import compiled
from interpreter import DEVICE

from scspec.sc import cpu_attention, triton_attention
from scspec.sc.device import device_tables
from scspec.sc.encoding import encode, encode_causal
from scspec.sc.matmul import finish, scaled_sums
from scspec.sc.streams import resolve_streams
from scspec.sc.triton_attention import active_positions, attend
from scspec.sc.triton_kv import DeviceKV, rotate_and_write, write

SPEC = resolve_streams("bipolar", 8, 96, 128)
FULL = resolve_streams("bipolar", 8, 256)  # counts in int16
SHORT = resolve_streams("bipolar", 4, 5, sc_seed=2)  # streams repeat every 16 positions
LOWEST = resolve_streams("bipolar", 2, 3)
FIELDS = ("k_words", "v_words", "k_scale", "v_scale")
PEAK, HIDDEN = -150.0, -350.0  # exp of their difference is exactly 0; exp(-PEAK) overflows


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """What counts: a module with `scores`, `mix` and `attend`."""
    if request.param == "triton":
        return triton_attention
    from scspec.sc import cuda  # where a launch without a GPU would fail, too

    return cuda


def drawn(batch, kv_heads, shared, positions, head_dim, seed=0):
    """Return query (B, S, H, head_dim), key and value (B, S, H_kv, head_dim) float32 for all positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, positions, kv_heads, head_dim)
    query = torch.randn(batch, positions, kv_heads * shared, head_dim, generator=generator)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    value = value * torch.exp(torch.randn(*shape[:3], 1, generator=generator))  # scales differ by position
    return tuple(x.to(DEVICE) for x in (query, key, value))


def starts(*positions):
    return torch.tensor(positions, dtype=torch.int32, device=DEVICE)


def poisoned(batch, kv_heads, head_dim, capacity, spec=SPEC):
    """Return a store full of what must never be read: every code byte -127, every scale NaN."""
    store = DeviceKV.empty(batch, kv_heads, head_dim, capacity, spec.max_code, DEVICE)
    for name in FIELDS:
        getattr(store, name).fill_(float("nan") if name.endswith("scale") else -1)
    return store


def words_of(codes):
    """Return codes int16 (..., head_dim) as words int32 (..., ceil(head_dim / 4))."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4))
    return (codes.abs() | (codes < 0) << 7).to(torch.uint8).contiguous().view(torch.int32)


def filled(key, value, capacity, spec=SPEC):
    """Return a poisoned store with key, value at positions 0..., encoded by `encoding`."""
    batch, positions, kv_heads, head_dim = key.shape
    store = poisoned(batch, kv_heads, head_dim, capacity, spec)
    k, v = (encode(x.transpose(1, 2).float(), spec, "per_row") for x in (key, value))
    store.k_words[..., :positions] = words_of(k.codes).transpose(2, 3)
    store.v_words[:, :, :positions] = words_of(v.codes)
    store.k_scale[..., :positions] = k.scale[..., 0]
    store.v_scale[..., :positions] = v.scale[..., 0]
    return store


def same_store(one, other):
    return all(torch.equal(getattr(one, x).nan_to_num(-1.0), getattr(other, x).nan_to_num(-1.0)) for x in FIELDS)


def attended(query, store, start, spec=SPEC, backend=triton_attention):
    return backend.attend(query, store, start, query.shape[3] ** -0.5, device_tables(spec, DEVICE))


def wanted_scores(query, key, spec, scaling):
    """Return scaled scores float32 (B, H, T, S) from the reference."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    pairs = ((encode(x[b].transpose(0, 1).cpu(), spec, "per_row") for x in (query, key)) for b in range(len(query)))
    return torch.stack([finish(scaled_sums(*pair, spec, "reference"), spec) * scaling for pair in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "spec"), [(6, SPEC), (12, SHORT), (64, LOWEST), (96, FULL)])
def test_written_codes_are_those_of_the_encoding(head_dim, spec, dtype):
    """Ragged starts; halves of a step, saturated, zero and tiny rows among them; nothing else is touched."""
    _, key, value = drawn(2, 2, 1, 5, head_dim)
    key[:, 1] = (key[:, 1] * spec.max_code / 3).round().clamp(-spec.max_code, spec.max_code - 1) + 0.5
    key[:, 1, :, 0] = spec.max_code  # so the scale is 1, and the halves are exact in every dtype
    value[:, 2], value[0, 3], key[1, 0] = value[:, 2].sign(), 0.0, 1e-7
    key, value = key.to(dtype), value.to(dtype)
    whole = filled(key, value, 5, spec)
    store, expected = (poisoned(2, 2, head_dim, 11, spec) for _ in range(2))
    for b, first in enumerate((4, 1)):
        rows = slice(first, first + 5)
        expected.k_words[b, ..., rows], expected.v_words[b, :, rows] = whole.k_words[b], whole.v_words[b]
        expected.k_scale[b, :, rows], expected.v_scale[b, :, rows] = whole.k_scale[b], whole.v_scale[b]
    write(key, value, store, starts(4, 1))
    assert same_store(store, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [6, 12, 64])
def test_rotate_and_write_is_rotary_then_write(head_dim, dtype):
    batch, steps, heads, kv_heads = 2, 3, 4, 2
    qkv = torch.cat([x.flatten(2) for x in drawn(batch, kv_heads, 2, steps, head_dim)], dim=2).to(dtype)
    angle = torch.arange(9.0)[:, None] * torch.linspace(1.0, 0.01, head_dim // 2).repeat(2)
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    start = starts(6, 0)
    kept = qkv.clone()
    store, expected = (poisoned(batch, kv_heads, head_dim, 10) for _ in range(2))
    query = rotate_and_write(qkv, cos, sin, store, start, heads)

    parts = qkv.view(batch, steps, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    at = start[:, None].long() + torch.arange(steps, device=DEVICE)
    low, high = torch.cat(parts[:2], dim=2).float().chunk(2, dim=3)
    half_turned = torch.cat([-high, low], dim=3)
    turned = torch.cat([low, high], dim=3) * cos[at][:, :, None] + half_turned * sin[at][:, :, None]
    turned = turned.to(dtype)
    write(turned[:, :, heads:], parts[2], expected, start)
    assert torch.equal(query, turned[:, :, :heads])
    assert same_store(store, expected)
    assert torch.equal(qkv, kept)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(
    ("head_dim", "spec", "positions"),
    [(6, SPEC, 9), (12, SHORT, 70), (20, LOWEST, 5), (64, FULL, 66), (96, SPEC, 64), (128, SPEC, 65), (270, SHORT, 3)],
)
def test_scores_are_exact(head_dim, spec, positions, shared, backend):
    """Counts, and the order of the four factors. Saturated keys and queries among them."""
    query, key, value = drawn(1, 2, shared, positions, head_dim)
    query, key[:, 1] = query[:, -2:], key[:, 1].sign()
    query[0, 1, 0] = key[0, 1, 0]
    store = filled(key, value, positions + 1, spec)
    tables, scaling = device_tables(spec, DEVICE), 0.3
    scores = backend.scores(query.contiguous(), store, starts(positions - 2), scaling, tables)
    scores = scores.view(2, 2 * shared, positions + 1).transpose(0, 1).cpu()
    wanted = wanted_scores(query, key, spec, scaling)[0]
    for t, visible in enumerate((positions - 1, positions)):
        assert torch.equal(scores[:, t, :visible], wanted[:, t, :visible])


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "spec", "positions", "density"),
    [(6, SPEC, 1, 1.0), (12, SHORT, 90, 0.3), (64, FULL, 70, 1.0), (20, SPEC, 600, 0.1), (128, SPEC, 130, 0.7)],
)
def test_mixed_values_are_exact(head_dim, spec, positions, density, small_blocks, monkeypatch, backend):
    """Probabilities 1 / n and 0, which every softmax gets exactly; what is checked is codes, skipping and counts."""
    if small_blocks:
        monkeypatch.setattr(triton_attention, "BLOCK", 16)
        monkeypatch.setattr(triton_attention, "POSITIONS", 16)
    query, key, value = drawn(1, 1, 2, positions, head_dim)
    chosen = torch.rand(2, positions, generator=torch.Generator().manual_seed(1)) < density
    chosen[:, -1] = True
    probs = chosen.float() / chosen.sum(1, keepdim=True)
    store = filled(key, value, positions + 3, spec)
    scores = torch.full((2, positions + 3), float("nan"), device=DEVICE)
    scores[:, :positions] = torch.where(chosen, PEAK, HIDDEN)
    last, tables = query[:, -1:].contiguous(), device_tables(spec, DEVICE)
    active = active_positions(scores, last, store, starts(positions - 1), tables)
    out = backend.mix(scores, active, last, store, tables)
    pair = encode_causal(probs, value[0, :, 0].T.cpu(), spec)
    wanted = finish(scaled_sums(*pair, spec, "reference"), spec)
    assert torch.equal(out.view(2, head_dim).cpu(), wanted)


def unambiguous(query, key, value, spec, first):
    """Return which rows (B, T, H) have no code of P within 1e-4 of a rounding boundary, more than exp's error moves."""
    scores = wanted_scores(query, key, spec, query.shape[3] ** -0.5).double()
    steps, positions = scores.shape[2:]
    scores = scores.masked_fill(torch.ones(steps, positions).triu(first + 1).bool(), float("-inf"))
    v_scale = encode(value.transpose(1, 2).cpu(), spec, "per_row").scale[..., 0].double()
    folded = scores.softmax(-1) * v_scale.repeat_interleave(query.shape[2] // key.shape[2], dim=1)[:, :, None]
    code = folded / folded.amax(-1, keepdim=True) * spec.max_code
    return ((code - code.floor() - 0.5).abs() > 1e-4).all(-1).transpose(1, 2)


@pytest.mark.parametrize(("spec", "head_dim"), [(SPEC, 64), (FULL, 12), (SHORT, 20)])
def test_rows_have_the_counts_of_the_cpu(spec, head_dim, backend):
    """Where no code of P is ambiguous: a count (at most 70 * 256) off by one is 5e-5 relative, exp's error 1e-6."""
    query, key, value = drawn(2, 2, 2, 70, head_dim)
    rows = torch.tensor([0, 1, 2, 31, 63, 64, 68, 69])
    store = filled(key, value, 70, spec)
    out = torch.cat([attended(query[:, [t]], store, starts(t, t), spec, backend) for t in rows.tolist()], dim=1)
    arrays = [x.transpose(1, 2).cpu() for x in (query, key, value)]
    held = cpu_attention.EncodedKV.empty(2, 2, head_dim, 70, spec.max_code)
    wanted = cpu_attention.attend(*arrays, held, 0, head_dim**-0.5, spec)[:, rows]
    clear = unambiguous(query, key, value, spec, 0)[:, rows]
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(out.view(wanted.shape).cpu()[clear], wanted[clear], rtol=5e-6, atol=0)


@pytest.mark.parametrize("steps", [[1] * 7, [4, 3], [6, 1]])
def test_partitions_batch_and_capacity_change_no_bit(steps, monkeypatch, backend):
    """Ragged sequences of 3 and 12 earlier tokens, decoded together and alone, in stores of three sizes."""
    monkeypatch.setattr(triton_attention, "BLOCK", 16)
    monkeypatch.setattr(triton_attention, "KEYS", 16)
    first, total = (3, 12), sum(steps)
    query, key, value = drawn(2, 1, 2, 12 + total, 20)
    rows = [[x[b, f : f + total] for b, f in enumerate(first)] for x in (query, key, value)]
    new_query, new_key, new_value = (torch.stack(x) for x in rows)

    def decode(batch, steps, capacity):
        store = filled(key[batch], value[batch], capacity)
        start = starts(*first)[batch]
        for name in FIELDS:  # what lies beyond a sequence's own tokens is poison
            for b, held in enumerate(start.tolist()):
                tensor = getattr(store, name)[b]
                beyond = tensor[:, held:] if name != "k_words" else tensor[..., held:]
                beyond.fill_(float("nan") if name.endswith("scale") else -1)
        out, done = [], 0
        for count in steps:
            part = slice(done, done + count)
            write(new_key[batch, part], new_value[batch, part], store, start)
            out.append(attended(new_query[batch, part], store, start, backend=backend))
            start, done = start + count, done + count
        return torch.cat(out, dim=1)

    whole = decode([0, 1], [total], 19)
    assert torch.isfinite(whole).all()
    assert torch.equal(decode([0, 1], steps, 64), whole)
    for b, capacity in ((0, 300), (1, 512)):
        assert torch.equal(decode([b], steps, capacity), whole[[b]])


def test_a_slot_is_a_view():
    _, key, value = drawn(2, 2, 1, 3, 12)
    together, apart = (poisoned(2, 2, 12, 8) for _ in range(2))
    write(key, value, together, starts(1, 4))
    for b, first in enumerate((1, 4)):
        write(key[[b]], value[[b]], apart.slot(b), starts(first))
    assert same_store(together, apart)


def test_a_prefill_cut_in_slabs_is_the_same(monkeypatch, backend):
    query, key, value = drawn(2, 1, 2, 7, 20)
    store, start = filled(key, value, 9), starts(0, 0)
    whole = attended(query, store, start, backend=backend)
    monkeypatch.setattr(triton_attention, "SCRATCH", 2 * 2 * 9 * 3)  # three of the seven rows at a time
    assert torch.equal(attended(query, store, start, backend=backend), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "shared", "head_dim"), [(2, 4, 128), (3, 3, 64), (1, 2, 96), (1, 1, 12), (2, 2, 256)]
)
@pytest.mark.parametrize("spec", [SPEC, FULL, SHORT], ids=["8 bits", "16-bit counts", "short"])
def test_both_backends_attend_alike(heads, shared, head_dim, spec, dtype):
    """Longer than any block: lists that end within a warp's turn, keys beyond one block, ragged sequences."""
    from scspec.sc import cuda

    query, key, value = (x.to(dtype) for x in drawn(2, heads, shared, 700, head_dim))
    store = filled(key, value, 701, spec)
    for steps, first in ((1, (0, 1)), (1, (255, 256)), (5, (695, 90)), (40, (500, 511))):
        rows = torch.stack([query[b, f : f + steps] for b, f in enumerate(first)])
        wanted = attended(rows, store, starts(*first), spec)
        assert torch.equal(attended(rows, store, starts(*first), spec, cuda), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype, backend):
    query, key, value = drawn(1, 1, 2, 5, 20)
    query = query[:, -1:].to(dtype)
    store = filled(key, value, 5)
    out = attended(query, store, starts(4), backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, attended(query.float(), store, starts(4), backend=backend).to(dtype))


@pytest.mark.parametrize("value_scale", [0.0, 1e-9, 1e-38, 1e4])
def test_values_of_extreme_size(value_scale, backend):
    """All zero, below the scale floor, below the smallest probability that float32 holds, large."""
    query, key, value = drawn(1, 1, 2, 9, 20)
    query, value = query * 30, value * value_scale  # scores so far apart that some probabilities are 0
    out = attended(query, filled(key, value, 9), starts(0), backend=backend)
    held = cpu_attention.EncodedKV.empty(1, 1, 20, 9, SPEC.max_code)
    arrays = [x.transpose(1, 2).cpu() for x in (query, key, value)]
    wanted = cpu_attention.attend(*arrays, held, 0, 20**-0.5, SPEC)
    clear = unambiguous(query, key, value, SPEC, 0)
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(out.view(wanted.shape).cpu()[clear], wanted[clear], rtol=5e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_not_a_number_comes_out_again(which, backend):
    """Seen from its own position on, in its own head, and nowhere else."""
    query, key, value = drawn(2, 2, 2, 5, 12)
    good = attended(query, filled(key, value, 5), starts(0, 0), backend=backend).view(2, 5, 4, 12)
    {"query": query, "key": key, "value": value}[which][1, 2, 1, 7] = float("nan")
    store = poisoned(2, 2, 12, 5)
    write(key, value, store, starts(0, 0))
    out = attended(query, store, starts(0, 0), backend=backend).view(2, 5, 4, 12)
    touched = torch.zeros_like(out, dtype=torch.bool)
    if which == "query":
        touched[1, 2, 1] = True
    else:
        touched[1, 2:, 2:] = True
    assert torch.isnan(out[touched]).all()
    assert torch.equal(out[~touched], good[~touched])


def test_another_precision_on_the_same_store_is_refused():
    query, key, value = drawn(1, 1, 1, 3, 8)
    store = filled(key, value, 3)
    with pytest.raises(ValueError, match="sc_prec=7"):
        attended(query, store, starts(0), resolve_streams("bipolar", 7, 96))


def launches():
    """Return name -> function: each launches one class of each kernel for every batch, row count and capacity."""
    half = torch.float16
    classes = [(dtype, spec, 64) for dtype in (torch.float32, half, torch.bfloat16) for spec in (SPEC, FULL)]
    classes += [(half, SHORT, 64), (half, LOWEST, 64), (half, SPEC, 12), (half, SPEC, 128)]
    return {str(item): lambda item=item: _decode_steps(*item) for item in classes}


def _decode_steps(dtype, spec, head_dim):
    for batch, steps, capacity in ((1, 1, 64), (1, 5, 65), (3, 1, 512), (2, 16, 16), (1, 1, 1)):
        tables = device_tables(spec, DEVICE)
        together = DeviceKV.empty(batch + 1, 2, head_dim, capacity, spec.max_code, DEVICE)
        for store in (together.slot(0), together.slot(1)) if batch == 1 else (together,):
            for start in (starts(*range(batch)), starts(*range(batch + 1))[1:]):
                qkv, angles = torch.zeros(batch, steps, 8 * head_dim, dtype=dtype), torch.zeros(capacity, head_dim)
                query = rotate_and_write(qkv, angles, angles, store, start, 4)
                write(query[:, :, :2], query[:, :, 2:], store, start)
                attend(query, store, start, 0.125, tables)


def test_one_binary_serves_every_shape():
    """Every kernel compiles for sm_90, to one binary for a class of dtype, streams and head."""
    for name, counts in compiled("test_sc_attention_triton").items():
        kernels = ("_list_kernel", "_mix_kernel", "_rotate_and_write_kernel", "_score_kernel", "_write_kernel")
        assert counts == dict.fromkeys(kernels, 1), name
