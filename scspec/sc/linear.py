"""`SCLinear`: a linear layer in stochastic computing, its weight quantised and packed once."""

from dataclasses import dataclass

import torch
from torch import nn

from scspec.invariant import cpu as invariant
from scspec.sc.device import CHUNK
from scspec.sc.encoding import Encoded, encode
from scspec.sc.knobs import stream_spec
from scspec.sc.matmul import GPU_BACKENDS, backend_module, chunk_slices, finish, scaled_sums
from scspec.sc.streams import StreamSpec

PLAIN, INVARIANT = ("float", "plain"), ("float", "invariant")


class SCLinear(nn.Module):
    """Replaces one nn.Linear. x (..., D) -> (..., M) in x's dtype, float32 for the LM head.

    Reads the attributes of `knobs` (names: `sc.knobs`, and `backend`) at every call; `switch` names the one that turns
    SC on ("use_sc_linear", "sc_lm_head"). Off, it is a float layer: batch invariant, or torch's own with
    `batch_invariant` off. What a knob asks of the weight (codes, or blocks of floats) is prepared at first use and
    kept until the knob changes; `sc_stoc_len` and `sc_seed` change nothing in it. After `drop_float_weight` such a
    change is a ValueError.
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
        self.shared.bring_up_to_date()
        out = self.shared.rows_of(self, x) if self.shared.is_joined else self._rows(x)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def drop_float_weight(self) -> None:
        """Prepare what the present knobs need, then let go of the floating-point weight if it is not that itself."""
        self.shared.bring_up_to_date()
        if self.form[0] == "sc" or (self.form == INVARIANT and self.knobs.backend not in GPU_BACKENDS):
            self.weight = None

    def wanted_form(self) -> tuple:
        """Return what the present knobs ask of the weight."""
        knobs = self.knobs
        if getattr(knobs, self.switch):
            return ("sc", knobs.sc_mode, knobs.sc_prec, knobs.sc_linear_granularity, knobs.sc_linear_chunk_d)
        return INVARIANT if knobs.batch_invariant else PLAIN

    def prepare(self, form: tuple) -> None:
        """Make ready for `form` what this layer does alone; SharedInput packs what members do together, and sets it."""
        if self.weight is None:
            raise ValueError(
                f"{self.switch}, sc_mode, sc_prec, sc_linear_granularity or sc_linear_chunk_d: changed from "
                f"{self.form} to {form}, which needs the floating-point weights, and these were dropped"
            )
        self.form = self._prepared = None
        if form == INVARIANT and self.knobs.backend not in GPU_BACKENDS:
            self._prepared = invariant.pack_linear(self.weight.detach().float().numpy())
        elif form[0] == "sc" and not is_packed(form, self.knobs.backend):
            self._prepared = [self.encoded(columns, form[3]) for columns in chunk_slices(self.in_features, form[4])]

    def encoded(self, columns: slice, granularity: str) -> Encoded:
        """Return these columns of the weight as codes. Chunk by chunk, there is never a float32 copy of all of it."""
        return encode(self.weight.detach()[:, columns].float(), stream_spec(self.knobs), granularity)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.form == PLAIN:
            return nn.functional.linear(rows, self.weight).to(self.shared.out_dtype(x))
        if self.form == INVARIANT:
            return torch.from_numpy(invariant.linear(rows.contiguous().numpy(), self._prepared, self.out_features))
        spec, total = stream_spec(self.knobs), None
        slices = chunk_slices(self.in_features, self.knobs.sc_linear_chunk_d)
        for columns, chunk in zip(slices, self._prepared, strict=True):
            encoded = encode(rows[:, columns].float(), spec, self.knobs.sc_linear_granularity)
            part = scaled_sums(encoded, chunk, spec, self.knobs.backend)
            total = part if total is None else total + part
        return finish(total, spec).to(self.shared.out_dtype(x))


def is_packed(form: tuple, backend: str) -> bool:
    """Return whether the look-up kernels of `backend` cover `form`: bipolar, per_row; on a GPU chunks of 128."""
    if form[0] != "sc" or form[1] != "bipolar" or form[3] != "per_row":
        return False
    return form[4] == CHUNK if backend in GPU_BACKENDS else True


@dataclass(frozen=True)
class _Products:
    """What is still to be handed out of one multiplication."""

    x: torch.Tensor
    spec: StreamSpec
    waiting: dict[SCLinear, torch.Tensor]

    def holds(self, member: SCLinear, x: torch.Tensor, spec: StreamSpec) -> bool:
        return self.x is x and self.spec == spec and member in self.waiting


class SharedInput:
    """SCLinears that read the same tensor (q, k and v; gate and up): one weight, their outputs side by side.

    The first of them to be called on a tensor multiplies for all; the others are handed their columns. So the tensor
    must not be written to in between. One seen anew is multiplied anew.

    weight: the backend's packed weight in SC; on a GPU, in batch-invariant floating point, the joined matrix, of which
    each member's weight is then a part. None in every other form: there each member works alone.
    """

    prepared = 0  #: how many times any group took on a form: what was captured before may read memory that is gone

    def __init__(self, members: list[SCLinear]):
        self.members = members
        self.weight = None
        self._products: _Products | None = None

    @classmethod
    def join(cls, members: list[SCLinear]) -> None:
        """Let `members`, of one knobs object, switch and input width, work together from now on."""
        shared = cls(members)
        for member in members:
            member.shared = shared

    @property
    def is_joined(self) -> bool:
        """Whether the members are multiplied together."""
        return self.weight is not None

    @property
    def bias(self) -> torch.Tensor | None:
        """The members' biases side by side, None if they have none."""
        biases = [member.bias for member in self.members]
        return None if biases[0] is None else torch.cat(biases)

    def out_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype of the products of x: logits stay float32."""
        return torch.float32 if self.members[0].switch == "sc_lm_head" else x.dtype

    @property
    def will_join(self) -> bool:
        """Whether the present knobs let the members be multiplied together."""
        form, backend = self.members[0].wanted_form(), self.members[0].knobs.backend
        return is_packed(form, backend) or (form == INVARIANT and backend in GPU_BACKENDS)

    def bring_up_to_date(self) -> None:
        """Bring all members into the form that the present knobs ask for, if they are in another."""
        first = self.members[0]
        form, backend = first.wanted_form(), first.knobs.backend
        if form == first.form:
            return
        SharedInput.prepared += 1
        for member in self.members:
            member.prepare(form)
        self.weight = self._products = None
        if is_packed(form, backend):
            chunks = [self._encoded(columns, form[3]) for columns in chunk_slices(first.in_features, form[4])]
            self.weight = backend_module(backend).pack(chunks, form[4] or first.in_features)
        elif form == INVARIANT and backend in GPU_BACKENDS:
            self.weight = self._joined_floats()
        for member in self.members:  # last: a failure on the way leaves no form, so the next call prepares again
            member.form = form

    def settle(self, device: torch.device, dtype: torch.dtype, keep_float_weights: bool) -> None:
        """Move to `device` as `dtype` and, unless they are kept, prepare there and let go of the float weights."""
        for member in self.members:
            member.to(device, dtype)
        for member in self.members if not keep_float_weights else ():
            member.drop_float_weight()

    def _encoded(self, columns: slice, granularity: str) -> Encoded:
        """Return these columns of the members' weights as those of one weight with all their rows."""
        parts = [member.encoded(columns, granularity) for member in self.members]
        return Encoded(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))

    def _joined_floats(self) -> torch.Tensor:
        if len(self.members) == 1:
            return self.members[0].weight.detach()
        joined = torch.cat([member.weight.detach() for member in self.members])
        parts = joined.split([member.out_features for member in self.members])
        for member, part in zip(self.members, parts, strict=True):
            member.weight = nn.Parameter(part, requires_grad=False)
        return joined

    def rows_of(self, member: SCLinear, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., D) @ member.weight.T, (rows, M)."""
        spec, products = stream_spec(member.knobs), self._products
        if products is None or not products.holds(member, x, spec):
            products = self._products = self._multiply(x, spec)
        out = products.waiting.pop(member)
        if not products.waiting:
            self._products = None
        return out

    def _multiply(self, x: torch.Tensor, spec: StreamSpec) -> _Products:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        backend = self.members[0].knobs.backend
        options = {"out_dtype": self.out_dtype(x)} if backend in GPU_BACKENDS else {}
        product = backend_module(backend).linear(rows, self.weight, spec, **options)
        parts = product.split([m.out_features for m in self.members], dim=1)
        return _Products(x, spec, dict(zip(self.members, parts, strict=True)))
