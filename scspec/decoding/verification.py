"""What a batch proposes and accepts: `Greedy` by token ids on the device, `Sampled` by distributions on the host.

An object of either class decides one block of every active slot: `propose` once for each proposal, `verify` once, and
`add_bonus` where a slot accepted all of them. A slot's verdict depends on its own rows of logits alone.

Greedy is the one-hot case of Sampled without its arrays (V,): the lowest id of the largest logit wins, found by a
maximum, a comparison and a minimum, which have one result in whatever order a device takes them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import sampling
from .sampling import COIN, RESIDUAL, TOKEN, Draws, SamplingConfig, accept, draw, residual, warp


@dataclass
class Verdict:
    """What became of one slot's proposals, before EOS cuts anything.

    `p` and `q` are what `beta` compares, ids or distributions, position by position: q is one shorter until the bonus
    position's is added. `margin` has one entry for each p.
    """

    proposed: list[int]
    accepted: int
    emitted: list[int]
    p: list[Any]
    q: list[Any]
    margin: list[float]


class Greedy:
    """Everything stays on the device until `verify` fetches one small array for the whole batch.

    `places` maps each active slot to the position of its next token and its draws (not used here).
    """

    def __init__(self, places: Mapping[int, tuple[int, Draws]], config: SamplingConfig):
        self.slots = list(places)
        self.ids: list[torch.Tensor] = []
        self.peaks: list[torch.Tensor] = []
        self.verdicts: dict[int, Verdict] = {}

    def propose(self, logits: torch.Tensor) -> torch.Tensor:
        """The proposals int64 (B, 1) of the draft's logits (B, V), on their device."""
        ids, peaks = largest(logits)
        self.ids.append(ids)
        self.peaks.append(peaks)
        return ids[:, None]

    def verify(self, logits: torch.Tensor) -> dict[int, Verdict]:
        """Each active slot's verdict on the target's logits (B, gamma + 1, V). Raises ValueError as `warp` does."""
        ids, peaks = largest(logits)
        others = logits.scatter(-1, ids[..., None], -torch.inf).amax(-1)
        proposals = [_columns(self.ids, len(logits)), _columns(self.peaks, len(logits))]
        columns = _fetch([*proposals, ids, peaks, others], logits.device)
        self.verdicts = {slot: _greedy_verdict(*(column[slot] for column in columns)) for slot in self.slots}
        return self.verdicts

    def add_bonus(self, logits: torch.Tensor, slots: Iterable[int]) -> None:
        """Add the draft's choice at the bonus position to the verdicts of `slots`; its logits are (B, V)."""
        ids, peaks = _fetch([column[:, None] for column in largest(logits)], logits.device)
        for slot in slots:
            _check_finite(ids[slot], peaks[slot])
            self.verdicts[slot].q.append(int(ids[slot, 0]))

    @staticmethod
    def beta(p: int, q: int) -> float:
        """1 - TV of the two one-hot distributions."""
        return float(p == q)


