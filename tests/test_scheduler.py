"""The order of steps, without a model: who reads, who decodes, who waits, and what each of them has reserved."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engines import interrupted_at_line
from trt_kv.errors import CapacityError, UsageError
from trt_kv.runtime import scheduler as scheduler_module
from trt_kv.runtime.reservation import Places, RequestSize, Reservation
from trt_kv.runtime.scheduler import Scheduler, StepPlan


@dataclass(kw_only=True, eq=False)
class Fake:
    """A request, what it should have reserved, and how far it has come."""

    size: RequestSize
    priority: int = 0
    forks: Sequence["Fake"] = ()
    is_finished: bool = False
    n_read: int = 0
    n_decoded: int = 0
    n_overtaken: int = 0


class Tokens:
    """A resource of which reading needs more than decoding, or less."""

    name = "tokens"

    def __init__(self, total: int) -> None:
        self.total = total

    def while_reading(self, size: RequestSize) -> int:
        return max(3 * size.n_prompt, self.after_reading(size))

    def after_reading(self, size: RequestSize) -> int:
        return size.n_sequences * (size.n_prompt + size.max_new_tokens)

    def refusal(self, needed: int) -> CapacityError:
        return CapacityError("too few tokens", got=self.total, expected=needed)

    def secure(self, reserved: int) -> None:
        """Tokens are there from the start."""


def request(n_prompt: int, max_new_tokens: int = 3, *, priority: int = 0, n_forks: int = 0) -> Fake:
    size = RequestSize(n_prompt=n_prompt, max_new_tokens=max_new_tokens, n_sequences=1 + n_forks)
    forks = [Fake(size=dataclasses.replace(size, n_sequences=1)) for _ in range(n_forks)]
    return Fake(size=size, priority=priority, forks=forks)


class Schedules(RuleBasedStateMachine):
    """Arrivals, steps that end well or not, ends at any time, interruptions at any line; against a model in plain words."""

    @initialize(
        chunk=st.integers(1, 9),
        token_budget=st.none() | st.integers(1, 30),
        total=st.integers(60, 300),
        places=st.integers(3, 6),
        max_overtaken=st.integers(0, 3),
    )
    def open(self, chunk: int, token_budget: int | None, total: int, places: int, max_overtaken: int) -> None:
        self.chunk, self.budget, self.max_overtaken = chunk, token_budget or chunk, max_overtaken
        self.reservation = Reservation([Places(places), Tokens(total)])
        self.scheduler: Scheduler[Fake] = Scheduler(
            self.reservation, chunk=chunk, token_budget=token_budget, max_overtaken=max_overtaken
        )
        self.waiting: list[Fake] = []
        self.reading: Fake | None = None
        self.decoding: list[Fake] = []
        self.families: list[list[Fake]] = []
        self.tokens_since_decode = 0
        self.n_interrupted = 0

    @property
    def known(self) -> list[Fake]:
        running = [*self.decoding, *([self.reading] if self.reading is not None else [])]
        readers = [*self.waiting, *([self.reading] if self.reading is not None else [])]
        return [*self.waiting, *running, *(fork for reader in readers for fork in reader.forks if not fork.is_finished)]

    @rule(
        n_prompt=st.integers(1, 40), new=st.integers(1, 9), priority=st.integers(0, 2), n_forks=st.sampled_from([0, 0, 0, 1, 2])
    )
    def arrive(self, n_prompt: int, new: int, priority: int, n_forks: int) -> None:
        made = request(n_prompt, new, priority=priority, n_forks=n_forks)
        fits = all(r.while_reading(made.size) <= r.total for r in self.reservation.resources)
        try:
            self.scheduler.add(made)
        except CapacityError:
            assert not fits
            return
        assert fits
        self.waiting.append(made)

    @rule(fails=st.sampled_from([False] * 5 + [True]), ends=st.sets(st.integers(0, 5)))
    def step(self, fails: bool, ends: set[int]) -> None:
        plan = self.scheduler.schedule()
        self._run(plan, fails=fails, ends=ends)

    @rule(number=st.integers(0, 60))
    def step_that_is_interrupted_while_it_is_planned(self, number: int) -> None:
        plans: list[StepPlan[Fake] | None] = []
        if interrupted_at_line(number, [scheduler_module], lambda: plans.append(self.scheduler.schedule())):
            self.n_interrupted += 1
        else:
            self._run(plans[0], fails=False, ends=set())

    @rule(number=st.integers(0, 12))
    def step_that_is_interrupted_while_it_ends(self, number: int) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan)
            if interrupted_at_line(number, [scheduler_module], lambda: self.scheduler.complete(plan)):
                self._lose(plan)
            else:
                self._advance(plan, set())
        else:
            assert not self.known

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 30), number=st.none() | st.integers(0, 40))
    def end_anyone(self, which: int, number: int | None) -> None:
        """Whether waiting, reading or decoding, or the fork of one that has not been read."""
        one = self.known[which % len(self.known)]
        self._end(*(one.forks if one in self.waiting or one is self.reading else ()), one, interrupted_at=number)

    @invariant()
    def exactly_what_running_requests_need_is_reserved(self) -> None:
        needed = [0, 0]
        for family in self.families:
            reads = self.reading is family[0]
            for at, resource in enumerate(self.reservation.resources):
                needed[at] += (resource.while_reading if reads else resource.after_reading)(family[0].size)
        if not self.n_interrupted:
            assert self.reservation.used == needed
        assert all(free >= 0 for free in self.reservation.free)

    @invariant()
    def sizes_are_told(self) -> None:
        assert self.scheduler.n_running == len(self.decoding) + (self.reading is not None) or self.n_interrupted
        assert set(self.scheduler.waiting) == set(self.waiting) or self.n_interrupted
        assert all(one in self.scheduler for one in (*self.waiting, *self.decoding))

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            plan = self.scheduler.schedule()
            self._run(plan, fails=False, ends=set())
            if plan is None:
                break
        assert not self.known, "everybody comes to an end"
        assert self.reservation.used == [0, 0]
        assert not self.scheduler._families
        assert self.scheduler.n_waiting == self.scheduler.n_running == 0

    def _run(self, plan: StepPlan[Fake] | None, *, fails: bool, ends: set[int]) -> None:
        if plan is None:
            assert not self.known, "there is something to do"
            return
        self._check_plan(plan)
        if fails:
            self._lose(plan)
        else:
            self.scheduler.complete(plan)
            self._advance(plan, ends)

    def _check_plan(self, plan: StepPlan[Fake]) -> None:
        if plan.phase == "decode":
            assert list(plan.requests) == self.decoding, "everybody who decodes gets a token"
            assert plan.n_tokens == len(self.decoding)
            self.tokens_since_decode = 0
            return
        (reader,) = plan.requests
        if reader is not self.reading:
            assert self.reading is None, "one prompt is read at a time"
            self._check_turn(reader)
            self.waiting.remove(reader)
            self.reading = reader
            self.families.append([reader, *(fork for fork in reader.forks if not fork.is_finished)])
        assert plan.start == reader.n_read
        assert plan.start % self.chunk == 0
        assert plan.end == min(plan.start + self.chunk, reader.size.n_prompt)
        assert plan.reads_last == (plan.end == reader.size.n_prompt)
        if self.decoding:
            self.tokens_since_decode += plan.n_tokens
            assert self.tokens_since_decode <= max(self.budget, self.chunk)
        else:
            self.tokens_since_decode = 0

    def _check_turn(self, reader: Fake) -> None:
        before = self.waiting[: self.waiting.index(reader)]
        passed_by = [one for one in self.waiting if one.n_overtaken >= self.max_overtaken]
        if not self.n_interrupted:
            if passed_by:
                assert reader is passed_by[0], "whoever has been overtaken often enough"
            else:
                assert reader.priority == min(one.priority for one in self.waiting)
                assert all(one.priority > reader.priority for one in before), "first come, first served"
        for one in before:
            one.n_overtaken += 1
            assert one.n_overtaken <= self.max_overtaken + self.n_interrupted

    def _advance(self, plan: StepPlan[Fake], ends: set[int]) -> None:
        if plan.phase == "prefill":
            (reader,) = plan.requests
            reader.n_read = plan.end
            if plan.reads_last:
                self.reading = None
                self.decoding += [reader, *(fork for fork in reader.forks if not fork.is_finished)]
            return
        for at, one in enumerate(plan.requests):
            one.n_decoded += 1
            if at in ends or one.n_decoded == one.size.max_new_tokens:
                self._end(one)

    def _lose(self, plan: StepPlan[Fake]) -> None:
        for one in plan.requests:
            self._end(*(one.forks if plan.phase == "prefill" else ()), one)

    def _end(self, *ones: Fake, interrupted_at: int | None = None) -> None:
        for one in ones:
            one.is_finished = True
        for one in ones:
            if interrupted_at is not None:
                interrupted_at_line(interrupted_at, [scheduler_module], functools.partial(self.scheduler.remove, one))
            self.scheduler.remove(one)
            before = self.reservation.used
            self.scheduler.remove(one)
            assert self.reservation.used == before, "removing again changes nothing"
            self.waiting = [other for other in self.waiting if other is not one]
            self.decoding = [other for other in self.decoding if other is not one]
            self.reading = None if self.reading is one else self.reading
        running = [*self.decoding, self.reading]
        self.families = [family for family in self.families if any(member in running for member in family)]


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=40)


def plans_of(scheduler: Scheduler[Fake], watched: Fake, arrivals: Callable[[int], list[Fake]], n: int) -> list[tuple[int, int]]:
    """(start, end) of the chunks of ``watched`` in ``n`` steps, while others arrive."""
    chunks = []
    for at in range(n):
        for other in arrivals(at):
            scheduler.add(other)
        plan = scheduler.schedule()
        if plan is not None:
            scheduler.complete(plan)
            chunks += [(plan.start, plan.end) for one in plan.requests if one is watched and plan.phase == "prefill"]
    return chunks


@given(
    n_prompt=st.integers(1, 60),
    chunk=st.integers(1, 20),
    token_budget=st.none() | st.integers(1, 50),
    others=st.dictionaries(st.integers(0, 30), st.tuples(st.integers(1, 30), st.integers(-1, 1)), max_size=6),
)
def test_chunks_of_a_prompt_do_not_depend_on_others(
    n_prompt: int, chunk: int, token_budget: int | None, others: dict[int, tuple[int, int]]
) -> None:
    def chunks(arrivals: Callable[[int], list[Fake]]) -> list[tuple[int, int]]:
        scheduler: Scheduler[Fake] = Scheduler(Reservation([Places(10)]), chunk=chunk, token_budget=token_budget)
        watched = request(n_prompt)
        scheduler.add(watched)
        return plans_of(scheduler, watched, arrivals, 700)

    def arrivals(at: int) -> list[Fake]:
        return [request(others[at][0], priority=others[at][1])] if at in others else []

    alone = [(start, min(start + chunk, n_prompt)) for start in range(0, n_prompt, chunk)]
    assert chunks(lambda _: []) == chunks(arrivals) == alone


@given(max_overtaken=st.integers(0, 9), n_low=st.integers(1, 4), places=st.integers(1, 3))
def test_nobody_starves_under_endless_arrivals_of_a_higher_priority(max_overtaken: int, n_low: int, places: int) -> None:
    scheduler: Scheduler[Fake] = Scheduler(Reservation([Places(places)]), chunk=5, max_overtaken=max_overtaken)
    low = [request(7, priority=5) for _ in range(n_low)]
    for one in low:
        scheduler.add(one)
    started: list[Fake] = []
    while not set(low) <= set(started):
        scheduler.add(request(3, priority=0))
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.complete(plan)
        if plan.phase == "prefill" and plan.start == 0:
            started += plan.requests
        else:
            for one in plan.requests if plan.phase == "decode" else ():
                scheduler.remove(one)
        assert len(started) <= max_overtaken + n_low
    assert [one for one in started if one in low] == low


def test_a_fork_that_ends_before_the_prompt_was_read_never_decodes() -> None:
    scheduler: Scheduler[Fake] = Scheduler(Reservation([Places(3)]), chunk=4)
    reader = request(10, n_forks=2)
    scheduler.add(reader)
    first, second = reader.forks
    first.is_finished = True
    scheduler.remove(first)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.complete(plan)
    second.is_finished = True
    scheduler.remove(second)
    for _ in range(2):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.complete(plan)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.requests == (reader,)
    scheduler.remove(reader)
    assert scheduler.schedule() is None
    assert scheduler.reservation.used == [0]


@pytest.mark.parametrize("priority", [0, -1])
def test_an_interrupted_admission_blocks_nobody(priority: int) -> None:
    """At whatever line: the others are served, and so is the one that was about to be admitted."""
    number = 0
    while True:
        scheduler: Scheduler[Fake] = Scheduler(Reservation([Tokens(100)]), chunk=40)
        first, second = request(30), request(30, priority=priority)
        scheduler.add(first)
        if not interrupted_at_line(number, [scheduler_module], scheduler.schedule):
            break
        scheduler.add(second)
        ended: set[Fake] = set()
        for _ in range(20):
            plan = scheduler.schedule()
            if plan is None:
                break
            scheduler.complete(plan)
            for one in plan.requests if plan.phase == "decode" else ():
                scheduler.remove(one)
                ended.add(one)
        assert ended == {first, second}
        assert scheduler.reservation.used == [0]
        number += 1
    assert number > 10


def test_a_token_budget_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="bad token_budget"):
        Scheduler(Reservation([]), chunk=4, token_budget=0)


@given(budget=st.integers(1, 60), chunk=st.integers(1, 20), prompts=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_a_turn_reads_as_many_whole_chunks_as_its_budget_allows(budget: int, chunk: int, prompts: list[int]) -> None:
    """While somebody decodes: another chunk would exceed the budget, or there is none."""
    scheduler: Scheduler[Fake] = Scheduler(Reservation([Places(99)]), chunk=chunk, token_budget=budget)
    decoding = request(1, 1000)
    scheduler.add(decoding)
    for n in prompts:
        scheduler.add(request(n, 1000))
    chunks = [min(chunk, n - start) for n in prompts for start in range(0, n, chunk)]
    turn: list[int] = []
    is_first = True
    while chunks or turn:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.complete(plan)
        if plan.phase == "decode":
            assert sum(turn) <= max(budget, chunk)
            assert is_first or not chunks or sum(turn) + chunks[0] > budget
            turn, is_first = [], False
        elif plan.requests != (decoding,):
            turn.append(plan.n_tokens)
            assert chunks.pop(0) == plan.n_tokens


def test_a_request_is_admitted_when_its_first_chunk_is_read_and_not_before() -> None:
    """While decoding has its turn, one of a higher priority may still come first, and nothing is reserved."""
    reservation = Reservation([Places(3), Tokens(60)])
    scheduler: Scheduler[Fake] = Scheduler(reservation, chunk=1)
    first, second, urgent = request(1, 5), request(1, 5, priority=1), request(1, 5)
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.complete(plan)
    reserved = reservation.used
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.phase, reservation.used, scheduler.waiting) == ("decode", reserved, [second])
    scheduler.complete(plan)
    scheduler.add(urgent)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.requests == (urgent,)
