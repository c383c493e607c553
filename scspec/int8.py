"""Weights as int8 codes with a scale per 128 inputs: the codes that an SC linear makes of them, so nothing is lost.

Scales are bfloat16: then code * scale and 127 * scale / 127 are exact in float32, and `sc.encoding.encode` with 8 bits
gives the codes back. In float16 too; in bfloat16, which rounds the products, a code can come out one off.
"""

import torch
from torch.nn import functional

from scspec.sc.encoding import SCALE_FLOOR

CHUNK, MAX_CODE = 128, 127


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes int8 (M, D), scales bfloat16 (M, ceil(D / 128))) of weight (M, D) float32.

    A chunk whose largest magnitude is under the floor of SC's scales, which would decide its codes, becomes zero.
    """
    padded = functional.pad(weight, (0, -weight.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    peak = padded.abs().amax(-1, keepdim=True)
    scales = (peak.clamp_min(2 * SCALE_FLOOR) / MAX_CODE).to(torch.bfloat16)
    codes = torch.round(padded / scales.float()).clamp(-MAX_CODE, MAX_CODE) * (peak >= 2 * SCALE_FLOOR)
    return codes.to(torch.int8).flatten(1)[:, : weight.shape[1]].contiguous(), scales[..., 0].contiguous()


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight float32 (M, D) of int8 codes (M, D) and their scales (M, ceil(D / 128))."""
    return codes.float() * scales.float().repeat_interleave(CHUNK, dim=1)[:, : codes.shape[1]]


def to_int8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a file of a model holds: of each matrix `name` the codes, and `name:scales`; the rest in float32."""
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            stored[name], stored[f"{name}:scales"] = quantised(tensor.detach().float().cpu())
        else:
            stored[name] = tensor.detach().float().cpu()
    return stored


def from_int8(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's float32 state from what a file holds (`to_int8`)."""
    return {
        name: dequantised(tensor, stored[f"{name}:scales"]) if tensor.dtype == torch.int8 else tensor
        for name, tensor in stored.items()
        if not name.endswith(":scales")
    }
