"""A request gets the tokens that it gets alone, and the same logits bit for bit, whatever becomes of those beside it."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.serving import Recorder, assert_idle, engine_under, prompts_of, small_policy, steps_changed, streamed
from trt_kv.errors import LogitsError, RecallError
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_names
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.scheduler import StepPlan
from trt_kv.runtime.stream import Stream

QUICK = ("prefixkv_paper", "refreekv", "h2o", "freekv")
POLICIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in policy_names()]
LENGTHS = (37, 5, 61, 16, 1, 50)
PARAMS: list[dict[str, Any]] = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 14, "temperature": 1.5, "seed": 3},
    {"max_new_tokens": 6, "temperature": 0.8, "top_k": 20, "seed": 4},
    {"max_new_tokens": 12, "stop": ["e", "zz"]},
    {"max_new_tokens": 1},
    {"max_new_tokens": 10, "temperature": 2.0, "top_p": 0.9, "seed": 5},
]
Alone = list[tuple[tuple[int, ...], str, list[bytes]]]


class BrokenTokenizer:
    """Decodes nothing."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        raise ValueError(f"cannot decode {ids}")


@pytest.fixture(params=POLICIES)
def engine(request: pytest.FixtureRequest, small_engine: Engine) -> Iterator[Engine]:
    with engine_under(small_engine, small_policy(request.param), **streamed(request.param)) as engine:
        yield engine


def alone_on(engine: Engine) -> Alone:
    """Tokens, text and logits of each request when nothing else runs."""
    found = []
    for prompt, params in zip(prompts_of(engine, LENGTHS), PARAMS, strict=True):
        recorder = Recorder()
        with steps_changed(engine, recorder):
            result = engine.generate(prompt, **params)
        (logits,) = recorder.logits.values()
        found.append((result.token_ids, result.text, logits))
    return found


events = st.tuples(
    st.integers(0, 3), st.integers(0, len(LENGTHS) - 1), st.integers(-1, 1), st.sampled_from(["request", "stream", "batch"])
)
"""(steps before it comes, which request, its priority, how it is asked for)."""
harms = st.dictionaries(
    st.integers(0, 8), st.tuples(st.integers(0, 12), st.sampled_from(["cancel", "close", "late", "nan", "lost", "tokenizer"]))
)
"""By arrival: (after how many steps, what becomes of it)."""


