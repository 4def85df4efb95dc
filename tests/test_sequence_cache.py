"""A sequence's cache against a slow model: lists of positions from which the published procedure deletes rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from tests.engines import random_ids
from trt_kv.errors import CapacityError
from trt_kv.policy import kept_tokens
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

N_LAYERS = 3
PAGE_SIZE = 4
PUBLISHED_DISTANCE = 25

shares = st.floats(0.01, 1.0)


@dataclass
class ListLayer:
    """One layer as PrefixKV's released code keeps it: rows in order, one row deleted at a fixed index per decode step."""

    rows: list[int]
    share: float | None = None
    fixed: int = 0

    def compress(self, kept: Sequence[int], share: float, distance: int) -> None:
        self.rows = sorted(kept)
        self.share = share
        self.fixed = len(kept) - distance
        if self.fixed < 1:
            self.fixed = len(kept) // 2

    def decode(self, position: int) -> None:
        """``position`` is also the number of tokens seen before this one."""
        if self.share is not None and int(len(self.rows) - position * self.share) > 0:
            del self.rows[self.fixed]
        self.rows.append(position)


@dataclass
class Pair:
    """A real sequence and its model."""

    cache: SequenceCache
    layers: list[ListLayer]

    def append(self, n_new: int) -> None:
        """As a kernel would: the tokens' positions are written to the slots they were given."""
        first = self.cache.num_computed_tokens
        slots = self.cache.append(n_new)
        positions = np.arange(first, first + n_new)
        pages, offsets = np.divmod(slots, self.cache.pool.page_size)
        self.cache.pool.token_positions[pages, 0, offsets] = positions
        for layer in self.layers:
            for position in positions:
                layer.decode(int(position)) if n_new == 1 else layer.rows.append(int(position))

    def slots(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(self.cache.kv_len[layer])
        size = self.cache.pool.page_size
        return self.cache.page_table[layer, index // size], index % size

    def positions(self, layer: int) -> list[int]:
        pages, offsets = self.slots(layer)
        found: list[int] = self.cache.pool.token_positions[pages, 0, offsets].tolist()
        return found

    def evict(self, kept_shares: Sequence[float], rng: np.random.Generator, distance: int) -> None:
        """Keep a random set of each layer's share, in order of position, in the first slots."""
        counts = []
        for layer, share in enumerate(kept_shares):
            rows = self.positions(layer)
            n_kept = max(kept_tokens(len(rows), share), 1)
            kept = sorted(rng.choice(rows, n_kept, replace=False).tolist())
            pages, offsets = self.slots(layer)
            self.cache.pool.token_positions[pages[:n_kept], 0, offsets[:n_kept]] = kept
            self.layers[layer].compress(kept, share, distance)
            counts.append(n_kept)
        self.cache.shrink(np.array(counts), kept_shares)

    def state(self) -> tuple[int, list[int], list[int], int]:
        return self.cache.num_computed_tokens, self.cache.kv_len.tolist(), self.cache.pages, self.cache.pool.n_free

    def check(self) -> None:
        for layer, model in enumerate(self.layers):
            positions = self.positions(layer)
            assert sorted(positions) == model.rows
        owned = [int((self.cache.page_table[layer] >= 0).sum()) for layer in range(N_LAYERS)]
        assert owned == [-(-len(model.rows) // PAGE_SIZE) for model in self.layers], "no page more than the tokens need"


def new_pair(pool: KvPool[Any], distance: int = PUBLISHED_DISTANCE) -> Pair:
    cache = SequenceCache(pool, n_layers=N_LAYERS, decode_distance=distance)
    return Pair(cache, [ListLayer([]) for _ in range(N_LAYERS)])


def new_pool(n_pages: int) -> HostKvPool:
    pool = HostKvPool(n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=1, head_size=1)
    pool.token_positions[:] = -(2**40)
    return pool


class PoolMachine(RuleBasedStateMachine):
    """Sequences that grow, shrink, decode, fork and end in one small pool, in any order."""

    sequences = Bundle("sequences")

    @initialize(n_pages=st.integers(1, 60), seed=st.integers(0, 100), distance=st.integers(1, 30))
    def start(self, n_pages: int, seed: int, distance: int) -> None:
        self.pool = new_pool(n_pages)
        self.rng = np.random.default_rng(seed)
        self.distance = distance
        self.alive: list[Pair] = []

    @rule(target=sequences)
    def begin(self) -> Pair:
        pair = new_pair(self.pool, self.distance)
        self.alive.append(pair)
        return pair

    @rule(pair=sequences, n_new=st.integers(1, 30))
    def append(self, pair: Pair, n_new: int) -> None:
        before = pair.state()
        try:
            pair.append(n_new)
        except CapacityError:
            assert pair.state() == before, "all or nothing"

    @rule(pair=sequences, n_steps=st.integers(1, 40))
    def decode(self, pair: Pair, n_steps: int) -> None:
        for _ in range(n_steps):
            self.append(pair, 1)
            pair.check()

    @rule(pair=sequences, kept_shares=st.tuples(*[shares] * N_LAYERS))
    def evict(self, pair: Pair, kept_shares: tuple[float, ...]) -> None:
        if pair.cache.num_computed_tokens:
            pair.evict(kept_shares, self.rng, self.distance)

    @rule(target=sequences, pair=sequences)
    def fork(self, pair: Pair) -> Pair | MultipleResults[Pair]:
        try:
            cache = pair.cache.fork()
        except CapacityError:
            return multiple()
        twin = Pair(cache, [ListLayer(list(m.rows), m.share, m.fixed) for m in pair.layers])
        self.alive.append(twin)
        return twin

    @rule(pair=consumes(sequences))
    @precondition(lambda self: self.alive)
    def end(self, pair: Pair) -> None:
        pair.cache.release()
        self.alive = [other for other in self.alive if other is not pair]

    @invariant()
    def every_token_is_where_the_model_has_it(self) -> None:
        for pair in self.alive:
            pair.check()

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.pool.check_integrity(page for pair in self.alive for page in pair.cache.pages)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25)
TestPool = PoolMachine.TestCase


@given(
    n_prompt=st.integers(1, 120),
    kept_shares=st.tuples(*[shares] * N_LAYERS),
    n_steps=st.integers(0, 80),
    seed=st.integers(0, 9),
)
@settings(max_examples=200)
def test_decode_time_eviction_keeps_what_the_published_procedure_keeps(
    n_prompt: int, kept_shares: tuple[float, ...], n_steps: int, seed: int
) -> None:
    """After every single step, at the published distance of 25."""
    pair = new_pair(new_pool(400))
    pair.append(n_prompt)
    pair.evict(kept_shares, np.random.default_rng(seed), PUBLISHED_DISTANCE)
    for _ in range(n_steps):
        pair.append(1)
        pair.check()


@given(n_prompt=st.integers(1, 200), kept_shares=st.tuples(*[shares] * N_LAYERS), n_steps=st.integers(1, 100))
@settings(max_examples=100)
def test_each_layer_grows_at_its_kept_share(n_prompt: int, kept_shares: tuple[float, ...], n_steps: int) -> None:
    """Never more than one token over its share of all tokens seen, or over what the prompt left it."""
    pair = new_pair(new_pool(600))
    pair.append(n_prompt)
    pair.evict(kept_shares, np.random.default_rng(0), PUBLISHED_DISTANCE)
    left = pair.cache.kv_len.copy()
    for _ in range(n_steps):
        pair.append(1)
        allowed = np.maximum(left, np.array(kept_shares) * pair.cache.num_computed_tokens + 2)
        assert (pair.cache.kv_len <= allowed).all()
        assert (pair.cache.kv_len >= np.minimum(left, np.array(kept_shares) * pair.cache.num_computed_tokens)).all()


def test_a_shrunk_sequence_gives_its_pages_to_others() -> None:
    pool = new_pool(N_LAYERS * 10)
    first, second = new_pair(pool), new_pair(pool)
    first.append(40)
    assert pool.n_free == 0
    with pytest.raises(CapacityError, match="the KV pool is full"):
        second.append(1)
    first.evict([0.5, 0.2, 0.1], np.random.default_rng(0), PUBLISHED_DISTANCE)
    assert pool.n_free == N_LAYERS * 10 - (5 + 2 + 1)
    second.append(28)
    pool.check_integrity([*first.cache.pages, *second.cache.pages])
    first.check()


def test_without_eviction_nothing_is_ever_evicted() -> None:
    pair = new_pair(new_pool(300))
    pair.append(17)
    for _ in range(100):
        pair.append(1)
    pair.check()
    assert pair.cache.kv_len.tolist() == [117] * N_LAYERS


def test_a_released_sequence_can_start_again() -> None:
    pair = new_pair(new_pool(60))
    pair.append(30)
    pair.evict([0.1] * N_LAYERS, np.random.default_rng(0), PUBLISHED_DISTANCE)
    pair.cache.release()
    pair.cache.pool.check_integrity([])
    again = Pair(pair.cache, [ListLayer([]) for _ in range(N_LAYERS)])
    again.append(30)
    again.append(1)
    again.check()


def test_an_engine_decodes_with_the_published_eviction(half_engine: Engine) -> None:
    """The positions in the engine's pool after a real prompt and each of 50 real steps."""
    runner = half_engine.runner
    sequence = runner.new_sequence()
    runner.prefill(sequence, random_ids(half_engine, 100, seed=1))
    layers = []
    for layer, share in enumerate(half_engine.manifest.kept_shares):
        model = ListLayer([])
        model.compress(runner.kept_positions(sequence, layer)[0].tolist(), share, PUBLISHED_DISTANCE)
        layers.append(model)
    for token_id in random_ids(half_engine, 50, seed=2):
        position = sequence.num_computed_tokens
        runner.decode([sequence], [token_id])
        for layer, model in enumerate(layers):
            model.decode(position)
            assert np.sort(runner.kept_positions(sequence, layer)).tolist() == [model.rows] * 2
    sequence.release()
