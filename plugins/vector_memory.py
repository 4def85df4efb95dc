"""Arrays at addresses, in compiled code (numba)."""

from typing import Any

from numba import types
from numba.np.numpy_support import carray

from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.vector_code import in_kernels

_pointer_to: Any = types.CPointer


@in_kernels
def _pointer(typing_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _pointer_to(types.float32)(types.int64), code


@njit()
def row_at(address: int, n: int) -> Floats:
    """The n numbers from ``address`` on."""
    row: Floats = carray(_pointer(address), (n,))
    return row


@njit()
def rows_at(address: int, n_rows: int, n: int) -> Floats:
    """``[n_rows, n]`` numbers from ``address`` on."""
    rows: Floats = carray(_pointer(address), (n_rows, n))
    return rows
