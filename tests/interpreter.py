"""Where kernels run in tests, and what Triton's interpreter gets wrong there, put right.

It truncates float32 to bfloat16 and multiplies bfloat16's bits as integers; and its tl.dot is numpy's matmul, whose
order of summation for a row depends on where in the tile the row stands.
"""

import torch
from triton import language as tl
from triton.runtime import interpreter

#: A GPU if there is one, else the CPU, whose tensors the interpreter takes.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ROW_COUNTS = (*range(1, 18), 33)  # up to beyond 16, multiples of which Triton treats apart, and more than two of these


def correct_interpreter() -> None:
    """Make the interpreter round float32 to bfloat16 half to even, and tl.dot sum in ascending order of k."""
    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    def widened(handle, dtype):
        if handle.dtype.scalar == tl.bfloat16:
            return convert(handle.data, tl.bfloat16, tl.float32, None).view("f4")
        return handle.data.astype(dtype)

    def ordered_dot(builder, a, b, total, *_):
        sums = total.data
        a, b = (widened(x, sums.dtype) for x in (a, b))
        for k in range(a.shape[1]):
            sums = sums + a[:, k, None] * b[k]
        return interpreter.TensorHandle(sums, total.dtype.scalar)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = ordered_dot
