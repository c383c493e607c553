"""Backend `triton`: look-ups in global memory, any mode and scope; and the rescaling that GPU linear layers end in.

For a fixed row and dimension the gate's K is fixed, and the counts of all codes lie in one line of 128 bytes. Lanes run
over outputs, so the look-ups of a warp are served by that line in one pass of the L1 cache.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from scspec.invariant import triton as invariant
from scspec.invariant.triton import launch
from scspec.sc.device import CHUNK, RUN, SLAB, DeviceTables, PackedWeight, SegmentSums, code_bytes, device_tables
from scspec.sc.encoding import Encoded
from scspec.sc.streams import StreamSpec
from scspec.sc.triton_attention import attend
from scspec.sc.triton_encoding import clipped_code, magnitude_bits, row_scale

__all__ = ["attend", "counts", "linear", "pack", "rescale", "segment_sums"]
NAME = "triton"
#: What `rescale` does with the products. ADD: adds them to another tensor. SILU_MUL: silu(first half) * second half.
STORE, ADD, SILU_MUL = 0, 1, 2
#: Outputs that a program (one warp) rescales, and chunks that it loads before it adds the first. Measured on an H100,
#: 4096 -> 4096, 1 and 5 rows: 3.0 and 5.0 us; 128 outputs 4.6 and 7.1, 16 outputs 3.0 and 5.8, 4 chunks 3.9 and 5.7.
_FINISHED, _AHEAD = 32, 16
_ROWS, _OUTPUTS, _DIMS = 4, 128, 16  # rows, outputs and dimensions of one step


def counts(a_codes: torch.Tensor, b_codes: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    """Return sum over d of sign_a sign_b count: codes (N, D), (M, D) int16 -> int32 (N, M)."""
    tables = device_tables(spec, a_codes.device)
    dims = torch.arange(a_codes.shape[1], device=a_codes.device) % 256
    ones = (tables.ones[dims, a_codes.abs().long()] * a_codes.sign()).contiguous()
    codes = code_bytes(b_codes, spec.mode).contiguous()
    (rows, depth), outputs = a_codes.shape, codes.shape[0]
    sums = torch.empty((1, rows, outputs), dtype=torch.int32, device=codes.device)
    _launch_counts(ones, codes, tables, sums, outputs, depth, RUN, depth)
    return sums[0]


def segment_sums(x: torch.Tensor, weight: PackedWeight, tables: DeviceTables) -> SegmentSums:
    """Return the counts of x (N, D) float32, float16 or bfloat16 with a packed weight, chunk by chunk."""
    rows = x.shape[0]
    ones = torch.empty((rows, weight.chunks * CHUNK), dtype=torch.int16, device=x.device)
    scale = torch.empty((rows, weight.chunks), dtype=torch.float32, device=x.device)
    arguments = (x, tables.ones, ones, scale, weight.depth, weight.chunks, float(tables.spec.max_code))
    launch(_encode_kernel, (weight.chunks, rows), *arguments, CHUNK=CHUNK, num_warps=1)
    dtype = torch.int16 if CHUNK * tables.spec.stoc_len < 2**15 else torch.int32
    sums = torch.empty((weight.chunks, rows, weight.m_pad), dtype=dtype, device=x.device)
    _launch_counts(ones, weight.codes, tables, sums, weight.m_pad, CHUNK, weight.m_pad * RUN, RUN)
    return SegmentSums(sums, scale, 1)


def pack(chunks: list[Encoded], chunk_d: int) -> PackedWeight:
    """Return bipolar codes (one Encoded (M, D_c) per chunk of `chunk_d` = 128, in order) packed for `linear`."""
    if chunk_d != CHUNK:
        raise ValueError(f"chunk_d={chunk_d}: a packed weight on a GPU has chunks of {CHUNK}")
    return PackedWeight.pack(chunks)


def linear(
    x: torch.Tensor,
    weight: PackedWeight | torch.Tensor,
    spec: StreamSpec,
    *,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    finish: int = STORE,
    addend: torch.Tensor | None = None,
    counted: Callable | None = None,
) -> torch.Tensor:
    """Return x (N, D) @ weight.T + bias (M,), finished as `rescale` says: (N, M), or (N, M / 2) for SILU_MUL.

    weight: packed (SC: `sc_matmul` per_row, bipolar, chunks of 128, bit for bit before rounding to out_dtype), or a
    float tensor (M, D) of x's dtype.  counted: what counts, None for this backend's `segment_sums`.
    """
    if isinstance(weight, torch.Tensor):
        return _finished(invariant.linear(x, weight, out_dtype), bias, finish, addend)
    tables = device_tables(spec, x.device)
    outputs = weight.outputs // 2 if finish == SILU_MUL else weight.outputs
    out = torch.empty((x.shape[0], outputs), dtype=out_dtype, device=x.device)
    for first in range(0, x.shape[0], SLAB):
        rows = slice(first, first + SLAB)
        added = None if addend is None else addend[rows]
        parts = (counted or segment_sums)(x[rows], weight, tables)
        rescale(parts, weight, spec, out[rows], bias=bias, finish=finish, addend=added)
    return out


def _finished(product: torch.Tensor, bias, finish: int, addend) -> torch.Tensor:
    """Return float products with what `rescale` does to those of SC."""
    product = product if bias is None else product + bias
    if finish == SILU_MUL:
        return invariant.silu_mul(*product.chunk(2, dim=1))
    return addend + product if finish == ADD else product


def _launch_counts(ones, codes, tables, sums, outputs, segment_d, run_stride, m_stride) -> None:
    segments, rows = sums.shape[:2]
    grid = (triton.cdiv(outputs, _OUTPUTS), segments, triton.cdiv(rows, _ROWS))
    launch(
        _counts_kernel,
        grid,
        ones,
        codes,
        tables.counts,
        sums,
        rows,
        outputs,
        ones.shape[1],
        segment_d,
        run_stride,
        m_stride,
        tables.counts.stride(0),
        WIDTH=tables.width,
        SIGNED=tables.spec.mode == "bipolar",
        ROWS=_ROWS,
        OUTPUTS=_OUTPUTS,
        DIMS=_DIMS,
        RUN=RUN,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows", "outputs", "depth", "segment_d", "run_stride", "m_stride"])
def _counts_kernel(
    ones_ptr,  # int16 (rows, depth), K with the code's sign
    codes_ptr,  # uint8, dimension d of output m at d // RUN * run_stride + m * m_stride + d % RUN
    counts_ptr,
    sums_ptr,  # (segments, rows, outputs)
    rows,
    outputs,
    depth,
    segment_d,
    run_stride,
    m_stride,
    table_stride,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DIMS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Add up ROWS rows x OUTPUTS outputs of one segment, DIMS dimensions a step. Integers: any order is exact."""
    m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    segment = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    last = tl.minimum((segment + 1) * segment_d, depth)
    for r in tl.static_range(ROWS):
        row = first_row + r
        if row < rows:
            total = tl.zeros((OUTPUTS,), tl.int32)
            for first in range(segment * segment_d, last, DIMS):
                d = first + tl.arange(0, DIMS)
                k = tl.load(ones_ptr + row.to(tl.int64) * depth + d, mask=d < last, other=0).to(tl.int32)
                at = (d // RUN).to(tl.int64) * run_stride + d % RUN
                inside = (m < outputs)[:, None] & (d < last)[None, :]
                codes = tl.load(codes_ptr + m.to(tl.int64)[:, None] * m_stride + at[None, :], mask=inside, other=0)
                codes = codes.to(tl.int32)
                dim = (d - segment * segment_d) % 256
                line = dim * table_stride + tl.abs(k) * WIDTH
                sign = tl.where(k < 0, -1, 1)[None, :]
                if SIGNED:
                    sign = tl.where(codes > 127, -sign, sign)
                    codes = codes & 127
                found = tl.load(counts_ptr + line[None, :] + codes, mask=inside, other=0).to(tl.int32)
                total += tl.sum(found * sign, axis=1)
            out = sums_ptr + (segment.to(tl.int64) * rows + row) * outputs + m
            tl.store(out, total.to(sums_ptr.dtype.element_ty), mask=m < outputs)


@triton.jit(do_not_specialize=["depth", "chunks"])
def _encode_kernel(x_ptr, table_ptr, ones_ptr, scale_ptr, depth, chunks, max_code, CHUNK: tl.constexpr):
    """Write the signed ones and the scale of one chunk of one row: `encoding.encode` bit for bit."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, CHUNK)
    d = chunk * CHUNK + dim
    x = tl.load(x_ptr + row.to(tl.int64) * depth + d, mask=d < depth, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(magnitude_bits(x), axis=0), max_code)
    code = clipped_code(x, scale, max_code)
    k = tl.load(table_ptr + dim * 128 + tl.abs(code)).to(tl.int32)
    tl.store(ones_ptr + (row.to(tl.int64) * chunks + chunk) * CHUNK + dim, tl.where(code < 0, -k, k).to(tl.int16))
    tl.store(scale_ptr + row * chunks + chunk, scale)


def rescale(
    parts: SegmentSums,
    weight: PackedWeight,
    spec: StreamSpec,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    finish: int = STORE,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out` (N, M), filled: chunk sums scaled and added in ascending order, times q**2 / L, plus bias (M,).

    The products are rounded to out's dtype; then ADD adds `addend` (N, M) of that dtype, which may be `out`, and
    SILU_MUL turns 2 M of them (gate beside up) into silu(gate) * up, each step rounded to the dtype.
    """
    rows, outputs = out.shape
    factor = spec.max_code**2 / spec.stoc_len
    launch(
        _rescale_kernel,
        (triton.cdiv(outputs, _FINISHED), rows),
        parts.sums,
        parts.scale,
        weight.scale,
        bias,
        addend,
        out,
        rows,
        outputs,
        weight.m_pad,
        weight.chunks,
        factor,
        PER_CHUNK=parts.per_chunk,
        FINISH=finish,
        BIAS=bias is not None,
        OUTPUTS=_FINISHED,
        AHEAD=_AHEAD,
        num_warps=_FINISHED // 32,
    )
    return out


@triton.jit
def _products(
    sums_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, row, m, mask, rows, m_pad, chunks, factor, PER_CHUNK, BIAS, AHEAD
):
    """Return the products float32 of outputs `m` of a row. AHEAD chunks are loaded before the first is added."""
    total = tl.zeros(m.shape, tl.float32)
    for first in range(0, chunks, AHEAD):
        for ahead in tl.static_range(AHEAD):
            chunk = first + ahead
            inside = mask & (chunk < chunks)
            count = tl.zeros(m.shape, tl.int32)
            for part in tl.static_range(PER_CHUNK):
                at = ((chunk * PER_CHUNK + part).to(tl.int64) * rows + row) * m_pad + m
                count += tl.load(sums_ptr + at, mask=inside, other=0).to(tl.int32)
            scale_a = tl.load(scale_a_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
            scale_b = tl.load(scale_b_ptr + chunk.to(tl.int64) * m_pad + m, mask=inside, other=0.0)
            total += (scale_a * scale_b) * count.to(tl.float32)
    total = total * factor
    if BIAS:
        total += tl.load(bias_ptr + m, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rows", "outputs", "m_pad", "chunks"])
def _rescale_kernel(
    sums_ptr,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    addend_ptr,
    out_ptr,
    rows,
    outputs,
    m_pad,
    chunks,
    factor,
    PER_CHUNK: tl.constexpr,
    FINISH: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Finish OUTPUTS outputs of one row."""
    m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1)
    mask = m < outputs
    dtype = out_ptr.dtype.element_ty
    at = row.to(tl.int64) * outputs + m
    out = _products(
        sums_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, row, m, mask, rows, m_pad, chunks, factor, PER_CHUNK, BIAS, AHEAD
    ).to(dtype)
    if FINISH == 1:
        out = (tl.load(addend_ptr + at, mask=mask).to(tl.float32) + out.to(tl.float32)).to(dtype)
    if FINISH == 2:
        gate = out.to(tl.float32)
        up = _products(
            sums_ptr,
            scale_a_ptr,
            scale_b_ptr,
            bias_ptr,
            row,
            m + outputs,
            mask,
            rows,
            m_pad,
            chunks,
            factor,
            PER_CHUNK,
            BIAS,
            AHEAD,
        ).to(dtype)
        out = (invariant.silu_of(gate).to(dtype).to(tl.float32) * up.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at, out, mask=mask)
