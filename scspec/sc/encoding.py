"""Floating-point operands -> integer codes with scales. Torch, IEEE float32, round half to even.

Every backend uses these codes or reproduces them bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from scspec.sc.streams import StreamSpec

#: The published floor of |x|max (and of max - min), so that an all-zero scope has a finite scale.
SCALE_FLOOR = 1e-5


@dataclass(frozen=True)
class Encoded:
    """An operand as codes.

    codes: int16 (..., rows, D); signed magnitudes -q..q (bipolar) or 0..q (unipolar).
    scale: float32, broadcasts against (..., rows, 1).
    zero: float32 zero point like `scale`, None in bipolar mode.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def encode(x: torch.Tensor, spec: StreamSpec, granularity: str, group: int = 1) -> Encoded:
    """Return x (..., rows, D) float32 quantised with one scale per scope (docs/method.md, "Codes").

    per_row: a scale per `group` consecutive rows; per_head: per leading index; per_tensor: one.
    """
    if spec.mode == "bipolar":
        peak = _reduce(x.abs(), granularity, group, torch.amax)
        scale = _divided(peak.clamp_min(SCALE_FLOOR), spec.max_code)
        return Encoded(_signed_codes(x, scale, spec), scale)
    low = _reduce(x, granularity, group, torch.amin)
    high = _reduce(x, granularity, group, torch.amax)
    scale = _divided((high - low).clamp_min(SCALE_FLOOR), spec.max_code)
    zero = torch.round(-low / scale).clamp(0, spec.max_code)
    codes = torch.round(x / scale + zero).clamp(0, spec.max_code)
    return Encoded(codes.to(torch.int16), scale, zero)


def encode_causal(a: torch.Tensor, b: torch.Tensor, spec: StreamSpec) -> tuple[Encoded, Encoded]:
    """Return (a, b) encoded in scope `causal`: a (..., N, D), b (..., M, D), D the key positions.

    b is quantised per position (one scale for its M values there); the scale is folded into a, whose rows are then
    quantised without the floor (an all-zero row has zero codes). b's codes carry scale 1.
    """
    per_position = encode(b.transpose(-1, -2), spec, "per_row")
    folded = a * per_position.scale.transpose(-1, -2)
    scale = _divided(folded.abs().amax(-1, keepdim=True), spec.max_code)
    codes = _signed_codes(folded, torch.where(scale > 0, scale, 1.0), spec)
    ones = torch.ones_like(b[..., :1])
    return Encoded(codes, scale), Encoded(per_position.codes.transpose(-1, -2), ones)


def _signed_codes(x: torch.Tensor, scale: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    return torch.round(x / scale).clamp(-spec.max_code, spec.max_code).to(torch.int16)


def _divided(x: torch.Tensor, divisor: int) -> torch.Tensor:
    """Return x / divisor by IEEE division. On a GPU torch divides by a number as a product with its reciprocal."""
    return x / torch.full_like(x, divisor)


def _reduce(x: torch.Tensor, granularity: str, group: int, reduction: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the reduction of x (..., rows, D) over each scope, broadcastable against x."""
    if granularity == "per_tensor":
        return reduction(x).reshape((1,) * x.ndim)
    if granularity == "per_head":
        return reduction(x, dim=(-2, -1), keepdim=True)
    per_row = reduction(x, dim=-1, keepdim=True)
    if group == 1:
        return per_row
    rows = per_row.unflatten(-2, (-1, group))
    return reduction(rows, dim=-2, keepdim=True).expand_as(rows).flatten(-3, -2)
