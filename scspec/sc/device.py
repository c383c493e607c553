"""What a GPU backend reads: the stream tables on a device, and a weight's codes packed once, one byte each.

Plain tensors and no kernels, so that `triton`, `cuda` and the attention share one layout.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from scspec.sc.encoding import Encoded
from scspec.sc.streams import StreamSpec, count_table, ones_table

CHUNK = 128  # dimensions that share a scale in a packed weight
RUN = 64  # dimensions of a packed weight that lie side by side
TILE = 32  # outputs are padded to whole tiles
SLAB = 64  # rows of a linear layer at a time, so that the sums of a wide one stay small
DIMS = 256  # every table covers this many dimensions; streams repeat after 2**sc_prec


@dataclass(frozen=True)
class DeviceTables:
    """The tables of `streams` on a device, laid out alike for every sc_prec.

    ones: int16 (256, width), K of [dimension][code].  counts: uint8 (256, stoc_len + 1, width), int16 where stoc_len
    is 256: C of [dimension][K][code].  width: 128 in bipolar mode, 256 in unipolar; codes above q count nothing.
    """

    ones: torch.Tensor
    counts: torch.Tensor
    spec: StreamSpec

    @property
    def width(self) -> int:
        """Codes a line of `counts` holds."""
        return self.ones.shape[1]


@cache  # never dropped: captured graphs read them
def device_tables(spec: StreamSpec, device: torch.device) -> DeviceTables:
    """Return the tables of `spec` on `device`; a table of stoc_len 128 takes 4.2 MB."""
    width = 128 if spec.mode == "bipolar" else 256
    repeats = DIMS // spec.base
    room = width - (spec.max_code + 1)
    ones = np.tile(np.pad(ones_table(spec), ((0, 0), (0, room))), (repeats, 1))
    counts = np.tile(np.pad(count_table(spec), ((0, 0), (0, 0), (0, room))), (repeats, 1, 1))
    if counts.dtype != np.uint8:
        counts = counts.astype(np.int16)
    return DeviceTables(torch.from_numpy(ones).to(device), torch.from_numpy(counts).to(device), spec)


def code_bytes(codes: torch.Tensor, mode: str = "bipolar") -> torch.Tensor:
    """Return codes int16 as bytes uint8: bipolar = sign bit 7 | magnitude, unipolar = magnitude."""
    if mode == "unipolar":
        return codes.to(torch.uint8)
    return (codes.abs() | ((codes < 0).to(torch.int16) << 7)).to(torch.uint8)


@dataclass(frozen=True)
class PackedWeight:
    """A weight (M, D), bipolar, quantised per row and chunk of 128.

    codes: uint8 (runs, m_pad, 64): runs of 64 dimensions, two a chunk; padding has code 0, which counts nothing.
    scale: float32 (chunks, m_pad).  outputs: M.  depth: D.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    outputs: int
    depth: int

    @property
    def m_pad(self) -> int:
        """M rounded up to whole tiles."""
        return self.codes.shape[1]

    @property
    def chunks(self) -> int:
        """How many chunks D is split into."""
        return self.scale.shape[0]

    @classmethod
    def pack(cls, chunks: list[Encoded]) -> "PackedWeight":
        """Return bipolar codes (one Encoded (M, D_c) per chunk of 128, in order) packed, on their device."""
        outputs, depth = chunks[0].codes.shape[0], sum(chunk.codes.shape[1] for chunk in chunks)
        rows, width = -(-outputs // TILE) * TILE, len(chunks) * CHUNK
        flat = chunks[0].codes.new_zeros((rows, width), dtype=torch.uint8)
        scale = torch.zeros((len(chunks), rows), dtype=torch.float32, device=flat.device)
        for c, chunk in enumerate(chunks):
            start = c * CHUNK
            flat[:outputs, start : start + chunk.codes.shape[1]] = code_bytes(chunk.codes)
            scale[c, :outputs] = chunk.scale[:, 0]
        codes = flat.view(rows, width // RUN, RUN).transpose(0, 1).contiguous()
        return cls(codes, scale, outputs, depth)


@dataclass(frozen=True)
class SegmentSums:
    """Counts that a backend hands to `triton.rescale`: exact integers, not yet scaled.

    sums: int16, or int32 where that is too short, (segments, N, m_pad); `per_chunk` of them in a row make up one chunk.
    scale: float32 (N, chunks), the rows' scales.
    """

    sums: torch.Tensor
    scale: torch.Tensor
    per_chunk: int
