"""Modules that replace a model's leaves: norm, activation, rotary tables. Each runs where its input is.

On the CPU float32; on a GPU float32, float16 or bfloat16. Triton is loaded when the first GPU tensor arrives.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from scspec.invariant import cpu


class InvariantRMSNorm(nn.Module):
    """RMSNorm whose rows do not depend on their neighbours. x (..., D) -> (..., D)."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = np.float32(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda:
            out: torch.Tensor = _gpu().rms_norm(rows, self.weight, float(self.eps))
            return out.view(x.shape)
        return torch.from_numpy(cpu.rms_norm(rows.numpy(), self.weight.numpy(), self.eps)).view(x.shape)


class InvariantSiLU(nn.Module):
    """SiLU in one loop: no difference between vector bodies and scalar tails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            out: torch.Tensor = _gpu().silu(x.reshape(-1, x.shape[-1]))
            return out.view(x.shape)
        return torch.from_numpy(cpu.silu(x.reshape(-1).numpy())).view(x.shape)


class InvariantRotary(nn.Module):
    """Rotary embedding (Su et al. 2021) from a table indexed by position; an entry depends on its position alone.

    positions: how many the table holds on a GPU, where growing it would wait for the device. On the CPU it grows.
    """

    def __init__(self, inv_freq: torch.Tensor, attention_scaling: float, positions: int = 0):
        super().__init__()
        self.inv_freq = inv_freq.detach().float().cpu().numpy()  # no buffer: .to(float16) would round it
        self.attention_scaling = np.float32(attention_scaling)
        self.positions = positions
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}  # equally long, one for each device

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) in x's dtype, on its device, (B, T, head_dim) of position_ids int64 (B, T).

        Raises ValueError on a GPU if the number of positions is not known.
        """
        if x.is_cuda and not self.positions:
            raise ValueError("positions: a rotary table on a GPU needs its size when it is made")
        cos, sin = self.table(self.positions if x.is_cuda else int(position_ids.max()) + 1, x.device)
        return cos[position_ids].to(x.dtype), sin[position_ids].to(x.dtype)

    def table(self, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) float32 (at least `positions`, head_dim) on the device; once there, no copy is made."""
        empty = torch.empty(0, 2 * len(self.inv_freq))
        tables = next(iter(self._tables.values()), (empty, empty))
        held = tables[0].shape[0]
        if positions > held:
            new = cpu.rotary_table(self.inv_freq, self.attention_scaling, held, max(positions, 2 * held, 256))
            cos, sin = (torch.cat((old.cpu(), torch.from_numpy(rows))) for old, rows in zip(tables, new, strict=True))
            tables, self._tables = (cos, sin), {}
        if device not in self._tables:
            self._tables[device] = tables[0].to(device), tables[1].to(device)
        return self._tables[device]


def _gpu() -> Any:
    """Return the GPU's kernels."""
    from scspec.invariant import triton

    return triton
