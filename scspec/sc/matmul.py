"""`sc_matmul`: checks, encoding, dispatch to a backend, rescaling. The one place where codes become floats again."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from scspec.sc.encoding import Encoded, encode, encode_causal
from scspec.sc.streams import GRANULARITIES, StreamSpec, resolve_streams

#: Backend name -> module; a module is imported when its backend is first asked for.
BACKENDS = {
    "reference": "scspec.sc.reference",
    "cpu": "scspec.sc.cpu",
    "triton": "scspec.sc.triton",
    "cuda": "scspec.sc.cuda",
}
#: The backends of a GPU. `cuda` is `triton` with the counts of linear layers and of attention in CUDA C++.
GPU_BACKENDS = ("triton", "cuda")
#: What `backend=None` means on each device type. A device not listed has no default: nothing falls back.
DEFAULT_BACKEND = {"cpu": "cpu", "cuda": "cuda"}


def sc_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    granularity: str = "per_row",
    *,
    mode: str = "bipolar",
    sc_prec: int = 8,
    stoc_len: int | None = None,
    chunk_d: int = 0,
    group_a: int = 1,
    group_b: int = 1,
    rng_levels: int | None = None,
    halve_bipolar_stoc_len: bool = False,
    smooth_scales: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Return a @ b.T as stochastic computing gives it, float32 (N, M) or (H, N, M).

    a: float32 (N, D) or (H, N, D).  b: float32 (M, D) or (H, M, D), on the same device.
    granularity: scope of a quantisation scale: "per_row" (per `group_a`, `group_b` rows), "per_tensor",
        "per_head" (3-D, bipolar), "causal" (bipolar; b's scale per column, folded into a; for softmax @ V).
    mode: "bipolar" or "unipolar".  sc_prec: bits, 2..8.  stoc_len: cycles, 1..2**sc_prec.
    chunk_d: > 0 splits D (2-D, per_row or per_tensor) into blocks with scales and streams of their own.
    rng_levels: levels of the random grid, a power of two in 2..2**sc_prec.
    halve_bipolar_stoc_len: bipolar defaults of stoc_len and rng_levels become 2**(sc_prec - 1).
    smooth_scales: float32 (D,), SmoothQuant: (a / v) @ (b * v).T (Xiao et al. 2023, Eq. 3).
    backend: "reference", "cpu", "triton", "cuda", or None for the default of the tensors' device.

    Raises ValueError naming the argument, its value and what is allowed.
    """
    spec = resolve_streams(mode, sc_prec, stoc_len, rng_levels, halve_bipolar_stoc_len)
    _check_operands(a, b)
    _check_scope(a, granularity, mode, chunk_d, group_a, group_b, b)
    backend = resolve_backend(backend, a.device)
    _check_finite(a, b)
    if smooth_scales is not None:
        _check_smooth_scales(smooth_scales, a)
        a, b = a / smooth_scales, b * smooth_scales
    total: torch.Tensor | None = None
    for columns in chunk_slices(a.shape[-1], chunk_d):
        if granularity == "causal":
            pair = encode_causal(a[..., columns], b[..., columns], spec)
        else:
            pair = (
                encode(a[..., columns], spec, granularity, group_a),
                encode(b[..., columns], spec, granularity, group_b),
            )
        part = scaled_sums(*pair, spec, backend)
        total = part if total is None else total + part
    assert total is not None  # D is at least 1
    return finish(total, spec)


def chunk_slices(depth: int, chunk_d: int) -> list[slice]:
    """Return the slices of a D axis of `depth` that are encoded on their own; chunk_d = 0 means one."""
    step = chunk_d or depth
    return [slice(start, min(start + step, depth)) for start in range(0, depth, step)]


def scaled_sums(a: Encoded, b: Encoded, spec: StreamSpec, backend: str) -> torch.Tensor:
    """Return one chunk's a @ b.T before the common factor of `finish`, float32 (..., N, M).

    Bipolar: (s_a s_b) * sum sign_a sign_b count. Unipolar: the zero points' terms are scaled by L / q**2 here, since
    `finish` multiplies by q**2 / L.
    """
    sums = _batched_counts(a.codes, b.codes, spec, backend).float()
    if spec.mode == "unipolar":
        sums = _remove_zero_points(sums, a, b, spec)
    return (a.scale * b.scale.transpose(-1, -2)) * sums


