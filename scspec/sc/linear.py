"""`SCLinear`: a linear layer in stochastic computing, its weight quantised and packed once."""

import torch
from torch import nn

from scspec.invariant import cpu as invariant
from scspec.sc import cpu
from scspec.sc.encoding import encode
from scspec.sc.matmul import chunk_slices, finish, resolve_backend, scaled_sums
from scspec.sc.streams import StreamSpec, resolve_streams


def stream_spec(knobs) -> StreamSpec:
    """Return the streams that the knobs (as attributes, see `patching`) ask for."""
    return resolve_streams(knobs.sc_mode, knobs.sc_prec, knobs.sc_stoc_len, None, knobs.sc_halve_bipolar, knobs.sc_seed)


class SCLinear(nn.Module):
    """Replaces one nn.Linear. x float32 (..., D) -> float32 (..., M).

    Reads its knobs from the attributes of `knobs` at every call; `switch` names the knob that turns SC on
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
        self._form, self._prepared = None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = self._wanted_form()
        if form != self._form:
            self._prepare(form)
        rows = x.reshape(-1, self.in_features)
        out = self._forward_rows(rows.contiguous()).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def drop_float_weight(self) -> None:
        """Prepare what the present knobs need, then let go of the floating-point weight."""
        self._prepare(self._wanted_form())
        if self._form != ("float", "plain"):
            self.weight = None

    def _wanted_form(self) -> tuple:
        knobs = self.knobs
        if getattr(knobs, self.switch):
            return ("sc", knobs.sc_mode, knobs.sc_prec, knobs.sc_linear_granularity, knobs.sc_linear_chunk_d)
        return ("float", "invariant" if knobs.batch_invariant else "plain")

    def _prepare(self, form: tuple) -> None:
        if self.weight is None:
            raise ValueError(
                f"{self.switch}, sc_mode, sc_prec, sc_linear_granularity or sc_linear_chunk_d: changed from "
                f"{self._form} to {form}, which needs the floating-point weights, and these were dropped"
            )
        weight = self.weight.detach().float()
        if form == ("float", "plain"):
            prepared = None
        elif form[0] == "float":
            prepared = invariant.pack_linear(weight.numpy())
        else:
            prepared = self._encode(weight, form)
        self._form, self._prepared = form, prepared

    def _encode(self, weight: torch.Tensor, form: tuple):
        spec = stream_spec(self.knobs)
        chunks = [encode(weight[:, s], spec, form[3]) for s in chunk_slices(self.in_features, form[4])]
        return cpu.pack(chunks, form[4] or self.in_features) if _has_fast_path(form) else chunks

    def _forward_rows(self, rows: torch.Tensor) -> torch.Tensor:
        if self._form == ("float", "plain"):
            return nn.functional.linear(rows, self.weight)
        if self._form[0] == "float":
            return torch.from_numpy(invariant.linear(rows.numpy(), self._prepared, self.out_features))
        spec = stream_spec(self.knobs)
        if _has_fast_path(self._form):
            return cpu.linear(rows, self._prepared, spec)
        return self._generic(rows, spec)

    def _generic(self, rows: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
        backend, total = resolve_backend(None, rows.device), None
        slices = chunk_slices(self.in_features, self.knobs.sc_linear_chunk_d)
        for columns, chunk in zip(slices, self._prepared, strict=True):
            encoded = encode(rows[:, columns], spec, self.knobs.sc_linear_granularity)
            part = scaled_sums(encoded, chunk, spec, backend)
            total = part if total is None else total + part
        return finish(total, spec)


def _has_fast_path(form: tuple) -> bool:
    return form[1] == "bipolar" and form[3] == "per_row"
