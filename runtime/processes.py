"""Forks: threads that compute do not survive them, so an engine works only in the process that loaded it."""

import os

from trt_kv.errors import UsageError

SPAWN = 'start processes with multiprocessing.get_context("spawn"), and load an engine in each'
_computing: list[int] = []
"""Numbers of the processes, this one or its parents, in which kernels have run."""


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
    if _computing and _computing[-1] != os.getpid():
        raise UsageError(
            "an engine cannot be loaded in a fork of a process that has loaded one",
            got=f"process {os.getpid()}, a fork of {_computing[-1]}",
            expected="a process whose kernels' threads are its own",
            fix=SPAWN + "; or fork before the first engine is loaded",
        )


def will_compute() -> None:
    """Kernels are about to run in this process."""
    _computing[:] = [os.getpid()]
