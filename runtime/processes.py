"""Forks: threads that compute do not survive them, so an engine works only in the process that loaded it."""

import ctypes
import functools
import os
import weakref

from trt_kv.errors import UsageError

SPAWN = 'start processes with multiprocessing.get_context("spawn"), and load an engine in each'
_computing: int | None = None
"""Number of the process, this one or the parent that it was forked from, in which kernels have run; None: in neither."""

_with_threads: weakref.WeakSet[object] = weakref.WeakSet()


def never_destroy_in_forks(owner: object) -> None:
    """Never call the destructor of ``owner`` in forks of this process: it would wait for threads that are not there."""
    _register()
    _with_threads.add(owner)


@functools.cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_destructors)


def _forget_destructors() -> None:
    for owner in _with_threads:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def check_not_forked(process: int) -> None:
    """``UsageError`` unless this is still the process of this number: a step would wait for threads that are not here."""
    if os.getpid() != process:
        raise UsageError(
            "an engine cannot be used in a fork of the process that loaded it",
            got=f"process {os.getpid()}",
            expected=f"process {process}",
            fix=SPAWN,
        )


def check_can_load() -> None:
    """``UsageError`` in a fork of a process in which kernels have run: OpenMP would end this one, or wait for ever."""
    if _computing not in (None, os.getpid()):
        raise UsageError(
            "an engine cannot be loaded in a fork of a process that has loaded or built one",
            got=f"process {os.getpid()}, a fork of {_computing}",
            expected="a process whose kernels' threads are its own",
            fix=SPAWN + "; or fork before the first engine is loaded or built",
        )


def will_compute() -> None:
    """Kernels, ours or torch's, are about to run in this process."""
    global _computing
    _computing = os.getpid()
