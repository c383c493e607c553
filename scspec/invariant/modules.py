"""Modules that replace a model's leaves: norm, activation, rotary tables."""

import numpy as np
import torch
from torch import nn

from scspec.invariant import cpu


class InvariantRMSNorm(nn.Module):
    """RMSNorm whose rows do not depend on their neighbours. x float32 (..., D) -> (..., D)."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = np.float32(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(cpu.rms_norm(rows, self.weight.numpy(), self.eps)).view(x.shape)


class InvariantSiLU(nn.Module):
    """SiLU in one loop: no difference between vector bodies and scalar tails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(cpu.silu(x.reshape(-1).numpy())).view(x.shape)


class InvariantRotary(nn.Module):
    """Rotary embedding (Su et al. 2021) from a table indexed by position; an entry depends on its position alone."""

    def __init__(self, inv_freq: torch.Tensor, attention_scaling: float):
        super().__init__()
        self.inv_freq = nn.Buffer(inv_freq.detach().float().clone(), persistent=False)
        self.attention_scaling = np.float32(attention_scaling)
        self._cos = self._sin = torch.empty(0, 2 * inv_freq.numel())

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) float32 (B, T, head_dim) of position_ids int64 (B, T)."""
        self._extend(int(position_ids.max()) + 1)
        return self._cos[position_ids], self._sin[position_ids]

    def _extend(self, positions: int) -> None:
        held = self._cos.shape[0]
        if positions <= held:
            return
        last = max(positions, 2 * held, 256)
        cos, sin = cpu.rotary_table(self.inv_freq.numpy(), self.attention_scaling, held, last)
        self._cos = torch.cat((self._cos, torch.from_numpy(cos)))
        self._sin = torch.cat((self._sin, torch.from_numpy(sin)))
