"""Decides which step comes next, from sizes and order alone: without model, memory or clock, so that it can be tested alone.

A turn is a decode step of all decoding requests, and then chunks of prompts up to a token budget. Prompts are prefilled one at
a time: the next request is admitted when the previous prompt is done. So the order is decided as late as possible, and the
memory that only prefill needs is reserved once.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, Self, TypeVar

from trt_kv.errors import UsageError
from trt_kv.runtime.reservation import RequestSize, Reservation

MAX_OVERTAKEN = 64
"""The most requests of a higher priority that came later and may start before a waiting one."""


Contra = TypeVar("Contra", contravariant=True)


class Schedulable(Protocol):
    """The properties of a request that the scheduler uses."""

    @property
    def size(self) -> RequestSize: ...

    @property
    def priority(self) -> int:
        """Lower numbers start first."""
        ...

    @property
    def forks(self) -> Sequence[Self]:
        """Requests that continue from this one's prompt, with sequences of their own."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether it has ended. A fork may end before the prompt has been read."""
        ...


R = TypeVar("R", bound=Schedulable)


class Sharing(Protocol[Contra]):
    """Memory that requests share, which changes what they reserve: their ``size``."""

    def join(self, request: Contra, /) -> None:
        """A request is about to reserve what it needs."""
        ...

    def leave(self, request: Contra, /) -> None:
        """It was not admitted, or has ended and holds nothing. May be called again, and for any request."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepPlan(Generic[R]):
    """One step: tokens ``start`` to ``end`` of the prompt of one request ("prefill"), or one token for each ("decode")."""

    phase: Literal["prefill", "decode"]
    requests: tuple[R, ...]
    start: int = 0
    end: int = 0
    reads_last: bool = False
    """Whether the step is the last one of its prompt."""

    @property
    def n_tokens(self) -> int:
        return self.end - self.start if self.phase == "prefill" else len(self.requests)


@dataclass(kw_only=True)
class _Waiting(Generic[R]):
    request: R
    arrival: int
    n_overtaken: int = 0


class Scheduler(Generic[R]):
    """Waiting requests, the one in prefill, and those that decode.

    Within a priority requests start in order of arrival: none overtakes a request that waits for memory. Requests of a higher
    priority overtake others, but each waiting request is overtaken at most ``max_overtaken`` times, so none starves.
    """

    def __init__(
        self,
        reservation: Reservation,
        *,
        chunk: int,
        token_budget: int | None = None,
        max_overtaken: int = MAX_OVERTAKEN,
        sharing: Sharing[R] | None = None,
    ) -> None:
        """``chunk``: prompt tokens per prefill step; a request's chunks never depend on other requests. ``token_budget``: the
        most prompt tokens per turn, though at least one chunk; None: ``chunk``.
        """
        if token_budget is not None and token_budget < 1:
            raise UsageError("bad token_budget", got=token_budget, expected="tokens >= 1, or None: one chunk per turn")
        self.reservation = reservation
        self._sharing = sharing
        self._chunk = chunk
        self._token_budget = chunk if token_budget is None else token_budget
        self._budget_left = self._token_budget
        self._max_overtaken = max_overtaken
        self._arrivals = itertools.count()
        self._waiting: list[_Waiting[R]] = []
        self._reading: R | None = None
        self._n_read = 0
        self._decoding: list[R] = []
        self._families: dict[int, tuple[R, ...]] = {}
        """By the id of each admitted request and fork: the request that made the reservation for all of them, and its forks."""

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Sequences that have been admitted and have not ended."""
        return len(self._decoding) + (self._reading is not None)

    def __contains__(self, request: R) -> bool:
        """Whether a request is waiting, or has been admitted and not removed."""
        return id(request) in self._families or any(entry.request is request for entry in self._waiting)

    @property
    def waiting(self) -> list[R]:
        """Requests that have not been admitted, in order of arrival."""
        return [entry.request for entry in self._waiting]

    def add(self, request: R) -> None:
        """Put a request into the queue; ``CapacityError`` if it can never be served."""
        self.reservation.check(request.size)
        self._waiting.append(_Waiting(request=request, arrival=next(self._arrivals)))

    def schedule(self) -> StepPlan[R] | None:
        """The next step; None if there is nothing to do. After it the caller calls ``complete``, or ``remove`` if it failed."""
        first = self._first_waiting() if self._reading is None else None
        request = self._reading if first is None else first.request
        if request is not None:
            start, n_prompt = (self._n_read if first is None else 0), request.size.n_prompt
            end = min(start + self._chunk, n_prompt)
            if self._has_budget_for(end - start) and (first is None or self._admit(first)):
                self._budget_left -= end - start
                return StepPlan(phase="prefill", requests=(request,), start=start, end=end, reads_last=end == n_prompt)
        self._budget_left = self._token_budget
        return StepPlan(phase="decode", requests=tuple(self._decoding)) if self._decoding else None

    def skip_to(self, plan: StepPlan[R], start: int) -> StepPlan[R]:
        """The step in place of a prompt's first one, if its first ``start`` tokens need not be read."""
        (request,) = plan.requests
        end = min(start + self._chunk, request.size.n_prompt)
        self._budget_left += plan.n_tokens - (end - start)
        self._n_read = start
        return dataclasses.replace(plan, start=start, end=end, reads_last=end == request.size.n_prompt)

    def complete(self, plan: StepPlan[R]) -> None:
        """Record that a step has been run. After the last chunk of a prompt, its request and the forks start to decode."""
        if plan.phase == "decode":
            return
        (request,) = plan.requests
        self._n_read = plan.end
        if plan.reads_last:
            self._reading = None
            self.reservation.finish_reading(id(request))
            self._decoding += [request, *(fork for fork in request.forks if not fork.is_finished)]

    def remove(self, request: R) -> None:
        """Remove a request that has ended in any way. Its reservation is released when its forks have ended, too.

        Does nothing if the request is not here, so it may be called again after an interruption.
        """
        if self._sharing is not None:
            self._sharing.leave(request)
        self._waiting = [entry for entry in self._waiting if entry.request is not request]
        self._decoding = [other for other in self._decoding if other is not request]
        if self._reading is request:
            self._reading = None
        family = self._families.get(id(request), (request,))
        if not any(member is self._reading or member in self._decoding for member in family):
            self.reservation.release(id(family[0]))
            for member in sorted(family, key=lambda member: member is request):
                self._families.pop(id(member), None)

    def _has_budget_for(self, n_tokens: int) -> bool:
        """Whether prompt tokens may be read before the next decode step. One chunk may, however long it is."""
        return not self._decoding or self._budget_left == self._token_budget or self._budget_left >= n_tokens

    def _first_waiting(self) -> _Waiting[R] | None:
        """The request that is next to be admitted, once an interrupted admission has been undone."""
        decoding = {id(request) for request in self._decoding}
        self._waiting = [entry for entry in self._waiting if id(entry.request) not in decoding]
        for entry in self._waiting:
            self.reservation.release(id(entry.request))
            if self._sharing is not None:
                self._sharing.leave(entry.request)
        passed_by = [entry for entry in self._waiting if entry.n_overtaken >= self._max_overtaken]
        return min(passed_by or self._waiting, key=lambda e: (0 if passed_by else e.request.priority, e.arrival), default=None)

    def _admit(self, first: _Waiting[R]) -> bool:
        """Reserve what a request needs and start to read its prompt; False, without effect, if that is not free now.

        If interrupted before ``_reading`` is set, the request has not been admitted.
        """
        request = first.request
        if self._sharing is not None:
            self._sharing.join(request)
        if not self.reservation.reserve(id(request), request.size):
            if self._sharing is not None:
                self._sharing.leave(request)
            return False
        family = (request, *(fork for fork in request.forks if not fork.is_finished))
        for member in family:
            self._families[id(member)] = family
        self._n_read = 0
        self._reading = request
        self._waiting.remove(first)
        for entry in self._waiting:
            entry.n_overtaken += entry.arrival < first.arrival
        return True
