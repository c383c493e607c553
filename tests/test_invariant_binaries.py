"""The binaries of the float kernels for sm_90, compiled without a GPU: one for each class, whatever the rows."""

import inspect

import torch
from compile_sm90 import compiled
from interpreter import DTYPES, ROW_COUNTS

from scspec.invariant import triton as kernels


def launches():
    """Return name -> function: each launches one class of each kernel with every row count, capacity and position.

    Two names where a switch of the kernel makes two classes. Run by compile_sm90, which counts the binaries.
    """
    return {
        f"{function.__name__} {name}": lambda function=function, dtype=dtype: function(dtype)
        for name, dtype in DTYPES.items()
        for function in (_norms, _linears, _lm_heads, _silus, _silu_muls, _attentions, _rotaries)
    } | {"_softmaxes": _softmaxes, "_edges": _edges}


def _rows(dtype, width=576):
    """Yield x of every row count, and of one row in the middle."""
    x = torch.zeros(33, width, dtype=dtype)
    yield from (x[:count] for count in ROW_COUNTS)
    yield x[5:6]


def _norms(dtype):
    for width in (576, 130):
        for x in _rows(dtype, width):
            kernels.rms_norm(x, x[0].clone(), 1e-5)


def _linears(dtype):
    for x in _rows(dtype):
        kernels.linear(x, torch.zeros(48, 576, dtype=dtype), dtype)


def _lm_heads(dtype):
    for x in _rows(dtype):
        kernels.linear(x, torch.zeros(16384, 576, dtype=dtype))


def _silus(dtype):
    for x in _rows(dtype):
        kernels.silu(x)


def _silu_muls(dtype):
    for x in _rows(dtype):
        kernels.silu_mul(x[:, :288], x[:, 288:])


def _softmaxes():
    for size in (64, 65, 512, 1):
        for count in ROW_COUNTS:
            kernels.softmax_rows(torch.zeros(count, size), torch.zeros(count, dtype=torch.int32))


def _attentions(dtype):
    starts = torch.zeros(8, dtype=torch.int32)
    for batch, count, capacity in ((1, 1, 64), (1, 5, 65), (3, 1, 512), (2, 16, 16), (1, 1, 1)):
        qkv = torch.zeros(batch, count, 8, 64, dtype=dtype)
        keys, values = torch.zeros(2, batch, 2, capacity, 64, dtype=dtype)
        for first in (0, 1):
            start = starts[first : first + batch]
            kernels.write_kv(qkv[:, :, 4:6], qkv[:, :, 6:], keys, values, start)
            kernels.attention(qkv[:, :, :4], keys, values, start, 0.125)


def _rotaries(dtype):
    starts = torch.zeros(8, dtype=torch.int32)
    for batch, count, positions in ((1, 1, 64), (1, 5, 65), (3, 1, 512), (2, 16, 1)):
        x, table = torch.zeros(batch, count, 8, 64, dtype=dtype), torch.zeros(positions, 64)
        for first in (0, 1):
            kernels.rotary(x[:, :, :4], table, table, starts[first : first + batch])


def _edges():
    """Sizes of 1, which Triton turns into constants: they must compile too."""
    x = torch.zeros(1, 1, dtype=torch.float16)
    kernels.rms_norm(x, x[0], 1e-5)
    kernels.linear(x, x)
    kernels.silu_mul(x, x)
    one, start = torch.zeros(1, 1, 1, 2, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    kernels.write_kv(one, one, one, one, start)
    kernels.attention(one, one, one, start, 1.0)
    kernels.rotary(one, torch.zeros(1, 2), torch.zeros(1, 2), start)


def test_one_binary_serves_every_row_count():
    """Every kernel compiles for sm_90; a class (dtype, width, switch) has one binary, whatever the rows."""
    binaries = compiled("test_invariant_binaries")
    every = {name for name, item in inspect.getmembers(kernels) if name.endswith("_kernel") and callable(item)}
    assert every == {kernel for counts in binaries.values() for kernel in counts}
    for name, counts in binaries.items():
        for kernel, count in counts.items():
            assert count == (2 if name.startswith("_norms") else 1), (name, kernel)  # _norms: two widths
