"""Quantisation in Triton: what `encoding.encode` does to a block of floats, bit for bit."""

import triton
import triton.language as tl

from scspec.sc.encoding import SCALE_FLOOR

_FLOOR = tl.constexpr(SCALE_FLOOR)
_RINT = tl.constexpr(1.5 * 2**23)  # x + _RINT - _RINT rounds |x| < 2**22 half to even


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x| float32 as int32: they order like magnitudes, and a NaN's lie above infinity's."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(peak_bits, max_code):
    """Return max(|x|max, floor) / q, from the largest `magnitude_bits`; NaN if that is one."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak < _FLOOR, _FLOOR, peak), max_code)


@triton.jit
def clipped_code(x, scale, max_code):
    """Return rint(x / scale), half to even, clipped to -q..q, int32; NaN gives q, so that no index leaves its table."""
    ratio = tl.div_rn(x, scale)
    ratio = tl.where(ratio < max_code, ratio, max_code)
    ratio = tl.where(ratio > -max_code, ratio, -max_code)
    return (ratio + _RINT - _RINT).to(tl.int32)
