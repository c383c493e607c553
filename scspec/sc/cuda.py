"""Backend `cuda`: the counts of a linear layer in CUDA C++ (`cuda_counts.cu`), compiled at run time for the device.

For packed weights only (bipolar, per row, chunks of 128); everything else of a model runs on `triton`.
"""

from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch

from scspec.sc import triton
from scspec.sc.device import TILE, DeviceTables, PackedWeight, SegmentSums
from scspec.sc.triton import counts, pack

__all__ = ["compiled", "counts", "linear", "pack", "segment_sums"]
NAME = "cuda"
SOURCE = Path(__file__).with_name("cuda_counts.cu")
_THREADS, _TABLE_BYTES = 512, 128 * 1024
_WARPS = _THREADS // 32
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def segment_sums(x: torch.Tensor, weight: PackedWeight, tables: DeviceTables) -> SegmentSums:
    """Return the counts of x (N, D) float32, float16 or bfloat16 with a packed weight, segment by segment."""
    rows, spec, device = x.shape[0], tables.spec, x.device.index
    packed_rows = _packed_rows(rows, spec.stoc_len)
    per_chunk = 2 if packed_rows == 8 else 1
    sums = torch.empty((weight.chunks * per_chunk, rows, weight.m_pad), dtype=torch.int16, device=x.device)
    scale = torch.empty((rows, weight.chunks), dtype=torch.float32, device=x.device)
    units = -(-rows // packed_rows) * sums.shape[0] * (weight.m_pad // TILE)
    span = _span(units, _processors(device))
    long = "_long" if tables.counts.dtype == torch.int16 else ""
    pointers = x, weight.codes, tables.ones, tables.counts, sums, scale
    sizes = rows, weight.depth, weight.chunks, weight.m_pad, spec.max_code, spec.stoc_len + 1, span
    config = LaunchConfig(grid=-(-units // span), block=_THREADS, shmem_size=_TABLE_BYTES)
    stream = _stream(torch.cuda.current_stream(x.device).cuda_stream)
    kernel = _kernel(f"counts_{packed_rows}{long}_{_DTYPES[x.dtype]}", device)
    launch(stream, config, kernel, *(tensor.data_ptr() for tensor in pointers), *map(np.int32, sizes))
    return SegmentSums(sums, scale, per_chunk)


linear = partial(triton.linear, counted=segment_sums)


def _packed_rows(rows: int, stoc_len: int) -> int:
    """Return how many rows share a look-up. Only the kernel of 8 has sums short enough for streams over 128."""
    if stoc_len > 128 or rows > 4:
        return 8
    return 2 if rows <= 2 else 4


def _span(units: int, processors: int) -> int:
    """Return how many warp tiles a block owns: an equal share, in whole rounds of its warps where that is many."""
    span = -(-units // processors)
    return span if span <= _WARPS else -(-span // _WARPS) * _WARPS


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def compiled(arch: str) -> ObjectCode:
    """Return the kernels as machine code of `arch`, such as "sm_90". Needs no GPU."""
    return Program(SOURCE.read_text(), "c++", ProgramOptions(arch=arch, std="c++17")).compile("cubin")


@cache
def _kernel(name: str, index: int) -> Kernel:
    device = Device(index)
    device.set_current()
    kernel = compiled(f"sm_{device.arch}").get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(attribute, _TABLE_BYTES, kernel.handle, index)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"backend 'cuda': {name} needs {_TABLE_BYTES} bytes of shared memory a block: {error.name}")
    return kernel


@lru_cache(maxsize=64)
def _stream(handle: int) -> Stream:
    """Return one of torch's streams as cuda-core asks for it."""
    return Stream.from_handle(handle)
