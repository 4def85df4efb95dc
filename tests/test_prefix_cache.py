"""Requests that continue from cached prefixes have the tokens and the logits, bit for bit, that they have without."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import random_ids
from tests.serving import Recorder, assert_idle, engine_under, small_policy, steps_changed, streamed
from trt_kv.policies import policy_names
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.prefix.cache import PrefixCache

QUICK = ("full", "prefixkv_paper", "refreekv", "h2o", "snapkv", "freekv", "quest")
POLICIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in policy_names()]
CHUNK = 20
"""Four pages, so that a block has 20 tokens."""
N_NEW = 5
DOCUMENTS = 2
LENGTHS = (0, 1, 19, 20, 21, 39, 40, 44, 60, 87)
"""Tokens that a prompt takes from a document: also a token more or less than a block, or than a page."""
Prompt = tuple[int, int, int]
"""(document, how many of its tokens, the number of the suffix)."""
SUFFIXES = (0, 1, 4, 5, 20, 33)


def ids_of(engine: Engine, prompt: Prompt) -> list[int]:
    document, n_shared, suffix = prompt
    shared = random_ids(engine, max(LENGTHS), seed=document)[: max(n_shared, 1)]
    return [*shared, *random_ids(engine, SUFFIXES[suffix] + 1, seed=50 + suffix)[1:]]


prompts = st.tuples(st.integers(0, DOCUMENTS - 1), st.sampled_from(LENGTHS), st.integers(0, len(SUFFIXES) - 1))
actions = st.one_of(
    st.tuples(st.just("generate"), st.lists(prompts, min_size=1, max_size=3)),
    st.tuples(st.just("cancel"), st.lists(prompts, min_size=2, max_size=2)),
    st.tuples(st.just("clear"), st.just([])),
    st.tuples(st.just("pin"), st.lists(prompts, min_size=1, max_size=1)),
    st.tuples(st.just("restart"), st.just([])),
    st.tuples(st.just("damage"), st.just([])),
)


@dataclass
class Rig:
    """An engine with a prefix cache, and one without that says what is right."""

    dense: Engine
    policy: str
    options: dict[str, Any]
    windows: tuple[int, ...] = ()
    expected: dict[Prompt, list[bytes]] = field(default_factory=dict)

    @contextmanager
    def open(self, **options: Any) -> Iterator[Engine]:
        with engine_under(
            self.dense, small_policy(self.policy), windows=self.windows, chunk=CHUNK, **(self.options | options)
        ) as engine:
            yield engine

    def logits_of(self, engine: Engine, wanted: Sequence[Prompt]) -> list[list[bytes]]:
        """The logits of the tokens of requests for these prompts."""
        recorder = Recorder()
        with steps_changed(engine, recorder):
            requests = [engine.submit(ids_of(engine, prompt), max_new_tokens=N_NEW, ignore_eos=True) for prompt in wanted]
            engine.core.run_until_idle()
        assert all(request.error is None for request in requests)
        return [recorder.logits[request] for request in requests]

    def prepare(self, wanted: Sequence[Prompt]) -> None:
        """Find out what is right, where that is not known yet."""
        missing = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self.expected]
        if missing:
            with self.open() as engine:
                self.expected |= dict(zip(missing, self.logits_of(engine, missing), strict=True))

    def check(self, engine: Engine, wanted: Sequence[Prompt]) -> None:
        assert self.logits_of(engine, wanted) == [self.expected[prompt] for prompt in wanted]
        assert_idle(engine)
        assert_counts(engine)


def prefixes_of(engine: Engine) -> PrefixCache:
    assert engine.core.prefixes is not None
    return engine.core.prefixes


def assert_counts(engine: Engine) -> None:
    """What the cache says that it holds is what it holds."""
    prefixes = prefixes_of(engine)
    counts = prefixes.statistics
    assert counts.blocks == len(prefixes._entries)
    n_bytes = sum(values.nbytes for entry in prefixes._entries.values() for values in entry.block.values())
    assert counts.used_bytes == n_bytes <= counts.capacity_bytes


@pytest.fixture(params=POLICIES)
def rig(request: pytest.FixtureRequest, small_engine: Engine) -> Rig:
    return Rig(small_engine, request.param, streamed(request.param))


def test_a_cached_prefix_changes_no_bit(rig: Rig) -> None:
    wanted = [(0, 87, 4), (0, 87, 2), (0, 60, 0), (0, 44, 5), (0, 20, 1), (0, 21, 0), (1, 40, 3), (0, 87, 4)]
    rig.prepare(wanted)
    with rig.open(prefix_cache=True) as engine:
        for prompt in wanted:
            rig.check(engine, [prompt])
        counts = prefixes_of(engine).statistics
        assert counts.hit_tokens >= 80
        result = engine.generate(ids_of(engine, (0, 87, 2)), max_new_tokens=1)
        assert result.n_cached_tokens == (87 + 4 - prefixes_of(engine)._blocks.n_last_queries) // CHUNK * CHUNK


def test_any_use_of_the_cache_changes_no_bit(rig: Rig) -> None:
    @settings(max_examples=25)
    @given(steps=st.lists(actions, min_size=3, max_size=9), n_blocks=st.sampled_from([2, 5, 100]))
    def check(steps: list[tuple[str, list[Prompt]]], n_blocks: int) -> None:
        rig.prepare([prompt for _, some in steps for prompt in some])
        with tempfile.TemporaryDirectory() as folder:
            run(rig, steps, n_blocks, Path(folder))

    check()


def run(rig: Rig, steps: Sequence[tuple[str, list[Prompt]]], n_blocks: int, store: Path) -> None:
    """Do as drawn, in memory for about ``n_blocks``, again and again in engines that share a store."""
    engine = None
    try:
        for what, wanted in steps:
            if engine is None or what == "restart":
                if engine is not None:
                    engine.close()
                opened = rig.open(prefix_cache=True, prefix_store=str(store), prefix_bytes=n_blocks * 40_000)
                engine = opened.__enter__()
            match what:
                case "generate":
                    rig.check(engine, wanted)
                case "cancel":
                    requests = [engine.submit(ids_of(engine, prompt), max_new_tokens=N_NEW) for prompt in wanted]
                    engine.core.wait(lambda first=requests[0]: first.n_prompt_read > 0)  # type: ignore[misc]
                    for request in requests:
                        engine.core.cancel(request)
                    engine.core.run_until_idle()
                    assert_idle(engine)
                case "clear":
                    prefixes_of(engine).clear()
                case "pin":
                    prefixes_of(engine).pin(ids_of(engine, wanted[0]), "")
                case "damage":
                    for file in sorted(store.glob("*.prefix"))[::2]:
                        data = bytearray(file.read_bytes())
                        data[len(data) // 2] ^= 1
                        file.write_bytes(data)
            assert_counts(engine)
    finally:
        if engine is not None:
            engine.close()


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "full"])
def test_layers_with_windows_continue_with_their_windows(policy: str, small_engine: Engine) -> None:
    for windows in ((0, 9, 0), (33, 0, 57)):
        rig = Rig(small_engine, policy, {}, windows)
        wanted = [(0, 87, 4), (0, 87, 2), (0, 60, 0), (0, 44, 5)]
        rig.prepare(wanted)
        with rig.open(prefix_cache=True) as engine:
            for prompt in wanted:
                rig.check(engine, [prompt])
            assert prefixes_of(engine).statistics.hit_tokens >= 60


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("policy", ["h2o", "freekv"])
def test_rows_of_any_type_are_copied_as_they_are(policy: str, kv_dtype: str, small_engine: Engine) -> None:
    rig = Rig(small_engine, policy, streamed(policy) | {"kv_dtype": kv_dtype})
    wanted = [(0, 87, 4), (0, 87, 2)]
    rig.prepare(wanted)
    with rig.open(prefix_cache=True) as engine:
        for prompt in wanted:
            rig.check(engine, [prompt])
        assert prefixes_of(engine).statistics.hit_tokens == 80


def test_blocks_end_where_chunks_and_pages_end(small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy("full"), chunk=16, prefix_cache=True) as engine:
        assert prefixes_of(engine).block_tokens == 80
        cached = [engine.generate(random_ids(engine, 100, seed=1), max_new_tokens=1).n_cached_tokens for _ in range(2)]
        assert cached == [0, 80]


def test_another_salt_is_another_prefix(small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 61, seed=1)
    with engine_under(small_engine, small_policy("full"), chunk=CHUNK, prefix_cache=True) as engine:
        cached = [
            engine.generate(prompt, max_new_tokens=1, cache_salt=salt).n_cached_tokens for salt in ("", "a", "b", "a", "", "\n")
        ]
    assert cached == [0, 0, 0, 60, 60, 0]


def test_a_prefix_never_pushes_out_its_own_beginning(small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 101, seed=1)
    with engine_under(small_engine, small_policy("full"), chunk=CHUNK, prefix_cache=True, prefix_bytes=60_000) as engine:
        _, cached = (engine.generate(prompt, max_new_tokens=1).n_cached_tokens for _ in range(2))
        assert 0 < cached < 100
        assert_counts(engine)


def test_requests_that_share_a_prefix_run_together(rig: Rig) -> None:
    wanted = [(0, 87, 4), (0, 87, 2), (0, 60, 0), (0, 87, 5), (0, 40, 1)]
    rig.prepare(wanted)
    with rig.open(prefix_cache=True) as engine:
        rig.check(engine, wanted)
        assert prefixes_of(engine).statistics.hit_tokens >= 80 + 40


def test_off_means_off(small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy("full"), chunk=CHUNK) as engine:
        prompt = random_ids(engine, 61, seed=1)
        assert [engine.generate(prompt, max_new_tokens=1).n_cached_tokens for _ in range(2)] == [0, 0]
        assert "prefix_cache" not in engine.statistics


def test_blocks_that_do_not_fit_the_engine_are_refused(small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy("h2o"), chunk=CHUNK, prefix_cache=True) as engine:
        engine.generate(random_ids(engine, 61, seed=1), max_new_tokens=1)
        blocks = prefixes_of(engine)._blocks
        block = dict(next(iter(prefixes_of(engine)._entries.values())).block)
        place = {"end": 3 * CHUNK, "n_tokens": CHUNK}  # the last block is the first to go
        assert blocks.accepts(block, **place)
        for name in ("kv.0", "scores.2"):
            assert not blocks.accepts({key: values for key, values in block.items() if key != name}, **place)
            assert not blocks.accepts(block | {name: block[name].astype(np.float64)}, **place)
            assert not blocks.accepts(block | {name: block[name][..., :-1]}, **place)
            assert not blocks.accepts(block | {name: block[name][:-1]}, **place)
