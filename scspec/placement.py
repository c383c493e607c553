"""Where a model lies and in what it computes: devices, the dtype of floats, the backend of its SC matmuls.

Checked before anything is loaded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from scspec.sc.matmul import GPU_BACKENDS, backend_module, resolve_backend

Placement = torch.device | str | Sequence[torch.device | str]
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_placement(device: Placement, dtype: torch.dtype, backend: str | None) -> None:
    """Raise ValueError for a device that is not here, or a dtype or backend that it does not have."""
    devices = resolve_devices(device)
    backend = model_backend(backend, devices[0])
    check_dtype(dtype, backend)
    for found in devices if backend == "cuda" else ():
        backend_module(backend).stage_bytes(found)


def check_dtype(dtype: torch.dtype, backend: str) -> None:
    """Raise ValueError for a dtype of floats that models do not have on `backend`."""
    allowed = GPU_DTYPES if backend in GPU_BACKENDS else (torch.float32,)
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype}: on backend {backend!r} allowed are {', '.join(map(str, allowed))}")


def model_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend of a model on `device`. Raises ValueError for one that packs no weights."""
    backend = resolve_backend(backend, device)
    if backend == "reference":
        raise ValueError(
            "backend='reference': multiplies, but packs no weights of a model; on the CPU allowed is 'cpu'"
        )
    return backend


def resolve_devices(device: Placement) -> tuple[torch.device, ...]:
    """Return the devices, a GPU with its number. Raises ValueError for one that is not here, or of different kinds."""
    names = [device] if isinstance(device, str | torch.device) else list(device)
    devices = tuple(_resolve_device(name) for name in names)
    if len({found.type for found in devices}) != 1:
        raise ValueError(f"device={names}: must be one device or several of a kind")
    return devices


def _resolve_device(name: torch.device | str) -> torch.device:
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: allowed are 'cpu' and 'cuda'") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: allowed are 'cpu' and 'cuda'")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(f"device={name!r}: torch {torch.__version__} finds no CUDA device here")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise ValueError(f"device={name!r}: here are 'cuda:0' to 'cuda:{count - 1}'")
    return torch.device("cuda", index)


def layer_devices(layers: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """Return the device of each decoder layer: in order, in shares that differ by a layer at most (all are one size).

    Raises ValueError for more devices than layers.
    """
    if len(devices) > layers:
        raise ValueError(f"device: {len(devices)} devices for {layers} layers")
    return [devices[index * len(devices) // layers] for index in range(layers)]


def on_device(forward: Callable[..., Any], device: torch.device, *arguments: Any, **named: Any) -> Any:
    """Return what `forward` does with its tensors moved to `device`."""
    return forward(*_moved(arguments, device), **{name: _moved(value, device) for name, value in named.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
