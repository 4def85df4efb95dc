"""One engine for several threads: nobody's tokens change, and whoever is interrupted or closed out is told so."""

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, ModuleType
from typing import Any

import pytest

from tests.engines import interrupted_at_line
from tests.serving import assert_idle, engine_under, prompts_of, small_policy, steps_changed
from trt_kv.errors import EngineError, UsageError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime import engine_core
from trt_kv.runtime import request as request_module
from trt_kv.runtime import scheduler as scheduler_module
from trt_kv.runtime.cache import sequence as sequence_module
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.scheduler import StepPlan

ENDING = "_fail _sweep end _say close remove"
LENGTHS = (37, 5, 61, 16, 50, 28)


@pytest.fixture(params=["prefixkv_paper", "freekv"])
def engine(request: pytest.FixtureRequest, small_engine: Engine) -> Iterator[Engine]:
    with engine_under(small_engine, small_policy(request.param)) as engine:
        yield engine


@pytest.fixture
def one_engine(small_engine: Engine) -> Iterator[Engine]:
    with engine_under(small_engine, small_policy("prefixkv_paper")) as engine:
        yield engine


def together(*works: Callable[[], Any], timeout_s: float = 60.0) -> list[Any]:
    """What each of ``works`` returns, or the exception it raises, each in a thread of its own, begun at one moment."""
    begin = threading.Barrier(len(works))

    def outcome(work: Callable[[], Any]) -> Any:
        begin.wait(timeout_s)
        try:
            return work()
        except BaseException as error:  # noqa: BLE001  (what it is, is what the test looks at)
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout_s) for future in [pool.submit(outcome, work) for work in works]]


