"""The engine's loop: schedule a step, run it, deliver its results to the requests. All generation goes through it."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from trt_kv.errors import CapacityError, EngineError, RecallError, TrtKvError, UsageError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.step import Chosen
from trt_kv.runtime.generation import FinishReason
from trt_kv.runtime.kernel_threads import release_kernel_threads
from trt_kv.runtime.memory import memory_error
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.prefix.cache import PrefixCache
from trt_kv.runtime.prefix.sharing import PageSharing
from trt_kv.runtime.processes import check_not_forked
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import Reservation
from trt_kv.runtime.scheduler import Scheduler, StepPlan
from trt_kv.runtime.statistics import EngineStatistics

Result = TypeVar("Result")

NOTICE_S = 0.05
"""Polling interval of waiting threads, in seconds: an interrupted thread may not have notified the others."""


class EngineCore:
    """Runs requests on one ``ModelRunner``. All methods may be called from any thread.

    It has no thread of its own: threads that wait for a request run the steps, one thread at a time, and each step serves all
    requests. A request's pages are freed before the first step after its end.
    """

    def __init__(
        self,
        runner: ModelRunner,
        reservation: Reservation,
        *,
        token_budget: int | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """``token_budget``: see ``Scheduler``. ``prefixes``: where prompts find tokens that were read before."""
        self.runner = runner
        self.prefixes = prefixes
        self._process = os.getpid()
        self.statistics = EngineStatistics()
        self.sharing: PageSharing | None = None
        if prefixes is not None and runner.blocks.are_final:
            self.sharing = PageSharing(prefixes, runner.blocks, reservation)
        self._scheduler: Scheduler[Request] = Scheduler(
            reservation, chunk=runner.chunk, token_budget=token_budget, sharing=self.sharing
        )
        self._stepping = threading.Lock()
        self._stepping_thread: int | None = None
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._live: list[Request] = []
        """Requests that may hold pages: from ``add`` until all of their pages have been freed."""
        self._is_closed = False
        self._running: StepPlan[Request] | None = None
        """The step in progress. If it is still set at the next sweep, handling its failure was interrupted."""

    @property
    def reservation(self) -> Reservation:
        return self._scheduler.reservation

    def add(self, requests: Iterable[Request]) -> None:
        """Queue all requests or none. ``CapacityError`` if one can never be served, ``UsageError`` if the engine is closed."""
        requests = list(requests)
        check_not_forked(self._process)
        if self._is_closed:
            raise UsageError("the engine has been closed", expected="an open engine", fix="load it again")
        for request in requests:
            try:
                self.reservation.check(request.size)
            except CapacityError as error:
                if len(requests) == 1:
                    raise
                what = f"{request.name}: {error.what}"
                raise CapacityError(what, got=error.got, expected=error.expected, fix=error.fix) from error
        self._inbox += requests
        if self._is_closed:  # in the meantime, perhaps without seeing these
            self._alone(self._sweep)
        self._notify()

    def cancel(self, request: Request) -> None:
        """End a request and its forks. Its pages are freed immediately, or when the running step ends."""
        for one in (request, *request.forks):
            one.cancelled = True
        if os.getpid() != self._process:
            return
        if not self._stepping.locked():
            self._alone(self._sweep)
            self._notify()

    def wait(self, until: Callable[[], bool], *, comes_back: bool = False) -> None:
        """Run steps until ``until()`` is true, which must follow from the progress of requests.

        ``comes_back``: the caller will wait again soon, so the threads of its kernels stay.

        An interrupt of this thread in the middle of a step (Ctrl-C) ends the requests of that step and is raised here.
        """
        check_not_forked(self._process)
        has_stepped = False
        try:
            while not until():
                self._check_outside_steps()
                if self._stepping.locked():
                    with self._changed:
                        self._changed.wait_for(lambda: until() or not self._stepping.locked(), NOTICE_S)
                    continue
                has_run = self._alone(lambda: until() or self._step())
                has_stepped = True
                self._notify()
                if not has_run:
                    with self._changed:
                        self._changed.wait(NOTICE_S)
        finally:
            if has_stepped and not comes_back:
                release_kernel_threads()

    def run_until_idle(self) -> None:
        """Run steps until every request has ended."""
        self.wait(lambda: not self._inbox and not self._live)

    def wait_for_work(self, timeout_s: float) -> None:
        """Return when there is something to run, or after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._inbox or self._live) or self._is_closed, timeout_s)

    def close(self) -> None:
        """End all requests, stop background work and free a host tier. Nothing runs afterwards. In a fork: does nothing."""
        if os.getpid() != self._process:
            return
        self._check_outside_steps()
        self._is_closed = True
        self._alone(self._close)
        self._notify()

    def _close(self) -> None:
        self._sweep()
        self.runner.close()

    def _check_outside_steps(self) -> None:
        """``UsageError`` if this thread is running a step: waiting for that step would never end."""
        if self._stepping.locked() and self._stepping_thread == threading.get_ident():
            raise UsageError("an engine cannot be called from inside one of its steps", fix="call it after the step")

    def _alone(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, run while no other thread runs steps."""
        with self._stepping:
            self._stepping_thread = threading.get_ident()
            try:
                return work()
            finally:
                self._stepping_thread = None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take_in(self) -> None:
        """Pass added requests to the scheduler. May be called again after an interruption."""
        while self._inbox:
            request = self._inbox[0]
            if request not in self._scheduler:
                self._scheduler.add(request)
            self._live += [one for one in (request, *request.forks) if one not in self._live]
            self._inbox.pop(0)

    def _step(self) -> bool:
        """Run the next step; False if there is none."""
        started = time.perf_counter()
        self._sweep()
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        self.statistics.n_waiting, self.statistics.n_running = self._scheduler.n_waiting, self._scheduler.n_running
        planned = ran = time.perf_counter()
        self._running = plan
        try:
            if plan.phase == "prefill" and plan.start == 0:
                self._running = plan = self._begin(plan)
            rows = self._run(plan)
            ran = time.perf_counter()
            self._finish_step(plan, rows, ran - planned)
        except Exception as error:  # noqa: BLE001  (ends the step's requests, whatever it is)
            self._fail(plan, memory_error(error, "a step") or error)
        except BaseException as interrupt:
            self._fail(plan, _interrupted(type(interrupt).__name__))
            self._sweep()
            raise
        self._running = None
        delivered = time.perf_counter()
        self._sweep()
        counts = self.statistics
        counts.steps_s += ran - planned
        counts.sampling_s += delivered - ran
        for request in plan.requests:
            _notify_client(request)
        counts.planning_s += planned - started + time.perf_counter() - delivered
        return True

    def _run(self, plan: StepPlan[Request]) -> Sequence[Floats | Chosen] | Floats:
        """Logits of each request; or its token, if the runner can choose those of the whole step."""
        if plan.phase == "decode" and self.runner.chooses and not any(request.needs_logits for request in plan.requests):
            return self.runner.run_choosing(plan, [request.choice() for request in plan.requests])
        return self.runner.run(plan)

    def _begin(self, plan: StepPlan[Request]) -> StepPlan[Request]:
        """Start a request's prefill; returns its first step, behind a prefix that is cached. ``CapacityError`` if what it has
        reserved cannot be had.
        """
        (request,) = plan.requests
        self.reservation.secure()
        request.held_sequence = self.runner.new_sequence()
        request.times.admitted = time.monotonic()
        self.statistics.time_in_queue.add(request.times.admitted - request.times.arrived)
        if request.begins_with is not None:
            self.runner.states.place(request.held_sequence, request.begins_with)
            return plan
        if self.prefixes is None:
            return plan
        shared = None if self.sharing is None else self.sharing.used_by(request)
        n_cached = self.prefixes.begin(request.held_sequence, request.prefix_keys(self.prefixes), shared)
        request.n_cached = n_cached
        self._share(request, n_cached)
        return self._scheduler.skip_to(plan, n_cached) if n_cached else plan

    def _share(self, request: Request, n_read: int) -> None:
        """Let later requests use the pages of what a request has read, if their prompts begin alike."""
        if self.sharing is not None and request.sequence.failure is None:
            self.sharing.give(request, n_read)

    def _finish_step(self, plan: StepPlan[Request], rows: Sequence[Floats | Chosen] | Floats, seconds: float) -> None:
        """Deliver the results of a step to its requests."""
        self._scheduler.complete(plan)
        counts = self.statistics
        if plan.phase == "prefill":
            (request,) = plan.requests
            counts.prefill_steps += 1
            counts.prompt_tokens += plan.n_tokens
            request.n_prompt_read = plan.end
            request.times.prompt_s += seconds
            if request.sequence.failure is not None:
                self._fail(plan, request.sequence.failure)
            elif plan.reads_last:
                self._end_prompt(request, rows[0])
            elif self.prefixes is not None and request.begins_with is None:
                self.prefixes.keep(request.sequence, request.prefix_keys(self.prefixes), plan.end)
                self._share(request, plan.end)
            return
        counts.decode_steps += 1
        counts.generated_tokens += plan.n_tokens
        for request, row in zip(plan.requests, rows, strict=True):
            request.times.decode_s += seconds / plan.n_tokens
            self._deliver(request, row)

    def _end_prompt(self, request: Request, row: Floats | Chosen) -> None:
        """After prefill: fork the sequence, and sample the first token of the request and of each fork."""
        sequence = request.sequence
        request.prompt_kv_tokens = tuple(int(n) for n in sequence.held_tokens)
        for fork in request.forks:
            if fork.is_finished:
                continue
            fork.prompt_kv_tokens, fork.n_prompt_read = request.prompt_kv_tokens, request.n_prompt_read
            fork.times.admitted = request.times.admitted
            try:
                fork.held_sequence = sequence.fork()
            except TrtKvError as error:
                fork.end("error", error)
        for one in (request, *request.forks):
            if not one.is_finished:
                self._deliver(one, row)

    def _deliver(self, request: Request, row: Floats | Chosen) -> None:
        if request.sequence.failure is not None:
            request.end("error", request.sequence.failure)
            return
        times = request.times.tokens
        n_before = len(times)
        try:
            request.accept(row)
        except Exception as error:  # noqa: BLE001  (ends this request only, not the others of the step)
            request.end("error", error)
            return
        if len(times) == n_before:
            return
        if n_before == 0:
            self.statistics.time_to_first_token.add(times[0] - request.times.arrived)
        else:
            self.statistics.time_between_tokens.add(times[-1] - times[-2])

    def _keep_state(self, request: Request) -> None:
        """Copy what an ended request holds, if a next turn is to go on from it."""
        if request.keeps_state and request.state is None and request.finish_reason in ("stop", "length"):
            try:
                request.state = self.runner.states.read(request.sequence)
            except (MemoryError, RecallError) as error:  # as in the middle of an answer
                request.error = memory_error(error, "a turn of a conversation") or error

    def _fail(self, plan: StepPlan[Request], error: Exception) -> None:
        """End the requests of a failed step; with a prompt's, all of its forks, which have no token to continue from."""
        for request in plan.requests:
            for one in (request, *(request.forks if plan.phase == "prefill" else ())):
                one.end("error", error)
        self._running = None

    def _sweep(self) -> None:
        """Take in new requests, end cancelled and timed out ones, and free what ended requests hold.

        After an interruption the next call completes it.
        """
        if self._running is not None:
            self._fail(self._running, _interrupted("two interruptions"))
        self._take_in()
        now = time.monotonic()
        for request in self._live:
            if self._is_closed:
                request.end("error", EngineError("the engine was closed before the request had ended", fix="load it again"))
            elif request.cancelled:
                _end_with_forks(request, "cancelled")
            elif request.deadline is not None and now >= request.deadline:
                _end_with_forks(request, "timeout")
        ended = [request for request in self._live if request.is_finished]
        for request in ended:
            self._keep_state(request)
            request.close()
            self._scheduler.remove(request)
        if ended:
            for request in ended:
                self.statistics.count_end(request.result(), now)
                _notify_client(request)
            self._live = [request for request in self._live if not request.is_finished]
        self.statistics.n_waiting, self.statistics.n_running = self._scheduler.n_waiting, self._scheduler.n_running


def _notify_client(request: Request) -> None:
    """Call ``on_update``. A client that cannot be called is gone: its request is cancelled."""
    if request.on_update is not None:
        try:
            request.on_update()
        except Exception:  # noqa: BLE001  (the client's own; the other requests continue)
            request.cancelled = True


def _end_with_forks(request: Request, reason: FinishReason) -> None:
    """End a request that has not ended, and its forks that have no sequence yet."""
    if not request.is_finished:
        for one in (*(fork for fork in request.forks if fork.held_sequence is None), request):
            one.end(reason)


def _interrupted(by: str) -> EngineError:
    return EngineError("a step was interrupted, and its requests cannot continue", got=by, fix="send them again")
