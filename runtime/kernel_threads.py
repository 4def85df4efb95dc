"""The threads that OpenMP keeps for each thread that starts parallel kernels.

GNU's OpenMP counts the threads of all of them, working or not. Once they are more than the processors, none waits awake for the
next kernel any more (``trt_kv/openmp.py``), and a decode step, which is a hundred kernels, takes three times as long
(docs/decisions/0076). So a thread that has ended its work gives its threads back.
"""

import ctypes
import functools
import os
from typing import Any

_HARD = 2
"""OpenMP's ``omp_pause_hard``: end the threads."""


def release_kernel_threads() -> None:
    """End the threads that wait for kernels of the calling thread, outside of kernels. The next kernel starts them again.

    Takes about 100 microseconds if there are any. Does nothing where kernels do not run on GNU's OpenMP.
    """
    library = _openmp()
    if library is not None:
        library.omp_pause_resource_all(_HARD)


@functools.cache
def _openmp() -> Any:
    """The GNU OpenMP that this process has loaded, with the function needed; else None."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        library.omp_pause_resource_all.argtypes = [ctypes.c_int]
    except (AttributeError, OSError):  # another OpenMP or system; before GCC 9
        return None
    return library
