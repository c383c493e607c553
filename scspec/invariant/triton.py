"""Batch-invariant kernels for the GPU: one binary serves every number of rows, every position and every capacity.

What could choose another binary, and with it another order of summation, is kept out: row counts, capacities and
the strides that vary with them are not specialised, and what enters a sum stands at a 16-byte boundary. Blocks start
at position 0 and are combined in ascending order; masked tails add exact zeros. Nothing waits for the device.

Not covered: gradients, and checks that would need values from the device (positions are the caller's to check).
"""

import torch
import triton
import triton.language as tl

#: Rows of a linear layer's tile, always: tl.dot's smallest, so that 1 row and 16 run the same instructions.
ROW_TILE = tl.constexpr(16)
#: Bytes of one weight row that a step of the linear layer reads; with LINEAR_STAGES steps in flight.
LINEAR_STEP_BYTES = 256
LINEAR_STAGES = 5
LINEAR_WARPS = 4
#: Weight rows of a tile: more for the layers that still fill the multiprocessors with them.
LINEAR_TILE, LINEAR_TILE_LARGE, LINEAR_LARGE = 32, 64, 16384
ELEMENTWISE_BLOCK = 1024
SOFTMAX_BLOCK = 1024
#: Keys that one step of the attention combines.
KEY_BLOCK = 64
_MAX_NORM_WIDTH = 65536
_ALIGNMENT = 16
#: exp of more than this overflows; x / (1 + exp(88)) is 0 to 36 digits, as on the CPU.
_EXP_HIGHEST = tl.constexpr(88.0)


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Launch on the device of the first argument; a * b + c keeps both of its roundings."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=False, **meta)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, copied if it does not start at the boundary that the kernels' one binary takes for granted."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------- norm


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    inside = d < DEPTH
    at = tl.program_id(0).to(tl.int64) * DEPTH + d
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(row * row, axis=0), DEPTH * 1.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (w * (row * factor)).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return RMSNorm (Zhang & Sennrich 2019) of x (N, D) in its dtype: float32 inside, rounded once. weight: (D,)."""
    rows, depth = x.shape
    _check(weight.shape == (depth,), f"weight {tuple(weight.shape)} does not fit rows of {depth}")
    _check(depth <= _MAX_NORM_WIDTH, f"rows of {depth}: a norm's row has at most {_MAX_NORM_WIDTH} entries")
    x, weight = _aligned(x.contiguous()), _aligned(weight)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(depth)
    meta = {"DEPTH": depth, "BLOCK": block, "num_warps": min(16, max(1, block // 256))}
    if rows:
        launch(_rms_norm_kernel, (rows,), x, weight, out, eps, **meta)
    return out


# ---------------------------------------------------------------------------------------------- linear


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(x, weight, out, rows, columns, depth, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row, is_column = row < rows, column < columns
    d = tl.arange(0, BLOCK_D)
    x_at = x + row.to(tl.int64)[:, None] * depth + d[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * depth + d[:, None]
    total = tl.zeros((ROW_TILE, BLOCK_M), tl.float32)
    for first in range(0, depth, BLOCK_D):
        inside = first + d < depth
        a = tl.load(x_at + first, mask=is_row[:, None] & inside[None, :], other=0.0, eviction_policy="evict_last")
        mask = inside[:, None] & is_column[None, :]
        b = tl.load(weight_at + first, mask=mask, other=0.0, eviction_policy="evict_first")
        total = tl.dot(a, b, total, input_precision="ieee")
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return x @ weight.T of x (N, D) and weight (M, D) of one dtype: (N, M), summed in float32, rounded once."""
    rows, depth = x.shape
    columns = weight.shape[0]
    _check(weight.shape == (columns, depth), f"weight {tuple(weight.shape)} does not fit rows of {depth}")
    _check(weight.dtype == x.dtype, f"x is {x.dtype}, weight {weight.dtype}: they must agree")
    _check(weight.is_contiguous(), "weight: must be contiguous")
    x, weight = _aligned(x.contiguous()), _aligned(weight)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    block_m = LINEAR_TILE_LARGE if columns >= LINEAR_LARGE else LINEAR_TILE
    meta = {"BLOCK_M": block_m, "BLOCK_D": LINEAR_STEP_BYTES // x.element_size()}
    meta |= {"num_warps": LINEAR_WARPS, "num_stages": LINEAR_STAGES}
    grid = triton.cdiv(rows, ROW_TILE.value), triton.cdiv(columns, block_m)  # neighbours share their weights in L2
    if rows:
        launch(_linear_kernel, grid, x, weight, out, rows, columns, depth, **meta)
    return out


# ---------------------------------------------------------------------------------------------- activation


@triton.jit
def silu_of(x):
    """Return x / (1 + exp(-x)) of a float32 block, for kernels that finish with it."""
    return tl.div_rn(x, 1.0 + tl.exp(tl.minimum(-x, _EXP_HIGHEST)))


@triton.jit
def _silu_kernel(gate, up, out, width, gate_stride, up_stride, HAS_UP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    x = tl.load(gate + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
    y = silu_of(x).to(out.dtype.element_ty)
    if HAS_UP:
        factor = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * factor).to(out.dtype.element_ty)
    tl.store(out + row * width + i, y, mask=inside)


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x / (1 + exp(-x)) of x (N, I) in its dtype: float32 inside, rounded once. Rows may be strided."""
    return _silu(x, None)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of (N, I), rounded after each; both may be column halves of one (N, 2 I) tensor."""
    _check(gate.shape == up.shape and gate.dtype == up.dtype, f"gate {gate.shape} {gate.dtype}: not like up")
    _check(up.stride(1) == 1, "up: entries of a row must be neighbours")
    return _silu(gate, up)


def _silu(gate, up) -> torch.Tensor:
    rows, width = gate.shape
    _check(gate.stride(1) == 1, "entries of a row must be neighbours")
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    has_up = up is not None
    up = up if has_up else gate
    grid = rows, triton.cdiv(width, ELEMENTWISE_BLOCK)
    meta = {"HAS_UP": has_up, "BLOCK": ELEMENTWISE_BLOCK}
    if rows:
        launch(_silu_kernel, grid, gate, up, out, width, gate.stride(0), up.stride(0), **meta)
    return out


# ---------------------------------------------------------------------------------------------- softmax


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["scores", "visible", "out"])
def _softmax_kernel(scores, visible, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    last = tl.minimum(tl.load(visible + tl.program_id(0)), size)
    s = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, last, BLOCK):
        x = tl.load(scores + row + first + s, mask=first + s < last, other=float("-inf"))
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, axis=0)
    total = tl.zeros((), tl.float32)
    for first in range(0, last, BLOCK):
        x = tl.load(scores + row + first + s, mask=first + s < last, other=float("-inf"))
        total += tl.sum(tl.exp(x - peak), axis=0)
    for first in range(0, last, BLOCK):
        seen = first + s < last
        x = tl.load(scores + row + first + s, mask=seen, other=float("-inf"))
        tl.store(out + row + first + s, tl.div_rn(tl.exp(x - peak), total), mask=seen)
    for first in range(0, size, BLOCK):
        hidden = (first + s >= last) & (first + s < size)
        tl.store(out + row + first + s, 0.0, mask=hidden)


