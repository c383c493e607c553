"""`prefetch`: a hint to the processor that a line of memory is about to be read. Changes no result.

The look-up loop streams weights that no cache holds, and the hardware's own prefetching stops at each page and whenever
a table is built in between. The hint doubled the loop's speed: benchmarks/LOG.md.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_READ, _INTO_L2, _DATA = 0, 2, 1


@intrinsic
def prefetch(typing_context, array, index):
    """Hint, from compiled code, that element `index` of the one-dimensional, contiguous `array` is read soon."""

    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [address.type, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")
        builder.call(function, [address, int32(_READ), int32(_INTO_L2), int32(_DATA)])
        return context.get_dummy_value()

    return types.void(array, index), codegen
