"""What Triton's interpreter gets wrong about bfloat16, put right: it truncates, and multiplies the bits as integers."""

import torch
from triton import language as tl
from triton.runtime import interpreter


def correct_bfloat16() -> None:
    """Make the interpreter round float32 to bfloat16 half to even, and tl.dot take bfloat16, as a GPU does."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(convert(handle.data, tl.bfloat16, tl.float32, None).view("f4"), tl.float32)

    def float_dot(builder, a, b, *rest):
        return dot(builder, widened(a), widened(b), *rest)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = float_dot