class Company:
    """One run of an engine with arrivals and mishaps at drawn steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts = prompts_of(engine, LENGTHS)
        self.recorder = Recorder()
        self.requests: list[Request] = []
        self.which: dict[Request, int] = {}
        self.streams: dict[Request, Stream] = {}
        self.poisoned: set[Request] = set()
        self.harmed: set[Request] = set()

    def change(self, plan: StepPlan[Request], logits: Floats) -> Floats:
        self.recorder(plan, logits)
        logits = logits.copy()
        for row, request in enumerate(plan.requests):
            if request in self.poisoned and (plan.phase == "decode" or plan.reads_last):
                logits[row, 3] = np.nan
                self.recorder.logits[request].pop()
        return logits

    def advance(self, n_steps: int) -> None:
        wanted = self.recorder.n_steps + n_steps
        self.engine.core.wait(lambda: self.recorder.n_steps >= wanted or all(request.is_finished for request in self.requests))

    def arrive(self, which: int, priority: int, how: str) -> None:
        params = SamplingParams(**PARAMS[which], priority=priority)
        n = 2 if how == "batch" else 1
        requests = self.engine._requests([self.prompts[which]] * n, [params] * n)
        self.engine.core.add(requests)
        self.requests += requests
        for request in requests:
            self.which[request] = which
            if how == "stream":
                self.streams[request] = Stream(self.engine.core, request)

    def harm(self, request: Request, how: str) -> None:
        if request.is_finished:
            return
        tiers = self.engine.runner.tiers
        match how:
            case "cancel":
                self.engine.core.cancel(request)
            case "close" if request in self.streams:
                self.streams[request].close()
            case "late":
                request.params = SamplingParams(**PARAMS[self.which[request]], timeout_s=1.0)
                request.times.arrived -= 10.0
            case "nan":
                self.poisoned.add(request)
            case "tokenizer":
                assert request._detokenizer is not None
                request._detokenizer._tokenizer = BrokenTokenizer()  # type: ignore[assignment]
            case "lost" if isinstance(tiers, StreamedRecall) and request.held_sequence is not None:
                for row in request.held_sequence.page_table[:, 0].tolist():
                    if row in tiers.sets:
                        tiers.sets[row].failure = RecallError("the test lost it")
            case _:
                return
        self.harmed.add(request)

    def check(self, alone: Alone) -> None:
        for request in self.requests:
            token_ids, text, logits = alone[self.which[request]]
            seen = self.recorder.logits.get(request, [])
            if request in self.harmed:
                assert tuple(request.token_ids) == token_ids[: len(request.token_ids)]
                assert seen[: len(request.token_ids)] == logits[: len(request.token_ids)]
                assert request.is_finished
            else:
                assert request.error is None
                assert tuple(request.token_ids) == token_ids
                assert request.result().text == text
                assert seen == logits
            if request in self.streams:
                assert "".join(request.pieces) == request.result().text
            if isinstance(request.error, LogitsError):
                assert request in self.poisoned


def test_everyone_gets_what_he_gets_alone(engine: Engine) -> None:
    alone = alone_on(engine)

    @settings(max_examples=6)
    @given(arrivals=st.lists(events, min_size=1, max_size=6), harmed=harms)
    def check(arrivals: list[tuple[int, int, int, str]], harmed: dict[int, tuple[int, str]]) -> None:
        company = Company(engine)
        with steps_changed(engine, company.change):
            for n_steps, which, priority, how in arrivals:
                company.advance(n_steps)
                company.arrive(which, priority, how)
            for at, (n_steps, how) in harmed.items():
                company.advance(n_steps)
                company.harm(company.requests[at % len(company.requests)], how)
            engine.core.run_until_idle()
        company.check(alone)
        assert_idle(engine)

    check()


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_logits_that_are_no_numbers_end_their_request_and_name_it(value: float, small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, (20, 30, 10))
    alone = [small_engine.generate(prompt, max_new_tokens=8) for prompt in prompts]

    def spoil(plan: StepPlan[Request], logits: Floats) -> Floats:
        for row, request in enumerate(plan.requests):
            if request.name == "request 1 of 3" and len(request.token_ids) == 4:
                logits[row, 7] = value
        return logits

    with steps_changed(small_engine, spoil):
        results = small_engine.generate_batch(prompts, max_new_tokens=8)
    assert [results[0], results[2]] == [alone[0], alone[2]]
    assert results[1].finish_reason == "error"
    assert isinstance(results[1].error, LogitsError)
    assert "request 1 of 3" in str(results[1].error)
    assert results[1].token_ids == alone[1].token_ids[:4]
    assert_idle(small_engine)


def test_the_first_logits_of_a_prompt_may_be_no_numbers_too(small_engine: Engine) -> None:
    with (
        steps_changed(small_engine, lambda plan, logits: np.full_like(logits, np.nan)),  # noqa: ARG005
        pytest.raises(LogitsError, match="20 prompt tokens and 0 generated ones"),
    ):
        small_engine.generate(prompts_of(small_engine, (20,))[0])
    assert_idle(small_engine)


def test_a_tokenizer_that_fails_to_the_end_concerns_its_request_alone(small_engine: Engine) -> None:
    """Also where the request has to say its last words: ending it raises nothing."""
    prompts = prompts_of(small_engine, (20, 30))
    alone = small_engine.generate(prompts[0], max_new_tokens=8)
    good, bad = (small_engine.submit(prompt, max_new_tokens=8) for prompt in prompts)
    small_engine.core.wait(lambda: len(bad.token_ids) == 3)
    assert bad._detokenizer is not None
    bad._detokenizer._tokenizer = BrokenTokenizer()  # type: ignore[assignment]
    small_engine.core.run_until_idle()
    assert good.result() == alone
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, ValueError)
    assert_idle(small_engine)


@pytest.mark.parametrize("state", ["waiting", "reading", "decoding"])
@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_pages_are_free_before_the_next_step_after_an_end(how: str, state: str, small_engine: Engine) -> None:
    one, other = prompts_of(small_engine, (100, 20))
    request = small_engine.submit(one, max_new_tokens=20, timeout_s=1000.0)
    if state != "waiting":
        small_engine.core.wait(lambda: bool(request.token_ids) if state == "decoding" else request.n_prompt_read > 0)
    if how == "timeout":
        request.times.arrived -= 2000.0
    else:
        request.cancelled = True
    held: list[tuple[int, list[int]]] = []

    def look(plan: StepPlan[Request], logits: Floats) -> Floats:
        (running,) = plan.requests
        held.append((small_engine.runner.pool.n_pages - small_engine.runner.pool.n_free, running.sequence.pages))
        return logits

    with steps_changed(small_engine, look):
        small_engine.generate(other, max_new_tokens=3)
    assert all(n_held == len(pages) for n_held, pages in held)
    assert request.finish_reason == how
    assert request.held_sequence is None
    assert_idle(small_engine)


def family(engine: Engine, prompt: list[int], tokenizer: Tokenizer, n_forks: int = 2, **params: Any) -> Request:
    made = functools.partial(Request, prompt_ids=prompt, tokenizer=tokenizer, eos_token_ids=(), limit=8)
    forks = [made(params=SamplingParams(temperature=1.0, seed=seed)) for seed in range(n_forks)]
    return made(params=SamplingParams(**params), forks=forks)


@pytest.mark.parametrize("name", QUICK)
def test_a_fork_that_ends_before_the_prompt_was_read_disturbs_nobody(name: str, small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy(name), **streamed(name)) as engine:
        prompt, beside = prompts_of(engine, (60, 20))
        whole = family(engine, prompt, engine.tokenizer)
        engine.core.add([whole])
        engine.core.run_until_idle()
        alone = engine.generate(beside, max_new_tokens=12)
        for n_read in (-1, 0, 30):
            other = engine.submit(beside, max_new_tokens=12)
            again = family(engine, prompt, engine.tokenizer)
            engine.core.add([again])
            engine.core.wait(lambda n=n_read, r=again: r.n_prompt_read > n)  # type: ignore[misc]
            engine.core.cancel(again.forks[0])
            engine.core.run_until_idle()
            assert other.result() == alone
            assert again.token_ids == whole.token_ids
            assert again.forks[1].token_ids == whole.forks[1].token_ids
            assert again.forks[0].finish_reason == "cancelled"
            assert not again.forks[0].token_ids
            assert_idle(engine)


def test_a_failure_while_forking_ends_the_whole_family_and_nobody_else(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, beside = prompts_of(small_engine, (60, 20))
    alone = small_engine.generate(beside, max_new_tokens=20)
    other = small_engine.submit(beside, max_new_tokens=20)
    made = family(small_engine, prompt, small_engine.tokenizer)
    original, n_forked = SequenceCache.fork, 0

    def fork(sequence: Any) -> Any:
        nonlocal n_forked
        n_forked += 1
        if n_forked == 2:
            raise MemoryError
        return original(sequence)

    monkeypatch.setattr(SequenceCache, "fork", fork)
    small_engine.core.add([made])
    small_engine.core.run_until_idle()
    assert other.result() == alone
    assert [one.finish_reason for one in (made, *made.forks)] == ["error"] * 3
    assert_idle(small_engine)
