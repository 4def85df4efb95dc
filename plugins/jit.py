"""Compilation of CPU kernels by numba, cached on disk if there is a place for that."""

import logging
from collections.abc import Callable
from typing import Any

import numba

_log = logging.getLogger(__name__)
_untold = [True]


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit(cache=True, **options)``; without a cache, and with one warning, if no folder for it can be written.

    An entry point for C, which takes time to compile, is left out. The one for Python is not: numba would end the process
    where a test calls a kernel without one.

    numba caches in ``__pycache__`` next to the kernel, else in the user's cache folder, or in NUMBA_CACHE_DIR. A service user
    in a container often can write neither.
    """

    options["no_cfunc_wrapper"] = True

    def compiled(kernel: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(kernel)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
        if _untold:
            _untold.clear()
            _log.warning(
                "compiled kernels cannot be cached, and are compiled again by each process (some seconds): neither the "
                "installation nor the home folder can be written; set NUMBA_CACHE_DIR to a folder that can"
            )
        return numba.njit(**options)(kernel)

    return compiled


def cache_folder() -> str | None:
    """The folder in which kernels are cached; None if they are not."""
    try:
        return str(numba.njit(cache=True)(cache_folder).stats.cache_path)
    except RuntimeError:
        return None
