"""Backend `cuda`: what is compiled, for what it asks, and how the work is cut. Its products are in `test_sc_triton`."""

import math
import re
import subprocess
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from test_sc_triton import DTYPES, operands, packed, specified

from scspec.sc import cuda, triton
from scspec.sc.device import CHUNK, TILE, device_tables
from scspec.sc.streams import resolve_streams
from scspec.sc.triton_attention import ActivePositions
from scspec.sc.triton_kv import DeviceKV

CUOBJDUMP = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROWS = (1, 2, 3, 4, 5, 8, 9, 64)
LENGTHS = (1, 128, 129, 200, 255, 256)
PROCESSORS, REGISTERS = 132, 65536  # of an H100; of a block on any card
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # that a block may ask for


def resources(arch, stage, folder):
    """Return kernel name -> {"REG": ..., "STACK": ...}, as the binary for a card says."""
    found = []
    for source in cuda.SOURCES:
        path = folder / "kernels.cubin"
        path.write_bytes(cuda.compiled(source, arch, stage).code)
        listing = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found += re.findall(r"Function (\w+):\s*\n(.*)", listing)
    return {name: {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", line)} for name, line in found}


@pytest.fixture
def launched(monkeypatch):
    """Return a list that fills with (kernel name, config, arguments) of launches, none of which happens."""
    calls = []
    monkeypatch.setattr(cuda, "_kernel", lambda name, index: name)
    monkeypatch.setattr(cuda, "_processors", lambda index: PROCESSORS)
    monkeypatch.setattr(cuda, "stage_bytes", lambda device: cuda.STAGES[0])
    monkeypatch.setattr(cuda, "_stream", lambda index, handle: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "launch", lambda stream, config, kernel, *args: calls.append((kernel, config, args)))
    return calls


def test_it_compiles_every_kernel_it_can_ask_for(launched, tmp_path):
    for stoc_len in LENGTHS:
        spec = resolve_streams("bipolar", 8, stoc_len)
        weight = packed(torch.zeros(3, 130, device=DEVICE), spec)
        for dtype in DTYPES.values():
            for rows in ROWS:
                x = torch.zeros(rows, 130, dtype=dtype, device=DEVICE)
                cuda.segment_sums(x, weight, device_tables(spec, DEVICE))
            attend_once(64, spec, dtype)
    assert {name for name, _, _ in launched} == set(resources("sm_90", cuda.STAGES[0], tmp_path))


def attend_once(head_dim, spec, dtype, capacity=300):
    """Launch the two kernels of attention for a row of three heads that share one of keys."""
    store = DeviceKV.empty(1, 1, head_dim, capacity, spec.max_code, DEVICE)
    query, tables = torch.zeros(1, 1, 3, head_dim, dtype=dtype, device=DEVICE), device_tables(spec, DEVICE)
    found = cuda.scores(query, store, torch.zeros(1, dtype=torch.int32, device=DEVICE), 0.1, tables)
    active = ActivePositions(torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, device=DEVICE))
    cuda.mix(found, active, query, store, tables)


@pytest.mark.parametrize(("arch", "stage"), [("sm_90", cuda.STAGES[0]), ("sm_80", cuda.STAGES[1])])
def test_no_kernel_spills_or_asks_for_more_than_a_card_has(arch, stage, tmp_path):
    for name, used in resources(arch, stage, tmp_path).items():
        threads = cuda._THREADS if name.startswith("counts") else cuda._HEAD_THREADS
        assert (used["STACK"], used["LOCAL"]) == (0, 0), name
        assert used["REG"] * threads <= REGISTERS, name
        reserved = 1024 if arch == "sm_90" else 0  # the listing counts what the system keeps
        declared = used["SHARED"] - reserved
        assert declared + cuda.dynamic_bytes(name, stage) <= SHARED_BYTES[arch], name
        assert declared <= cuda._STATIC_BYTES or not name.startswith("counts"), name


@pytest.mark.parametrize(("room", "stage"), [(227, 64), (163, 32)])
def test_a_card_gets_the_stage_that_fits(room, stage, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=room * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cuda.stage_bytes(torch.device("cuda:0")) == stage * 1024


@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize("head_dim", [2, 12, 64, 128, 130, 256])
def test_attention_asks_for_what_its_kernels_index(launched, head_dim, stoc_len):
    """A block for every 256 positions and for every 128 channels; room for a line of counts for every dimension."""
    spec = resolve_streams("bipolar", 8, stoc_len)
    attend_once(head_dim, spec, torch.float16)
    (_, score, _), (_, mix, arguments) = launched
    words = -(-head_dim // 4)
    assert score.grid[:2] == (3, 2)
    assert score.shmem_size == words * 4 * 128 * (2 if stoc_len > 255 else 1) + words * 4 * 4 + words * 4
    assert score.shmem_size <= cuda.dynamic_bytes("score", cuda.STAGES[0])
    assert mix.shmem_size == 0
    assert mix.grid[:2] == (3, -(-head_dim // 128))
    assert arguments[-2] == min(32, 2 ** math.ceil(math.log2(words)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (33, 130), (4096, 128), (14336, 256)])
def test_the_blocks_cover_the_work_once(launched, outputs, depth, rows, stoc_len):
    """As many spans of warp tiles as blocks, none of them empty; where 8 rows are packed, a segment is half a chunk."""
    spec = resolve_streams("bipolar", 8, stoc_len)
    weight = packed(torch.zeros(outputs, depth, device=DEVICE), spec)
    cuda.segment_sums(torch.zeros(rows, depth, device=DEVICE), weight, device_tables(spec, DEVICE))
    ((name, config, arguments),) = launched
    packed_rows = int(name.split("_")[1])
    per_chunk = 2 if packed_rows == 8 else 1
    tiles = -(-rows // packed_rows) * weight.chunks * per_chunk * weight.m_pad // TILE
    span, blocks = cuda._span(tiles, PROCESSORS), config.grid[0]
    assert span in arguments
    assert (blocks - 1) * span < tiles <= blocks * span
    assert blocks <= PROCESSORS
    assert stoc_len * CHUNK // per_chunk < 2**15, "a segment's sum fits its 16 bits"


def test_everything_but_the_packed_linear_is_tritons():
    assert cuda.counts is triton.counts
    assert cuda.pack is triton.pack
    assert cuda.linear.func is triton.linear


@pytest.mark.gpu
@pytest.mark.parametrize("stoc_len", [1, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 65, 200])
def test_wide_layers_are_sc_matmul(rows, dtype, stoc_len):
    """Wide enough that a block's span ends within a segment and begins within another."""
    x, weight = operands(rows, 3333, 1000, dtype)
    spec = resolve_streams("bipolar", 8, stoc_len)
    prepared = packed(weight, spec)
    out = cuda.linear(x, prepared, spec, out_dtype=dtype)
    assert torch.equal(out, specified(x, weight, stoc_len).to(dtype))


@pytest.mark.gpu
def test_it_follows_torchs_stream():
    x, weight = operands(2, 4096, 4096)
    spec = resolve_streams("bipolar", 8, 128)
    prepared = packed(weight, spec)
    wanted = cuda.linear(x, prepared, spec, out_dtype=torch.float32)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: whoever does not wait reads zeros
        late.copy_(x)
        out = cuda.linear(late, prepared, spec, out_dtype=torch.float32)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, wanted)
