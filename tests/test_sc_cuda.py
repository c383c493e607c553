"""Backend `cuda`: what is compiled, for what it asks, and how the work is cut. Its products are in `test_sc_triton`."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import DEVICE
from test_sc_triton import DTYPES, operands, packed, specified

from scspec.sc import cuda, triton
from scspec.sc.device import device_tables
from scspec.sc.streams import resolve_streams

CUOBJDUMP = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROWS = (1, 2, 3, 4, 5, 8, 9, 64)
LENGTHS = (1, 128, 129, 200, 255, 256)
REGISTERS, SHARED_BYTES = 65536, 227 * 1024  # of an sm_90 multiprocessor, a block


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Return kernel name -> {"REG": ..., "STACK": ...}, as the sm_90 binary says."""
    path = tmp_path_factory.mktemp("cuda") / "counts.cubin"
    path.write_bytes(cuda.compiled("sm_90").code)
    listing = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s*\n(.*)", listing)
    return {name: {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", line)} for name, line in found}


@pytest.fixture
def launched(monkeypatch):
    """Return a list that fills with (kernel name, config, arguments) of launches, none of which happens."""
    calls = []
    monkeypatch.setattr(cuda, "_kernel", lambda name, index: name)
    monkeypatch.setattr(cuda, "_processors", lambda index: 132)
    monkeypatch.setattr(cuda, "_architecture", lambda index: 90)
    monkeypatch.setattr(cuda, "_stream", lambda handle: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "launch", lambda stream, config, kernel, *args: calls.append((kernel, config, args)))
    return calls


def test_it_compiles_every_kernel_it_can_ask_for(resources, launched):
    weight = packed(torch.zeros(3, 130, device=DEVICE), resolve_streams())
    for dtype in DTYPES.values():
        for stoc_len in LENGTHS:
            tables = device_tables(resolve_streams("bipolar", 8, stoc_len), DEVICE)
            for rows in ROWS:
                cuda.segment_sums(torch.zeros(rows, 130, dtype=dtype, device=DEVICE), weight, tables)
    assert {name for name, _, _ in launched} == set(resources)


def test_no_kernel_spills(resources):
    for name, used in resources.items():
        assert (used["STACK"], used["LOCAL"]) == (0, 0), name
        assert used["REG"] * cuda._THREADS <= REGISTERS, name
        assert used["SHARED"] + cuda._TABLE_BYTES <= SHARED_BYTES, name


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("stoc_len", [128, 256])
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (33, 130), (4096, 128), (14336, 256)])
def test_the_blocks_cover_the_work_once(launched, outputs, depth, rows, stoc_len):
    """As many spans as blocks, none of them empty; where a segment is half a chunk, twice the sums."""
    spec = resolve_streams("bipolar", 8, stoc_len)
    weight = packed(torch.zeros(outputs, depth, device=DEVICE), spec)
    parts = cuda.segment_sums(torch.zeros(rows, depth, device=DEVICE), weight, device_tables(spec, DEVICE))
    ((name, config, args),) = launched
    packed_rows = int(name.split("_")[1])
    span = int(args[-1])
    assert parts.per_chunk == (2 if packed_rows == 8 else 1)
    assert parts.sums.shape == (weight.chunks * parts.per_chunk, rows, weight.m_pad)
    tiles = -(-rows // packed_rows) * weight.chunks * parts.per_chunk * weight.m_pad // 32
    blocks = config.grid[0]
    assert (blocks - 1) * span < tiles <= blocks * span
    assert blocks <= 132
    assert stoc_len * 128 // parts.per_chunk < 2**15, "a segment's sum fits its 16 bits"
    assert all(isinstance(size, np.int32) for size in args[6:])


def test_everything_but_the_packed_linear_is_tritons():
    assert cuda.counts is triton.counts
    assert cuda.pack is triton.pack
    assert cuda.linear.func is triton.linear


@pytest.mark.gpu
@pytest.mark.parametrize("stoc_len", [1, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 65, 200])
def test_sums_are_tritons(rows, dtype, stoc_len):
    """On a layer wide enough that a block's span ends within a segment and begins within another."""
    x, weight = operands(rows, 3333, 1000, dtype)
    spec = resolve_streams("bipolar", 8, stoc_len)
    prepared = packed(weight, spec)
    ours, theirs = (module.segment_sums(x, prepared, device_tables(spec, DEVICE)) for module in (cuda, triton))
    assert torch.equal(ours.scale, theirs.scale)
    sums = ours.sums.view(prepared.chunks, ours.per_chunk, rows, -1).int().sum(1)
    assert torch.equal(sums, theirs.sums.view(prepared.chunks, theirs.per_chunk, rows, -1).int().sum(1))
    assert torch.equal(cuda.linear(x, prepared, spec, out_dtype=dtype), specified(x, weight, stoc_len).to(dtype))


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