def softmax_rows(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return softmax of each row of scores float32 (N, S) over its first visible[n] keys (int32), zero beyond."""
    rows, size = scores.shape
    _check(scores.dtype == torch.float32 and visible.dtype == torch.int32, "scores are float32, visible int32")
    _check(visible.shape == (rows,), f"visible {tuple(visible.shape)}: one count for each of {rows} rows")
    scores, out = scores.contiguous(), torch.empty(rows, size, device=scores.device)
    if rows:
        launch(_softmax_kernel, (rows,), scores, visible.contiguous(), out, size, BLOCK=SOFTMAX_BLOCK)
    return out


# ---------------------------------------------------------------------------------------------- attention


@triton.jit(
    do_not_specialize=["query_b", "query_t", "query_h", "capacity"],
    do_not_specialize_on_alignment=["query", "start"],
)
def _attention_kernel(
    query, keys, values, start, out, query_b, query_t, query_h, kv_heads, capacity, scaling,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside = d < HEAD_DIM
    q = tl.load(query + b * query_b + t * query_t + head * query_h + d, mask=inside, other=0.0).to(tl.float32)
    visible = tl.minimum(tl.load(start + b) + t + 1, capacity)
    rows = (b * kv_heads + head // (heads // kv_heads)) * capacity
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, visible, BLOCK_S):
        seen = first + s < visible
        at = (rows + first + s)[:, None] * HEAD_DIM + d[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(q[None, :] * k, axis=1) * scaling, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=0))
        kept = tl.exp(peak - higher)  # exactly 1 where the maximum stays, exactly 0 for the first block
        weight = tl.exp(score - higher)
        total = total * kept + tl.sum(weight, axis=0)
        mixed = mixed * kept + tl.sum(weight[:, None] * v, axis=0)
        peak = higher
    at = ((b * tl.num_programs(1) + t) * heads + head) * HEAD_DIM + d
    tl.store(out + at, tl.div_rn(mixed, total).to(out.dtype.element_ty), mask=inside)


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return causal attention (B, T, H * head_dim) in query's dtype, float32 inside, rounded once.

    query: (B, T, H, head_dim), strided as it likes but for head_dim; row t of sequence b sees positions 0..start[b]+t.
    keys, values: (B, H_kv, capacity, head_dim), contiguous, already written there. start: int32 (B,).
    The maximum runs along (Milakov & Gimelshein 2018), one fixed step per KEY_BLOCK keys from position 0.
    """
    batch, count, heads, head_dim = query.shape
    _check_cache(keys, values, batch, head_dim, start)
    _check(heads % keys.shape[1] == 0, f"{heads} heads do not share {keys.shape[1]} KV heads evenly")
    _check(query.stride(3) == 1, "query: entries of a head must be neighbours")
    out = torch.empty(batch, count, heads * head_dim, dtype=query.dtype, device=query.device)
    meta = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": KEY_BLOCK}
    args = query, _aligned(keys), _aligned(values), start, out, *query.stride()[:3], keys.shape[1], keys.shape[2]
    if out.numel():
        launch(_attention_kernel, (heads, count, batch), *args, scaling, **meta)
    return out


def _check_cache(keys, values, batch: int, head_dim: int, start) -> None:
    fits = keys.ndim == 4 and (keys.shape[0], keys.shape[3]) == (batch, head_dim) and values.shape == keys.shape
    _check(fits, f"keys {tuple(keys.shape)}, values {tuple(values.shape)}: not ({batch}, H_kv, capacity, {head_dim})")
    _check(keys.is_contiguous() and values.is_contiguous(), "keys, values: must be contiguous")
    _check_start(start, batch)


def _check_start(start, batch: int) -> None:
    _check(start.shape == (batch,) and start.dtype == torch.int32, f"start: int32 ({batch},), one per sequence")
    _check(start.is_contiguous(), "start: must be contiguous")


@triton.jit(
    do_not_specialize=["key_b", "key_t", "key_h", "value_b", "value_t", "value_h", "capacity"],
    do_not_specialize_on_alignment=["key", "value", "keys", "values", "start"],
)
def _write_kv_kernel(
    key, value, keys, values, start, key_b, key_t, key_h, value_b, value_t, value_h, capacity,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(start + b) + t
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KV_HEADS) & (d < HEAD_DIM)
    at = ((b * KV_HEADS + head) * capacity + position) * HEAD_DIM + d
    fits = inside & (position < capacity)
    k = tl.load(key + b * key_b + t * key_t + head * key_h + d, mask=inside)
    tl.store(keys + at, k, mask=fits)
    v = tl.load(value + b * value_b + t * value_t + head * value_h + d, mask=inside)
    tl.store(values + at, v, mask=fits)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor
) -> None:
    """Store key, value (B, T, H_kv, head_dim) at positions start[b] + t of keys, values (B, H_kv, capacity, head_dim).

    All of one dtype; start: int32 (B,). What lies beyond the capacity is not written: the caller keeps count.
    """
    batch, count, kv_heads, head_dim = key.shape
    _check_cache(keys, values, batch, head_dim, start)
    _check(value.shape == key.shape and keys.shape[1] == kv_heads, "key, value: as many heads as the cache")
    _check(len({key.dtype, value.dtype, keys.dtype, values.dtype}) == 1, "key, value and the cache differ in dtype")
    _check(key.stride(3) == value.stride(3) == 1, "key, value: entries of a head must be neighbours")
    blocks = {"BLOCK_H": triton.next_power_of_2(kv_heads), "BLOCK_D": triton.next_power_of_2(head_dim)}
    args = key, value, keys, values, start, *key.stride()[:3], *value.stride()[:3], keys.shape[2]
    if key.numel():
        launch(_write_kv_kernel, (count, batch), *args, KV_HEADS=kv_heads, HEAD_DIM=head_dim, **blocks)


