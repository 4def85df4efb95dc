"""Who does what a step does not wait for, and when: a stream of its own on a GPU; elsewhere at once, or when a test says so."""

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]


class SideWork(Protocol):
    """Runs work in the order in which it came, never before what its caller had launched by then."""

    def submit(self, work: Work) -> None:
        """Take work that launches and does not wait; it may begin at once, later, or only when it is joined."""
        ...

    def join(self) -> None:
        """What the caller launches from here on comes after all that was submitted."""
        ...


class InPlace:
    """Nothing overlaps: work is done where it is submitted."""

    def submit(self, work: Work) -> None:
        work()

    def join(self) -> None:
        """All has been done."""


class SideStream:
    """A second stream of a GPU, forked from the caller's and joined to it by events; so both can be captured in one graph.

    What the work holds is kept until it is joined: memory that another stream still reads is not handed out again.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._submitted: list[Work] = []

    def submit(self, work: Work) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._submitted.append(work)
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        if self._submitted:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._submitted.clear()
