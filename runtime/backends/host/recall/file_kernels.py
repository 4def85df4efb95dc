"""Reading page-heads of a file in one call without the GIL: a step makes thousands of small reads."""

from typing import Any

from numba import types

from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Ints, Rows

# The C library's, found by name: compiled code that calls it can be cached, unlike that which calls an address.
_pread: Any = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@njit(nogil=True)
def read_heads(file_descriptor: int, pages_M: Ints, heads_M: Ints, into: Rows, into_pages_M: Ints) -> int:
    """Copy page-heads from a file of pages like those of ``into`` [.., 2, K, P, W], one after the other; returns how many were
    copied before one could not be.
    """
    n_heads = into.shape[2]
    for m in range(len(pages_M)):
        for half in range(2):
            to = into[into_pages_M[m], half, heads_M[m]]
            n_bytes = to.size * to.itemsize
            offset = ((pages_M[m] * 2 + half) * n_heads + heads_M[m]) * n_bytes
            if _pread(file_descriptor, to.ctypes.data, n_bytes, offset) != n_bytes:
                return m
    return len(pages_M)