# ---------------------------------------------------------------------------------------------- rotary


@triton.jit(do_not_specialize=["x_b", "x_t", "x_h", "positions"], do_not_specialize_on_alignment=["x", "start"])
def _rotary_kernel(
    x, cos, sin, start, out, x_b, x_t, x_h, positions,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(start + b) + t
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (d < HALF)
    held = (d < HALF) & (position < positions)
    row = position.to(tl.int64) * (2 * HALF) + d
    from_x = x + b * x_b + t * x_t + head * x_h + d
    low = tl.load(from_x, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(from_x + HALF, mask=inside, other=0.0).to(tl.float32)
    turned_low = low * tl.load(cos + row, mask=held, other=0.0) - high * tl.load(sin + row, mask=held, other=0.0)
    cos, sin = cos + HALF, sin + HALF
    turned_high = high * tl.load(cos + row, mask=held, other=0.0) + low * tl.load(sin + row, mask=held, other=0.0)
    to_out = out + ((b * tl.num_programs(0) + t) * HEADS + head) * (2 * HALF) + d
    tl.store(to_out, turned_low.to(out.dtype.element_ty), mask=inside)
    tl.store(to_out + HALF, turned_high.to(out.dtype.element_ty), mask=inside)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, heads, head_dim) turned by position start[b] + t (Su et al. 2021; halves as in Hugging Face).

    Float32 inside, rounded once to x's dtype. cos, sin: float32 (positions, head_dim); start: int32 (B,). Positions
    beyond the table give zeros: the caller keeps count.
    """
    batch, count, heads, head_dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _check(head_dim % 2 == 0, f"head_dim {head_dim}: must be even")
    for table in (cos, sin):
        fits = table.shape == (cos.shape[0], head_dim) and table.dtype == torch.float32 and table.is_contiguous()
        _check(fits, f"cos, sin: contiguous float32 (positions, {head_dim})")
    _check_start(start, batch)
    _check(x.stride(3) == 1, "x: entries of a head must be neighbours")
    blocks = {"BLOCK_H": triton.next_power_of_2(heads), "BLOCK_D": triton.next_power_of_2(head_dim // 2)}
    args = x, cos, sin, start, out, *x.stride()[:3], cos.shape[0]
    if x.numel():
        launch(_rotary_kernel, (count, batch), *args, HEADS=heads, HALF=head_dim // 2, **blocks)
    return out
