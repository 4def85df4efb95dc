"""Which requests a server takes: as many as its queue may hold, and none once it shuts down."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from trt_kv.errors import BusyError, UsageError
from trt_kv.runtime.request import Request
from trt_kv.runtime.statistics import EngineStatistics

LONGEST_RETRY_S = 60


@dataclass(eq=False)
class Ticket:
    """A request that has been taken; ``request`` once its prompt has been encoded and it is in the engine's queue."""

    request: Request | None = field(default=None)

    @property
    def waits(self) -> bool:
        """Whether it has not been started."""
        return self.request is None or (self.request.times.admitted is None and not self.request.is_finished)

    def end(self) -> None:
        """End the request with what it has. Returns at once."""
        for one in self.request.family if self.request is not None else ():
            one.cancelled = True


class Admission:
    """Counts the requests of one server. Not for several threads: its event loop owns it."""

    def __init__(self, statistics: EngineStatistics, *, max_queue: int) -> None:
        """``max_queue``: the most requests that wait to be started."""
        if max_queue < 1:
            raise UsageError("bad max_queue", got=max_queue, expected="an integer >= 1", parameter="max_queue")
        self.is_draining = False
        self.is_over = False
        self.n_refused = 0
        self._statistics = statistics
        self._max_queue = max_queue
        self._tickets: set[Ticket] = set()

    @property
    def n_inside(self) -> int:
        """Requests that have been taken and have not ended."""
        return len(self._tickets)

    def end_all(self) -> None:
        """End every request: the time to drain is over."""
        self.is_draining = self.is_over = True
        for ticket in self._tickets:
            ticket.end()

    def check_open(self) -> None:
        """``BusyError`` if no request can be taken now."""
        if self.is_draining:
            self.n_refused += 1
            raise shutting_down()
        n_waiting = sum(ticket.waits for ticket in self._tickets)
        if n_waiting >= self._max_queue:
            self.n_refused += 1
            raise BusyError(
                "the queue is full",
                got=f"{n_waiting} requests that wait",
                retry_after_s=self._retry_after_s,
                fix="send the request again later, or enlarge the queue (--max-queue)",
            )

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """A place for one request, for as long as the block lasts; ``BusyError`` if there is none."""
        self.check_open()
        ticket = Ticket()
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)

    @property
    def _retry_after_s(self) -> int:
        """About how long requests have waited so far."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._statistics.time_in_queue.mean)))


def shutting_down() -> BusyError:
    """The error of requests that a server ends, or does not take, because it stops."""
    return BusyError("the server is shutting down", retry_after_s=1, fix="send the request again, to another server")
