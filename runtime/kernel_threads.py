"""The threads that OpenMP keeps for each thread that starts parallel kernels: where they run, and when they end.

**They end** with the work of the thread that they are kept for. GNU's OpenMP counts the threads of all of them, working or not.
Once they are more than the processors, none waits awake for the next kernel any more (``trt_kv/openmp.py``), and a decode step,
which is a hundred kernels, takes three times as long.

**Each is bound to a processor** if there are as many threads as processors. Threads that wake each other a thousand times a
second are often put on one processor by Linux, side by side with an idle one, where they wait for each other for half a second
(docs/decisions/0076).
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from numba import types

from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Ints

_HARD = 2
"""OpenMP's ``omp_pause_hard``: end the threads."""
_gettid: Any = types.ExternalFunction("gettid", types.int32())
_loaded: dict[str, Any] = {}
_known = threading.local()
"""Of a thread whose kernels' threads have been looked at: ``cpu``, the processor that is left for it, None if none is;
``cpus``: all that it may use.
"""


def release_kernel_threads() -> None:
    """End the threads that wait for kernels of the calling thread, outside of kernels. The next kernel starts them again.

    Takes about 100 microseconds if there are any. Does nothing where kernels do not run on GNU's OpenMP.
    """
    vars(_known).clear()
    library = _openmp()
    if library is not None:
        library.omp_pause_resource_all(_HARD)


@contextlib.contextmanager
def kernel_threads_bound() -> Iterator[None]:
    """Let the kernels' threads of the calling thread run on a processor each meanwhile, if they are as many as the processors
    that it may use.
    """
    if not hasattr(_known, "cpu"):
        _known.cpu, _known.cpus = _bind_others()
    if _known.cpu is None:
        yield
        return
    os.sched_setaffinity(0, {_known.cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, _known.cpus)


def _bind_others() -> tuple[int | None, set[int]]:
    """Bind all threads but the calling one; returns the processor that is left for it, None if none is, and all of them."""
    if sys.platform != "linux" or _openmp() is None or not _tells_ids():
        return None, set()
    cpus = os.sched_getaffinity(0)
    ids = np.zeros(numba.get_num_threads(), np.int64)
    if not 1 < len(ids) == len(cpus):
        return None, cpus
    _tell_ids(ids)
    others = {int(number) for number in ids} - {threading.get_native_id()}
    if len(others) != len(cpus) - 1:
        return None, cpus
    left = sorted(cpus)
    for number in others:
        os.sched_setaffinity(number, {left.pop()})
    return left[0], cpus


@njit(parallel=True)
def _tell_ids(ids_T: Ints) -> None:
    """The numbers by which Linux knows the threads that a kernel of so many tasks runs on."""
    for i in numba.prange(len(ids_T)):
        ids_T[np.int64(i)] = _gettid()


@functools.cache
def _tells_ids() -> bool:
    """Whether the C library has the function (since glibc 2.30)."""
    return hasattr(ctypes.CDLL(None), "gettid")


def _openmp() -> Any:
    """The GNU OpenMP that this process has loaded, with the function needed; else None."""
    if "openmp" not in _loaded:
        try:
            library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.omp_pause_resource_all.argtypes = [ctypes.c_int]
        except (AttributeError, OSError):  # another one or none, perhaps not yet; before GCC 9
            return None
        _loaded["openmp"] = library
    return _loaded["openmp"]
