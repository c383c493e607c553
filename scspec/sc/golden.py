"""Golden vectors of the published kernels: what `sc_matmul` must give (docs/method.md), and how far a backend is off.

54 cases over every mode, scope, five precisions and 20 lengths, with inputs whose rounding is unambiguous. Tests go
through all of them; `scspec doctor` asks each backend of a machine for its `worst_error`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scspec.sc.encoding import encode
from scspec.sc.matmul import GPU_BACKENDS, backend_module, chunk_slices, sc_matmul
from scspec.sc.streams import resolve_streams

PATH = Path(__file__).with_name("golden.npz")
#: Largest error allowed, relative to the largest value of a product: the order in which float32 chunk sums are added.
TOLERANCE = 1e-5
#: The first cases are linear layers in chunks of `CHUNK`: what backends have packed weights for.
LINEAR_CASES, CHUNK = 40, 128


@dataclass(frozen=True)
class GoldenCase:
    """`knobs` are sc_matmul's keyword arguments; a (N, D), b (M, D) or batched; product (N, M): float32, on the CPU."""

    knobs: dict[str, Any]
    a: torch.Tensor
    b: torch.Tensor
    product: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """Return how far `out` is off, relative to its largest value; infinite for NaN or another shape."""
        if out.shape != self.product.shape or not bool(torch.isfinite(out).all()):
            return float("inf")
        return float((out.cpu() - self.product).abs().max() / self.product.abs().max())


def golden_cases() -> list[GoldenCase]:
    """Return all cases, the linear layers first."""
    with np.load(PATH) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "cases"}
        knobs = json.loads(str(file["cases"]))
    return [GoldenCase(each, *(arrays[f"{name}{index}"] for name in "aby")) for index, each in enumerate(knobs)]


def matmul_error(case: GoldenCase, matmul: Callable[..., torch.Tensor], device: torch.device | str) -> float:
    """Return the error of a function with sc_matmul's arguments, given the case's operands on `device`."""
    return case.error(matmul(case.a.to(device), case.b.to(device), **case.knobs))


def linear_error(case: GoldenCase, backend: str, device: torch.device | str) -> float:
    """Return the error of a backend's packed linear layer, what models run; for the first `LINEAR_CASES` alone."""
    knobs = {name: value for name, value in case.knobs.items() if name not in ("granularity", "chunk_d")}
    spec, weight = resolve_streams("bipolar", **knobs), case.b.to(device)
    chunks = [encode(weight[:, columns], spec, "per_row") for columns in chunk_slices(weight.shape[1], CHUNK)]
    module, options = backend_module(backend), {"out_dtype": torch.float32} if backend in GPU_BACKENDS else {}
    return case.error(module.linear(case.a.to(device), module.pack(chunks, CHUNK), spec, **options))


def worst_error(backend: str, device: torch.device | str) -> float:
    """Return a backend's largest error over all cases, as a matmul and, where it packs weights, as a linear layer."""
    cases = golden_cases()
    errors = [matmul_error(case, partial(sc_matmul, backend=backend), device) for case in cases]
    if hasattr(backend_module(backend), "pack"):
        errors += [linear_error(case, backend, device) for case in cases[:LINEAR_CASES]]
    return max(errors)
