"""Runs work that no step waits for: on a second stream of a GPU, in place on other devices, or as a test chooses."""

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]


class SideWork(Protocol):
    """Runs work in submission order, after everything that the caller has launched before."""

    def submit(self, work: Work) -> None:
        """Submit work that launches kernels and does not wait. It may begin immediately, later, or only when joined."""
        ...

    def join(self) -> None:
        """Order everything that the caller launches from here on after all submitted work."""
        ...


class InPlace:
    """Runs work when it is submitted, without overlap."""

    def submit(self, work: Work) -> None:
        work()

    def join(self) -> None:
        """Does nothing: all work is done."""


class SideStream:
    """A second stream of a GPU, forked from the caller's and joined to it by events, so that both can be captured in one graph.

    Work is referenced until it is joined, so that torch does not reuse memory that this stream still reads.
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