def finish(total: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    """Return the chunk sums times q**2 / stoc_len."""
    return total * (spec.max_code**2 / spec.stoc_len)


def _batched_counts(a_codes: torch.Tensor, b_codes: torch.Tensor, spec: StreamSpec, backend: str) -> torch.Tensor:
    counts: Callable[[torch.Tensor, torch.Tensor, StreamSpec], torch.Tensor] = backend_module(backend).counts
    if a_codes.ndim == 2:
        return counts(a_codes, b_codes, spec)
    return torch.stack([counts(x, y, spec) for x, y in zip(a_codes, b_codes, strict=True)])


def _remove_zero_points(sums: torch.Tensor, a: Encoded, b: Encoded, spec: StreamSpec) -> torch.Tensor:
    """Return sums + (L / q**2) (D z_a z_b - z_b sum_d i_a - z_a sum_d i_b), in float64 until the last step.

    The unipolar terms cancel: each is about D q**2 / 4, their sum is not.
    """
    row_a = a.codes.double().sum(-1, keepdim=True)
    row_b = b.codes.double().sum(-1, keepdim=True).transpose(-1, -2)
    assert a.zero is not None  # unipolar codes have one
    assert b.zero is not None
    zero_a, zero_b = a.zero.double(), b.zero.double().transpose(-1, -2)
    depth = a.codes.shape[-1]
    offsets = depth * zero_a * zero_b - zero_b * row_a - zero_a * row_b
    return (sums.double() + (spec.stoc_len / spec.max_code**2) * offsets).float()


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend's name for tensors on `device`. Raises ValueError; never falls back to another one."""
    if backend is None:
        if device.type not in DEFAULT_BACKEND:
            raise ValueError(f"backend=None: no default for device {device}; allowed are {', '.join(BACKENDS)}")
        return DEFAULT_BACKEND[device.type]
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu': needs tensors on the CPU, these are on {device}")
    interpreted = backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in GPU_BACKENDS and device.type != "cuda" and not interpreted:
        raise ValueError(f"backend={backend!r}: needs tensors on a CUDA device, these are on {device}")
    return backend


def backend_module(name: str) -> ModuleType:
    """Return the module of a backend, imported when it is first asked for."""
    return importlib.import_module(BACKENDS[name])


def _check_operands(a: Any, b: Any) -> None:
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: {kind}; must be a torch.float32 tensor")
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}; must be (rows, D) or (H, rows, D), none of them 0")
    if a.ndim != b.ndim or a.shape[-1] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"b: shape {tuple(b.shape)} does not go with a's {tuple(a.shape)}; D and H must be equal")
    if a.device != b.device:
        raise ValueError(f"b: on {b.device}; must be on a's device, {a.device}")


def _check_finite(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: has NaN or Inf; all values must be finite")


def _check_scope(
    a: torch.Tensor, granularity: str, mode: str, chunk_d: object, group_a: object, group_b: object, b: torch.Tensor
) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: allowed are {', '.join(map(repr, GRANULARITIES))}")
    if granularity in ("causal", "per_head") and mode != "bipolar":
        raise ValueError(f"mode={mode!r}: granularity={granularity!r} allows only 'bipolar'")
    if granularity == "per_head" and a.ndim != 3:
        raise ValueError(f"granularity='per_head': a has shape {tuple(a.shape)}; must be (H, N, D)")
    if isinstance(chunk_d, bool) or not isinstance(chunk_d, int) or chunk_d < 0:
        raise ValueError(f"chunk_d={chunk_d!r}: must be an int, 0 (off) or more")
    if chunk_d and (a.ndim != 2 or granularity not in ("per_row", "per_tensor")):
        raise ValueError(
            f"chunk_d={chunk_d}: allowed only for 2-D operands in 'per_row' or 'per_tensor', "
            f"not {a.ndim}-D in {granularity!r}"
        )
    for name, group, rows in (("group_a", group_a, a.shape[-2]), ("group_b", group_b, b.shape[-2])):
        if isinstance(group, bool) or not isinstance(group, int) or group < 1 or rows % group:
            raise ValueError(f"{name}={group!r}: must be an int from 1 that divides the {rows} rows")
        if group > 1 and granularity != "per_row":
            raise ValueError(f"{name}={group}: allowed only with granularity='per_row', not {granularity!r}")


def _check_smooth_scales(smooth_scales: object, a: torch.Tensor) -> None:
    depth = a.shape[-1]
    if not isinstance(smooth_scales, torch.Tensor) or smooth_scales.dtype != torch.float32:
        raise ValueError(f"smooth_scales: must be a torch.float32 tensor of shape ({depth},)")
    if smooth_scales.shape != (depth,) or smooth_scales.device != a.device:
        raise ValueError(
            f"smooth_scales: shape {tuple(smooth_scales.shape)} on {smooth_scales.device}; "
            f"must be ({depth},) on {a.device}"
        )
    if not bool((torch.isfinite(smooth_scales) & (smooth_scales > 0)).all()):
        raise ValueError("smooth_scales: all values must be finite and positive")
