"""How fast this machine reads memory, with all threads that an engine would use."""

import time
from typing import Any

import numba
import numpy as np

from trt_kv.plugins.jit import njit

N_BYTES = 2**28
"""More than caches hold, but not much memory."""
PASSES = 5
_PARTS_PER_THREAD = 4


@njit(parallel=True, fastmath=True)
def _sums(values: Any, n_parts: int) -> Any:
    """The sum of each part, all parts at once: it reads memory once, and computes too little to wait for."""
    sums = np.zeros(n_parts, np.float32)
    size = len(values) // n_parts
    for part in numba.prange(n_parts):
        total = np.float32(0)
        for i in range(part * size, (part + 1) * size):
            total += values[i]
        sums[part] = total
    return sums


def gb_per_s(n_threads: int, n_bytes: int = N_BYTES) -> float:
    """10^9 bytes per second that ``n_threads`` threads read, the best of a few passes over ``n_bytes``."""
    values = np.ones(n_bytes // 4, np.float32)
    before = numba.get_num_threads()
    numba.set_num_threads(min(n_threads, before))
    try:
        _sums(values[: _PARTS_PER_THREAD * n_threads], _PARTS_PER_THREAD * n_threads)
        best = float("inf")
        for _ in range(PASSES):
            started = time.perf_counter()
            _sums(values, _PARTS_PER_THREAD * n_threads)
            best = min(best, time.perf_counter() - started)
    finally:
        numba.set_num_threads(before)
    return values.nbytes / best / 1e9
