"""Backend `cuda`: what is counted, in CUDA C++ compiled at run time for the device; the rest is backend `triton`'s.

`cuda_counts.cu`: a linear layer with packed weights (bipolar, per row, chunks of 128). `cuda_attention.cu`: attention
in scope `causal`.
"""

from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch

from scspec.sc import triton, triton_attention
from scspec.sc.device import TILE, DeviceTables, PackedWeight, SegmentSums
from scspec.sc.triton import counts, pack
from scspec.sc.triton_attention import ActivePositions
from scspec.sc.triton_kv import DeviceKV

__all__ = ["attend", "compiled", "counts", "linear", "mix", "pack", "scores", "segment_sums", "stage_bytes"]
NAME = "cuda"
SOURCES = ("cuda_counts.cu", "cuda_attention.cu")
_FOLDER = Path(__file__).parent
_THREADS, _TABLE_BYTES, _STATIC_BYTES = 512, 128 * 1024, 2048  # of the counts' kernels
_WARPS = _THREADS // 32
#: Room for lines of counts: all of a segment's fit in the first, half of them in the second. Measured on an H100,
#: 4096 -> 4096, 5 rows: 17.8 and 19.3 us.
STAGES = (64 * 1024, 32 * 1024)
_HEAD_THREADS, _SCORE_BYTES = 256, 96 * 1024  # of the attention's kernels; room for 256 dimensions in any stream
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
    pointers = x, weight.codes, tables.ones, tables.counts, sums, scale
    sizes = rows, weight.depth, weight.chunks, weight.m_pad, spec.max_code, spec.stoc_len + 1, span
    name = f"counts_{packed_rows}{_class(tables, x.dtype)}"
    _launch(name, (-(-units // span),), _THREADS, _TABLE_BYTES + stage_bytes(x.device), x.device, *pointers, *sizes)
    return SegmentSums(sums, scale, per_chunk)


linear = partial(triton.linear, counted=segment_sums)


def scores(query: torch.Tensor, store: DeviceKV, start, scaling: float, tables: DeviceTables) -> torch.Tensor:
    """Return what `triton_attention.scores` does."""
    spec = tables.spec
    found = torch.empty(query.shape[:3].numel(), store.capacity, device=query.device)
    line_bytes = tables.width * tables.counts.element_size()
    shared_bytes = store.words * (4 * (line_bytes + 4) + 4)  # a head's lines, their numbers, the signs of a word
    grid = found.shape[0], -(-store.capacity // _HEAD_THREADS)
    pointers = query, store.k_words, store.k_scale, start, tables.ones, tables.counts, found
    floats = float(spec.max_code), spec.max_code**2 / spec.stoc_len, scaling
    name = f"score{_class(tables, query.dtype)}"
    _launch(name, grid, _HEAD_THREADS, shared_bytes, query.device, *pointers, *_sizes(query, store, tables), *floats)
    return found


def mix(found: torch.Tensor, active: ActivePositions, query, store: DeviceKV, tables: DeviceTables) -> torch.Tensor:
    """Return what `triton_attention.mix` does."""
    out = torch.empty_like(query).flatten(2)
    grid = found.shape[0], -(-store.words // 32)
    width = min(32, 1 << (store.words - 1).bit_length())
    pointers = found, active.count, active.scale, store.v_words, tables.counts, out
    factor = tables.spec.max_code**2 / tables.spec.stoc_len
    name = f"mix{_class(tables, query.dtype)}"
    _launch(name, grid, _HEAD_THREADS, 0, query.device, *pointers, *_sizes(query, store, tables), width, factor)
    return out


def _sizes(query: torch.Tensor, store: DeviceKV, tables: DeviceTables) -> tuple[int, ...]:
    """Return what both kernels of the attention take: steps, capacity, words, heads, heads a KV head, ..., lines."""
    steps, heads, head_dim = query.shape[1:]
    shared = heads // store.k_words.shape[1]
    return steps, store.capacity, store.words, heads, shared, head_dim, tables.spec.stoc_len + 1


attend = partial(triton_attention.attend, scored=scores, mixed=mix)


def _class(tables: DeviceTables, dtype: torch.dtype) -> str:
    """Return the end of a kernel's name: how wide counts are, and the dtype of floats."""
    return ("_long_" if tables.counts.dtype == torch.int16 else "_") + _DTYPES[dtype]


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


def _launch(name: str, grid: tuple, threads: int, shared_bytes: int, device: torch.device, *arguments) -> None:
    """Launch a kernel on torch's stream of `device`. Tensors go as pointers, ints as int32, floats as float32."""
    config = LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)
    with torch.cuda.device(device):
        stream = _stream(device.index, torch.cuda.current_stream().cuda_stream)
        launch(stream, config, _kernel(name, device.index), *map(_argument, arguments))


def _argument(value: torch.Tensor | float) -> int | np.generic:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return np.int32(value) if isinstance(value, int) else np.float32(value)


def stage_bytes(device: torch.device) -> int:
    """Return the largest of STAGES that fits a block of a GPU beside the tables.

    Raises ValueError for a card without room for any: all but data centre cards from the A100 on.
    """
    card, needed = torch.cuda.get_device_properties(device), _TABLE_BYTES + _STATIC_BYTES
    fitting = [stage for stage in STAGES if needed + stage <= card.shared_memory_per_block_optin]
    if not fitting:
        raise ValueError(
            f"backend='cuda': {card.name} ({device}) has {card.shared_memory_per_block_optin} bytes of shared memory a "
            f"block; needed are {needed + min(STAGES)}; backend 'triton' is allowed"
        )
    return fitting[0]


def dynamic_bytes(name: str, stage: int) -> int:
    """Return how much shared memory a launch of a kernel may ask for, beside what the kernel declares."""
    return {"counts": _TABLE_BYTES + stage, "score": _SCORE_BYTES, "mix": 0}[name.split("_")[0]]


@cache
def compiled(source: str, arch: str, stage_bytes: int = STAGES[0]) -> ObjectCode:
    """Return the kernels of one of SOURCES as machine code of `arch`, such as "sm_90". Needs no GPU."""
    macro = ("STAGE_BYTES", str(stage_bytes))
    options = ProgramOptions(arch=arch, std="c++17", include_path=str(_FOLDER), define_macro=macro)
    return Program((_FOLDER / source).read_text(), "c++", options).compile("cubin")


@cache
def _kernel(name: str, index: int) -> Kernel:
    """Return a kernel of device `index`, which is the current one."""
    device = Device(index)
    device.set_current()
    source = "cuda_counts.cu" if name.startswith("counts") else "cuda_attention.cu"
    stage = stage_bytes(torch.device("cuda", index))
    kernel = compiled(source, f"sm_{device.arch}", stage).get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    room = dynamic_bytes(name, stage)
    (error,) = driver.cuKernelSetAttribute(attribute, room, kernel.handle, index)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"backend 'cuda': {name}: no {room} bytes of shared memory: {error.name}")
    return kernel


@lru_cache(maxsize=64)
def _stream(index: int, handle: int) -> Stream:
    """Return one of torch's streams on device `index`, which is the current one, as cuda-core asks for it."""
    return Stream.from_handle(handle)