class Sampled:
    """Distributions and draws on the host, one transfer for each forward. `places` as in `Greedy`."""

    def __init__(self, places: Mapping[int, tuple[int, Draws]], config: SamplingConfig):
        self.places, self.config = places, config
        self.verdicts = {slot: Verdict([], 0, [], [], [], []) for slot in places}

    def propose(self, logits: torch.Tensor) -> torch.Tensor:
        """The proposals int64 (B, 1) drawn from the draft's logits (B, V), on their device."""
        rows, ids = logits.cpu().numpy(), np.zeros((len(logits), 1), np.int64)
        for slot, (start, draws) in self.places.items():
            verdict = self.verdicts[slot]
            verdict.q.append(warp(rows[slot], self.config))
            ids[slot] = draw(verdict.q[-1], draws.uniform(start + len(verdict.proposed), TOKEN))
            verdict.proposed.append(int(ids[slot, 0]))
        return torch.from_numpy(ids).to(logits.device)

    def verify(self, logits: torch.Tensor) -> dict[int, Verdict]:
        """Each active slot's verdict on the target's logits (B, gamma + 1, V)."""
        rows = logits.cpu().numpy()
        for slot, (start, draws) in self.places.items():
            verdict = self.verdicts[slot]
            verdict.p = [warp(row, self.config) for row in rows[slot]]
            verdict.margin = [sampling.margin(row) for row in rows[slot]]
            verdict.accepted, verdict.emitted = verify(verdict.proposed, verdict.p, verdict.q, start, draws)
        return self.verdicts

    def add_bonus(self, logits: torch.Tensor, slots: Iterable[int]) -> None:
        """Add the draft's distribution at the bonus position to the verdicts of `slots`; its logits are (B, V)."""
        rows = logits.cpu().numpy()
        for slot in slots:
            self.verdicts[slot].q.append(warp(rows[slot], self.config))

    @staticmethod
    def beta(p: np.ndarray, q: np.ndarray) -> float:
        """1 - TV(p, q)."""
        return sampling.beta(p, q)


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest id of the largest of each row's logits (..., V), int64 (...), and that logit.

    A row with NaN gives some valid id, and NaN: so a device can go on, and whoever fetches the logit sees it.
    """
    size = logits.shape[-1]
    peaks = logits.amax(-1)
    ids = torch.arange(size, dtype=torch.int32, device=logits.device)
    ids = torch.where(logits == peaks[..., None], ids, size).amin(-1)
    return ids.clamp(max=size - 1).long(), peaks


def greedy_ids(logits: torch.Tensor) -> list[int]:
    """The greedy choice of each row of logits (rows, V), fetched in one transfer. Raises ValueError as `warp` does."""
    ids, peaks = _fetch([column[:, None] for column in largest(logits)], logits.device)
    _check_finite(ids[:, 0], peaks[:, 0])
    choices: list[int] = ids[:, 0].astype(int).tolist()
    return choices


def verify(
    proposed: list[int], p: list[np.ndarray], q: list[np.ndarray], start: int, draws: Draws
) -> tuple[int, list[int]]:
    """How many leading proposals are accepted, and the tokens emitted: those and a correction or a bonus.

    `p` has gamma + 1 distributions (V,), `q` gamma; `start` is the position of the first proposal.
    """
    for i, token in enumerate(proposed):
        if not accept(p[i][token], q[i][token], draws.uniform(start + i, COIN)):
            correction = draw(residual(p[i], q[i]), draws.uniform(start + i, RESIDUAL))
            return i, [*proposed[:i], correction]
    bonus = draw(p[-1], draws.uniform(start + len(proposed), TOKEN))
    return len(proposed), [*proposed, bonus]


def _columns(tensors: list[torch.Tensor], rows: int) -> torch.Tensor:
    """The tensors (rows,) side by side, (rows, number of tensors), which may be none."""
    return torch.stack(tensors, 1) if tensors else torch.empty(rows, 0)


def _fetch(columns: list[torch.Tensor], device: torch.device) -> list[np.ndarray]:
    """The tensors (B, k) as float64 arrays, in one transfer from `device`; float64 holds ids and float32 exactly."""
    together = torch.cat([column.to(device, torch.float64) for column in columns], 1).cpu().numpy()
    return np.split(together, np.cumsum([column.shape[1] for column in columns[:-1]]), axis=1)


def _greedy_verdict(
    draft_ids: np.ndarray, draft_peaks: np.ndarray, target_ids: np.ndarray, target_peaks: np.ndarray, others: np.ndarray
) -> Verdict:
    """The verdict of one slot, from float64 arrays (gamma,), (gamma,) and three of (gamma + 1,)."""
    _check_finite(draft_ids, draft_peaks)
    _check_finite(target_ids, target_peaks)
    proposed, choices = (ids.astype(int).tolist() for ids in (draft_ids, target_ids))
    pairs = zip(proposed, choices, strict=False)
    accepted = next((i for i, (token, choice) in enumerate(pairs) if token != choice), len(proposed))
    emitted = [*proposed[:accepted], choices[accepted]]
    return Verdict(proposed, accepted, emitted, choices, [*proposed], (target_peaks - others).tolist())


def _check_finite(ids: np.ndarray, peaks: np.ndarray) -> None:
    for token, peak in zip(ids, peaks, strict=True):
        if not np.isfinite(peak):
            raise ValueError(f"logits_row[{int(token)}], its largest, is {peak}; allowed: finite or -inf")
