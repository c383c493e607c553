"""`SCLinear`: a linear layer in stochastic computing, its weight quantised and packed once."""

from dataclasses import dataclass

import torch
from torch import nn

from scspec.invariant import cpu as invariant
from scspec.sc import cpu
from scspec.sc.encoding import Encoded, encode
from scspec.sc.knobs import stream_spec
from scspec.sc.matmul import chunk_slices, finish, resolve_backend, scaled_sums
from scspec.sc.streams import StreamSpec


class SCLinear(nn.Module):
    """Replaces one nn.Linear. x float32 (..., D) -> float32 (..., M).

    Reads the attributes of `knobs` (names: `sc.knobs`) at every call; `switch` names the one that turns SC on
    ("use_sc_linear", "sc_lm_head"). Off, it is a float layer: batch invariant, or torch's own with `batch_invariant`
    off. What a knob asks of the weight (codes, or blocks of floats) is prepared at first use and kept until the knob
    changes; `sc_stoc_len` and `sc_seed` change nothing in it. After `drop_float_weight` such a change is a ValueError.
    """

    def __init__(self, linear: nn.Linear, knobs, switch: str):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight = linear.weight
        self.bias = linear.bias
        self.knobs, self.switch = knobs, switch
        self.form, self._prepared = None, None
        self.shared = SharedInput([self])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.wanted_form() != self.form:
            self.shared.prepare()
        out = self.shared.packed_rows(self, x) if _is_packed(self.form) else self._rows(x)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def drop_float_weight(self) -> None:
        """Prepare what the present knobs need, then let go of the floating-point weight."""
        if self.wanted_form() != self.form:
            self.shared.prepare()
        if self.form != ("float", "plain"):
            self.weight = None

    def wanted_form(self) -> tuple:
        """Return what the present knobs ask of the weight."""
        knobs = self.knobs
        if getattr(knobs, self.switch):
            return ("sc", knobs.sc_mode, knobs.sc_prec, knobs.sc_linear_granularity, knobs.sc_linear_chunk_d)
        return ("float", "invariant" if knobs.batch_invariant else "plain")

    def prepare(self, form: tuple) -> list[Encoded] | None:
        """Take on `form`; return the weight's codes, one Encoded a chunk, if `form` is one that SharedInput packs."""
        if self.weight is None:
            raise ValueError(
                f"{self.switch}, sc_mode, sc_prec, sc_linear_granularity or sc_linear_chunk_d: changed from "
                f"{self.form} to {form}, which needs the floating-point weights, and these were dropped"
            )
        weight = self.weight.detach().float()
        self.form, self._prepared = form, None
        if form == ("float", "invariant"):
            self._prepared = invariant.pack_linear(weight.numpy())
        elif form[0] == "sc":
            spec = stream_spec(self.knobs)
            codes = [encode(weight[:, s], spec, form[3]) for s in chunk_slices(self.in_features, form[4])]
            if _is_packed(form):
                return codes
            self._prepared = codes
        return None

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.form == ("float", "plain"):
            return nn.functional.linear(rows, self.weight)
        if self.form[0] == "float":
            return torch.from_numpy(invariant.linear(rows.contiguous().numpy(), self._prepared, self.out_features))
        spec, backend, total = stream_spec(self.knobs), resolve_backend(None, rows.device), None
        slices = chunk_slices(self.in_features, self.knobs.sc_linear_chunk_d)
        for columns, chunk in zip(slices, self._prepared, strict=True):
            encoded = encode(rows[:, columns], spec, self.knobs.sc_linear_granularity)
            part = scaled_sums(encoded, chunk, spec, backend)
            total = part if total is None else total + part
        return finish(total, spec)


def _is_packed(form: tuple) -> bool:
    """Return whether the look-up kernel covers `form`: bipolar with a scale per row."""
    return form[0] == "sc" and form[1] == "bipolar" and form[3] == "per_row"


@dataclass(frozen=True)
class _Products:
    """What is still to be handed out of one multiplication."""

    x: torch.Tensor
    spec: StreamSpec
    waiting: dict[SCLinear, torch.Tensor]

    def holds(self, member: SCLinear, x: torch.Tensor, spec: StreamSpec) -> bool:
        return self.x is x and self.spec == spec and member in self.waiting


class SharedInput:
    """SCLinears that read the same tensor (q, k and v; gate and up): their packed weight, columns side by side.

    The first of them to be called on a tensor encodes it, builds its tables and multiplies for all; the others are
    handed their columns. So the tensor must not be written to in between. One seen anew is multiplied anew.
    """

    def __init__(self, members: list[SCLinear]):
        self.members = members
        self.packed: cpu.PackedWeight | None = None
        self._products: _Products | None = None

    @classmethod
    def join(cls, members: list[SCLinear]) -> None:
        """Let `members`, of one knobs object, switch and input width, work together from now on."""
        shared = cls(members)
        for member in members:
            member.shared = shared

    def prepare(self) -> None:
        """Bring all members into the form that the knobs ask for."""
        form = self.members[0].wanted_form()
        codes = [member.prepare(form) for member in self.members]
        self.packed = self._products = None
        if _is_packed(form):
            side_by_side = [_stack(chunks) for chunks in zip(*codes, strict=True)]
            self.packed = cpu.pack(side_by_side, form[4] or self.members[0].in_features)

    def packed_rows(self, member: SCLinear, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., D) @ member.weight.T, float32 (rows, M)."""
        spec, products = stream_spec(member.knobs), self._products
        if products is None or not products.holds(member, x, spec):
            products = self._products = self._multiply(x, spec)
        out = products.waiting.pop(member)
        if not products.waiting:
            self._products = None
        return out

    def _multiply(self, x: torch.Tensor, spec: StreamSpec) -> _Products:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        parts = cpu.linear(rows, self.packed, spec).split([m.out_features for m in self.members], dim=1)
        return _Products(x, spec, dict(zip(self.members, parts, strict=True)))


def _stack(chunks: tuple[Encoded, ...]) -> Encoded:
    """Return one chunk's codes and scales of several weights as those of one weight with all their rows."""
    return Encoded(torch.cat([chunk.codes for chunk in chunks]), torch.cat([chunk.scale for chunk in chunks]))
