"""Backend `reference`: slow and obvious, torch, any device. One cycle of the gate at a time, no tables."""

import torch

from scspec.sc.streams import StreamSpec, boundaries, stream_levels

NAME = "reference"


def counts(a_codes: torch.Tensor, b_codes: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    """Return sum over d of sign_a sign_b count: codes (N, D), (M, D) int16 -> int32 (N, M).

    The gate is an enable-signal multiplier: b's stream advances only where a's stream has a one, so with
    K = #{t < L : ra[d, t] < Ba} the count is #{t < K : rb[d, t] < Bb}.
    """
    device = a_codes.device
    dims = torch.arange(a_codes.shape[1], device=device) % spec.base
    levels_a, levels_b = (torch.tensor(stream_levels(op, spec), device=device)[dims] for op in "ab")
    bounds = torch.tensor(boundaries(spec), device=device)
    bound_a, bound_b = bounds[a_codes.abs().long()], bounds[b_codes.abs().long()]
    ones = sum((levels_a[:, t] < bound_a).long() for t in range(spec.stoc_len))
    total = torch.zeros(a_codes.shape[0], b_codes.shape[0], dtype=torch.float64, device=device)
    for t in range(spec.stoc_len):
        enabled = (t < ones) * a_codes.sign()
        hit = (levels_b[:, t] < bound_b) * b_codes.sign()
        total += enabled.double() @ hit.double().T  # integers below 2**53: exact in any order
    return total.to(torch.int32)
