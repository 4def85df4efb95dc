"""Signal handlers: a terminated command cleans up, and Ctrl-C stops an answer where it can be stopped."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def termination_unwinds() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGHUP unwind the stack as Ctrl-C does; the exit code is 128 + the signal's number.

    A signal that is ignored (``nohup``) stays ignored. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Interrupts:
    """Ctrl-C pressed within ``interrupts_noted``."""

    def __init__(self) -> None:
        self._noted = False

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed."""
        if self._noted:
            raise KeyboardInterrupt

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Interrupts]:
    """Inside the block, the first Ctrl-C is only noted, for code that calls ``check`` where it can stop; the second one raises
    ``KeyboardInterrupt`` wherever that is.

    Python raises it between any two instructions: within a destructor or a callback of a library it is lost, or ends the
    process. Must be called in the main thread.
    """
    interrupts = Interrupts()
    previous = signal.signal(signal.SIGINT, interrupts.note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
