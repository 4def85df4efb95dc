"""Requests that run at once hold the pages of a common beginning once, and have the bits that they have alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import random_ids
from tests.serving import Recorder, assert_idle, engine_under, small_policy, steps_changed
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.prefix.sharing import PageSharing
from trt_kv.runtime.request import Request

CHUNK, N_NEW = 20, 5
"""Blocks of 20 tokens, four pages."""
POLICIES = ("full", "freekv", "quest", "arkvale")


@contextmanager
def opened(dense: Engine, policy: str, *, n_tokens: int | None = None, **options: Any) -> Iterator[Engine]:
    """An engine whose cache has room for ``n_tokens`` per layer."""
    where: dict[str, Any] = {"host_tier": "ram"} if policy != "full" else {}
    if n_tokens is not None:
        where["cache_tokens" if policy == "full" else "host_tokens"] = n_tokens
    with engine_under(dense, small_policy(policy), chunk=CHUNK, **(where | {"prefix_cache": True} | options)) as engine:
        yield engine


def sharing_of(engine: Engine) -> PageSharing:
    assert engine.core.sharing is not None
    return engine.core.sharing


def prompts_of(engine: Engine, n: int, *, shared: int, own: int = 7) -> list[list[int]]:
    begin = random_ids(engine, shared, seed=1)
    return [[*begin, *random_ids(engine, own + 1, seed=50 + at)[1:]] for at in range(n)]


def logits_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[bytes]]:
    recorder = Recorder()
    with steps_changed(engine, recorder):
        requests = [engine.submit(ids, max_new_tokens=N_NEW, ignore_eos=True) for ids in prompts]
        engine.core.run_until_idle()
    assert all(request.error is None for request in requests)
    return [recorder.logits[request] for request in requests]


def alone(dense: Engine, policy: str, prompts: Sequence[Sequence[int]]) -> list[list[bytes]]:
    with opened(dense, policy, prefix_cache=False) as engine:
        return [logits for ids in prompts for logits in logits_of(engine, [ids])]


def check_pages(engine: Engine, running: Sequence[Request]) -> None:
    """Every page that is in use is owned once, by a sequence or a shared block, and has been reserved."""
    runner, shared = engine.core.runner, sharing_of(engine).pages
    pools = [runner.pool] if runner.tiers is None else [runner.pool, runner.tiers.host]
    sequences = [one.held_sequence for request in running for one in request.family if one.held_sequence is not None]
    for pool in pools:
        own = [page for sequence in sequences for page in sequence.pages_in(pool)]
        pool.check_integrity([*own, *(page for of, page in shared if of is pool)])
    for resource, used in zip(engine.core.reservation.resources, engine.core.reservation.used, strict=True):
        if (counted := getattr(resource, "pool", None)) is not None:
            assert counted.n_pages - counted.n_free <= used <= counted.n_pages


@pytest.mark.parametrize("policy", POLICIES)
def test_a_common_beginning_is_held_once(policy: str, small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, 4, shared=80)
    expected = alone(small_engine, policy, prompts)
    with opened(small_engine, policy, n_tokens=95 + 3 * 25) as engine:  # not enough for two without sharing
        recorder = Recorder()
        with steps_changed(engine, recorder):
            requests = [engine.submit(ids, max_new_tokens=N_NEW, ignore_eos=True) for ids in prompts]
            engine.core.wait(lambda: all(request.token_ids for request in requests))
            assert engine.core.statistics.n_running == 4
            check_pages(engine, requests)
            engine.core.run_until_idle()
        assert [recorder.logits[request] for request in requests] == expected
        assert [request.n_cached for request in requests] == [0, 80, 80, 80]
        assert engine.statistics["prefix_cache"]["shared_hit_tokens"] == 240
        assert_idle(engine)
        assert not sharing_of(engine).pages


@pytest.mark.parametrize("policy", ["full", "freekv"])
def test_the_first_one_may_end_before_the_others(policy: str, small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, 3, shared=47)
    expected = alone(small_engine, policy, prompts)
    with opened(small_engine, policy) as engine:
        recorder = Recorder()
        with steps_changed(engine, recorder):
            requests = [engine.submit(ids, max_new_tokens=N_NEW, ignore_eos=True) for ids in prompts]
            engine.core.wait(lambda: all(request.token_ids for request in requests))
            engine.core.cancel(requests[0])
            engine.core.wait(lambda: requests[0].held_sequence is None)
            assert sharing_of(engine).pages
            check_pages(engine, requests[1:])
            again = engine.submit(prompts[0], max_new_tokens=N_NEW, ignore_eos=True)
            engine.core.run_until_idle()
        assert [recorder.logits[request] for request in (again, *requests[1:])] == expected
        assert again.n_cached == 40
        assert_idle(engine)


def test_what_was_copied_is_shared_from_then_on(small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, 3, shared=80)
    with opened(small_engine, "full") as engine:
        engine.generate(prompts[0], max_new_tokens=1)
        assert not sharing_of(engine).pages
        assert logits_of(engine, prompts[1:]) == alone(small_engine, "full", prompts[1:])
        counts = engine.statistics["prefix_cache"]
        assert (counts["hit_tokens"], counts["shared_hit_tokens"]) == (160, 80)


def test_a_longer_prefix_goes_on_from_copies(small_engine: Engine) -> None:
    """The first 40 tokens are in pages of a request that runs, the next 40 in the cache."""
    long = prompts_of(small_engine, 1, shared=80)[0]
    short = [*long[:40], *random_ids(small_engine, 9, seed=9)[1:]]
    expected = alone(small_engine, "full", [short, long])
    with opened(small_engine, "full") as engine:
        engine.generate(long, max_new_tokens=1)
        assert logits_of(engine, [short, long]) == expected
        counts = engine.statistics["prefix_cache"]
        assert (counts["hit_tokens"], counts["shared_hit_tokens"]) == (40 + 80, 40)
        assert_idle(engine)


def test_samples_of_a_prompt_have_pages_of_their_own(small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, 2, shared=60)
    with opened(small_engine, "full") as engine, opened(small_engine, "full", prefix_cache=False) as plain:
        options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5, "max_new_tokens": 12, "ignore_eos": True}
        first = engine.submit(prompts[0], max_new_tokens=30, ignore_eos=True)
        engine.core.wait(lambda: bool(first.token_ids))
        several = engine.submit(prompts[1], **options)
        engine.core.wait(lambda: all(len(one.token_ids) > 2 for one in several.family))
        check_pages(engine, [first, several])
        engine.core.run_until_idle()
        wanted = plain.submit(prompts[1], **options)
        plain.core.run_until_idle()
        assert [one.token_ids for one in several.family] == [one.token_ids for one in wanted.family]
        assert_idle(engine)


def test_policies_that_change_pages_share_none(small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy("snapkv"), chunk=CHUNK, prefix_cache=True) as engine:
        assert engine.core.sharing is None
    with engine_under(small_engine, small_policy("full"), windows=(0, 9, 0), chunk=CHUNK, prefix_cache=True) as engine:
        assert engine.core.sharing is None


def test_another_salt_shares_nothing(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, 1, shared=80)
    with opened(small_engine, "full") as engine:
        requests = [engine.submit(prompt, max_new_tokens=N_NEW, cache_salt=salt) for salt in ("a", "b", "a")]
        engine.core.run_until_idle()
        assert [request.n_cached for request in requests] == [0, 0, 80]


lengths = st.sampled_from((1, 19, 20, 21, 39, 40, 41, 60, 87))
actions = st.one_of(
    st.tuples(st.just("submit"), lengths, st.integers(0, 1), st.sampled_from((1, 1, 2))),
    st.tuples(st.just("steps"), st.integers(1, 6), st.just(0), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0), st.just(0)),
)


@pytest.mark.parametrize("policy", ["full", "freekv"])
def test_any_order_of_requests_and_cancellations(policy: str, small_engine: Engine) -> None:
    documents = [random_ids(small_engine, 87, seed=at) for at in range(2)]
    expected: dict[tuple[int, int], list[int]] = {}
    with opened(small_engine, policy, prefix_cache=False) as plain:
        for document in range(2):
            for length in (1, 19, 20, 21, 39, 40, 41, 60, 87):
                ids = documents[document][:length]
                expected[document, length] = list(plain.generate(ids, max_new_tokens=8, ignore_eos=True).token_ids)

    @settings(max_examples=40)
    @given(steps=st.lists(actions, min_size=4, max_size=16))
    def check(steps: list[tuple[str, int, int, int]]) -> None:
        with opened(small_engine, policy, n_tokens=220) as engine:
            wanted: list[tuple[Request, tuple[int, int]]] = []
            for what, number, document, n in steps:
                if what == "submit":
                    ids = documents[document][:number]
                    request = engine.submit(ids, max_new_tokens=8, ignore_eos=True, n=n, temperature=float(n > 1), top_k=1)
                    wanted.append((request, (document, number)))
                elif what == "cancel" and wanted:
                    engine.core.cancel(wanted[number % len(wanted)][0])
                elif what == "steps":
                    for _ in range(number):
                        engine.core._alone(engine.core._step)
                check_pages(engine, [request for request, _ in wanted])
            engine.core.run_until_idle()
            for request, key in wanted:
                for one in request.family:
                    assert one.token_ids == expected[key] or one.finish_reason == "cancelled"
            assert_idle(engine)
            assert not sharing_of(engine).pages
            assert not any(engine.core.reservation.used)

    check()