@contextlib.contextmanager
def looking_at_every_line(modules: Sequence[ModuleType], look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` before each line of ``modules`` that this thread executes."""
    files, previous = {module.__file__ for module in modules}, sys.gettrace()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            sys.settrace(None)
            look()
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def test_threads_that_generate_stream_close_and_cancel_do_not_disturb_each_other(engine: Engine) -> None:
    prompts = prompts_of(engine, LENGTHS)
    params: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.2, "seed": 6}
    alone = [engine.generate(prompt, **params) for prompt in prompts]

    def generates() -> None:
        for _ in range(3):
            assert engine.generate(prompts[0], **params) == alone[0]

    def asks_for_batches() -> None:
        for _ in range(3):
            assert engine.generate_batch(prompts[1:4], **params) == alone[1:4]

    def streams() -> None:
        for _ in range(3):
            stream = engine.stream(prompts[4], **params)
            assert "".join(stream) == alone[4].text
            assert stream.result == alone[4]

    def closes_streams() -> None:
        for n in range(8):
            stream = engine.stream(prompts[5], **params)
            for _ in range(n % 4):
                next(stream, None)
            stream.close()
            assert stream.result.token_ids == alone[5].token_ids[: len(stream.result.token_ids)]

    def drops_streams() -> None:
        for n in range(8):
            stream = engine.stream(prompts[2], **params)
            for _ in range(n % 3):
                next(stream, None)

    def cancels() -> None:
        for _ in range(8):
            request = engine.submit(prompts[3], **params)
            time.sleep(0.003)
            engine.core.cancel(request)

    outcomes = together(generates, asks_for_batches, streams, closes_streams, drops_streams, cancels)
    assert outcomes == [None] * 6
    engine.core.run_until_idle()
    assert_idle(engine)


def test_closing_a_stream_while_another_thread_is_in_a_step_changes_nothing_there(engine: Engine) -> None:
    """Closed from inside the other thread's step, at each of them in turn."""
    prompts = prompts_of(engine, (37, 50))
    alone = engine.generate(prompts[0], max_new_tokens=8)
    for at in range(8):
        stream = engine.stream(prompts[1], max_new_tokens=30)
        next(stream)
        n_steps = 0

        def close_in_another_thread(plan: StepPlan[Request], logits: Floats, at: int = at, stream: Any = stream) -> Floats:
            nonlocal n_steps
            if n_steps == at:
                closing = threading.Thread(target=stream.close)
                closing.start()
                closing.join(10.0)
                assert not closing.is_alive(), "closing waits for nobody's step"
            n_steps += 1
            return logits

        with steps_changed(engine, close_in_another_thread):
            assert engine.generate(prompts[0], max_new_tokens=8) == alone
        assert_idle(engine)


def test_who_sees_an_end_sees_all_of_the_result(one_engine: Engine) -> None:
    """Looked at, as another thread might, at every line: a finished request has all its text, its pieces, and what it held."""
    prompt = prompts_of(one_engine, (37,))[0]
    expected = one_engine.generate(prompt, max_new_tokens=3)
    for end in (lambda _: None, one_engine.core.cancel):
        request = one_engine.submit(prompt, max_new_tokens=3, stop=expected.text + "?")  # held back until the end
        one_engine.core.wait(lambda request=request: len(request.token_ids) == 2)  # type: ignore[misc]
        seen: list[tuple[Generation, str]] = []

        def look(request: Request = request, seen: list[tuple[Generation, str]] = seen) -> None:
            if request.is_finished:
                seen.append((request.result(), "".join(request.pieces)))

        with looking_at_every_line([request_module, sequence_module], look):
            end(request)
            one_engine.core.run_until_idle()
        assert len(seen) > 10
        assert seen == [(request.result(), request.result().text)] * len(seen)
    assert expected.text
    assert_idle(one_engine)


def test_a_result_asked_for_while_its_pages_are_given_back_tells_what_was_held(
    one_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = one_engine.submit(prompts_of(one_engine, (37,))[0], max_new_tokens=5)
    one_engine.core.wait(lambda: len(request.token_ids) == 4)
    sequence, seen = request.sequence, list[Generation]()
    release = sequence.release

    def look_then_release() -> None:
        seen.append(request.result())
        release()
        seen.append(request.result())

    monkeypatch.setattr(sequence, "release", look_then_release)
    one_engine.core.run_until_idle()
    assert seen == [request.result()] * 2
    assert request.result().num_computed_tokens == 37 + 4


def test_ctrl_c_in_one_threads_step_loses_the_requests_of_that_step_only(engine: Engine) -> None:
    """The others are told so, or get what they would have got; the engine goes on."""
    prompts = prompts_of(engine, LENGTHS[:3])
    alone = [engine.generate(prompt, max_new_tokens=10) for prompt in prompts]
    for at in (0, 2, 5, 9):
        interrupted: set[str] = set()
        steps = itertools.count()

        def interrupt(
            plan: StepPlan[Request],
            logits: Floats,
            at: int = at,
            steps: Iterator[int] = steps,
            interrupted: set[str] = interrupted,
        ) -> Floats:
            if next(steps) == at:
                interrupted.update(str(len(request.prompt_ids)) for request in plan.requests)
                raise KeyboardInterrupt
            return logits

        def ask(prompt: list[int]) -> Callable[[], Generation]:
            return lambda: engine.generate(prompt, max_new_tokens=10)

        with steps_changed(engine, interrupt):
            outcomes = together(*(ask(prompt) for prompt in prompts))
        assert interrupted
        hit = [outcome for outcome in outcomes if isinstance(outcome, KeyboardInterrupt)]
        assert len(hit) == 1, "the thread that ran the step"
        for prompt, outcome, expected in zip(prompts, outcomes, alone, strict=True):
            if isinstance(outcome, EngineError):
                assert "a step was interrupted" in str(outcome)
                assert str(len(prompt)) in interrupted
            elif not isinstance(outcome, KeyboardInterrupt):
                assert outcome == expected
        engine.core.run_until_idle()
        assert_idle(engine)
    assert engine.generate(prompts[0], max_new_tokens=10) == alone[0]


def test_a_second_ctrl_c_while_the_first_is_dealt_with_spoils_no_request(one_engine: Engine) -> None:
    """At any line of dealing with it: the requests of the step end, and nobody goes on from a step that was cut short."""
    prompts = prompts_of(one_engine, (37, 20))
    alone = [one_engine.generate(prompt, max_new_tokens=4) for prompt in prompts]
    for at, number in itertools.product((0, 3), range(0, 80, 2)):
        requests = [one_engine.submit(prompt, max_new_tokens=4) for prompt in prompts]
        steps = itertools.count()

        def interrupt(plan: StepPlan[Request], logits: Floats, at: int = at, steps: Iterator[int] = steps) -> Floats:
            if next(steps) == at:
                raise KeyboardInterrupt
            return logits

        with steps_changed(one_engine, interrupt):
            assert interrupted_at_line(
                number, [engine_core, request_module, scheduler_module], one_engine.core.run_until_idle, only=ENDING
            )
            with contextlib.suppress(KeyboardInterrupt):
                one_engine.core.run_until_idle()
            one_engine.core.run_until_idle()
        for request, expected in zip(requests, alone, strict=True):
            assert request.is_finished
            if request.error is None:
                assert request.result() == expected
            else:
                assert isinstance(request.error, EngineError)
        assert any(request.error is not None for request in requests)
        assert_idle(one_engine)


def test_closing_while_others_wait_tells_each_of_them(engine: Engine) -> None:
    prompts = prompts_of(engine, LENGTHS)
    began = threading.Event()

    def slowly(plan: StepPlan[Request], logits: Floats) -> Floats:
        began.set()
        time.sleep(0.01)
        return logits

    def close() -> None:
        began.wait(30.0)
        engine.close()

    def ask(prompt: list[int]) -> Callable[[], Generation]:
        return lambda: engine.generate(prompt, max_new_tokens=60)

    stream = engine.stream(prompts[5], max_new_tokens=60)
    with steps_changed(engine, slowly):
        *outcomes, closed = together(*(ask(prompt) for prompt in prompts[:5]), close)
    assert closed is None
    assert all(isinstance(outcome, EngineError) and "closed" in str(outcome) for outcome in outcomes)
    with pytest.raises(EngineError, match="the engine was closed before the request had ended"):
        list(stream)
    with pytest.raises(UsageError, match="the engine has been closed"):
        engine.generate(prompts[0])
    with pytest.raises(UsageError, match="the engine has been closed"):
        engine.stream(prompts[0])
    engine.close()
    assert engine.core.reservation.used == [0] * len(engine.core.reservation.used)
    engine.runner.pool.check_integrity([])


def test_a_request_that_comes_while_the_engine_closes_is_not_run(one_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed between the moment it is found open and the moment the request is queued."""
    core = one_engine.core
    request = one_engine.submit(prompts_of(one_engine, (10,))[0])
    core.cancel(request)
    (late,) = one_engine._requests(prompts_of(one_engine, (20,)), [request.params])
    original = core.reservation.check

    def close_first(size: Any) -> None:
        monkeypatch.undo()
        core.close()
        original(size)

    monkeypatch.setattr(core.reservation, "check", close_first)
    core.add([late])
    assert late.is_finished
    assert isinstance(late.error, EngineError)
    assert late.held_sequence is None


def test_an_engine_cannot_be_closed_or_waited_for_from_inside_its_steps(one_engine: Engine) -> None:
    """An error instead of a thread that waits for itself for ever."""
    said: list[BaseException] = []
    prompt = prompts_of(one_engine, (10,))[0]

    def ask_back(plan: StepPlan[Request], logits: Floats) -> Floats:
        for ask in (one_engine.close, lambda: one_engine.generate(prompt)):
            with pytest.raises(UsageError, match="from inside one of its steps") as caught:
                ask()
            said.append(caught.value)
        return logits

    with steps_changed(one_engine, ask_back):
        one_engine.generate(prompt, max_new_tokens=2)
    assert len(said) == 4
    one_engine.core.run_until_idle()
    assert_idle(one_engine)


def test_a_stream_that_is_dropped_in_the_middle_gives_its_pages_back(engine: Engine) -> None:
    for n_pieces in range(4):
        stream = engine.stream(prompts_of(engine, (50,))[0], max_new_tokens=30)
        for _ in range(n_pieces):
            next(stream)
        del stream
        assert_idle(engine)


def test_statistics_may_be_read_while_others_generate(one_engine: Engine) -> None:
    prompts = prompts_of(one_engine, LENGTHS)
    is_over = threading.Event()

    def generate() -> None:
        try:
            for _ in range(3):
                one_engine.generate_batch(prompts, max_new_tokens=5)
        finally:
            is_over.set()

    def read() -> int:
        n = 0
        while not is_over.is_set():
            assert one_engine.statistics["reserved"]["sequences"]["used"] <= len(prompts)
            n += 1
        return n

    generated, n_read = together(generate, read)
    assert generated is None
    assert n_read > 0
    assert one_engine.statistics["n_finished"] == {"length": 18}
