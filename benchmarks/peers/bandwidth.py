"""How fast this machine reads memory: the denominator of every roofline, probed in the same run."""

import time
from typing import Any

import numba
import numpy as np

N_BYTES = 2**29
"""Far more than any cache holds."""
PASSES = 5


@numba.njit(parallel=True, fastmath=True, cache=True)
def _sums(values: Any, n_parts: int) -> Any:
    """Sum of each part, all parts at once."""
    sums = np.zeros(n_parts, np.float32)
    size = len(values) // n_parts
    for part in numba.prange(n_parts):
        total = np.float32(0)
        for i in range(part * size, (part + 1) * size):
            total += values[i]
        sums[part] = total
    return sums


class Probe:
    """Memory to read, and the threads to read it with. The memory is freed with the object."""

    def __init__(self, n_threads: int) -> None:
        self._values = np.ones(N_BYTES // 4, np.float32)
        self._n_threads = min(n_threads, numba.get_num_threads())
        self.gb_per_s()

    def gb_per_s(self) -> float:
        """10^9 bytes per second, the best of a few passes."""
        before = numba.get_num_threads()
        numba.set_num_threads(self._n_threads)
        try:
            best = float("inf")
            for _ in range(PASSES):
                started = time.perf_counter()
                _sums(self._values, 4 * self._n_threads)
                best = min(best, time.perf_counter() - started)
        finally:
            numba.set_num_threads(before)
        return self._values.nbytes / best / 1e9
