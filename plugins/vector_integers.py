"""Products of small integers, and memory by its address, in LLVM's language."""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from trt_kv.plugins.jit import njit
from trt_kv.plugins.vector_code import F32, in_kernels

_declared: Any = cgutils.get_or_insert_function


@in_kernels
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in fp32, rounded once."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = _declared(builder.module, ir.FunctionType(F32, [F32] * 3), "llvm.fma.f32")
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), code


def _pointer_to(item: Any) -> Any:
    def pointer(typing_context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(types.int64), code

    return in_kernels(pointer)


_byte_pointer, _float_pointer = _pointer_to(types.uint8), _pointer_to(types.float32)


@njit()
def bytes_at(address: int, n: int) -> Any:
    """The n bytes from ``address`` on, as an array uint8 [n]."""
    return numba.carray(_byte_pointer(address), (n,))


@njit()
def floats_at(address: int, n: int) -> Any:
    """The n numbers from ``address`` on, as an array fp32 [n]."""
    return numba.carray(_float_pointer(address), (n,))
