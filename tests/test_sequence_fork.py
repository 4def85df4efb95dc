"""A forked sequence: the same tokens in pages of its own, going on as its original would."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.errors import CapacityError
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache

N_LAYERS = 3
PAGE_SIZE = 5


def _pool(n_pages: int = 90) -> HostKvPool:
    pool = HostKvPool(n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=2, head_size=3)
    rng = np.random.default_rng(0)
    pool.kv[:] = rng.standard_normal(pool.kv.shape)
    pool.scores[:] = rng.standard_normal(pool.scores.shape)
    pool.token_positions[:] = rng.integers(0, 1000, pool.token_positions.shape)
    return pool


def _sequence(pool: KvPool[Any], n_tokens: int, kept: tuple[int, ...] | None) -> SequenceCache:
    sequence = SequenceCache(pool, n_layers=N_LAYERS, decode_distance=4)
    sequence.append(n_tokens)
    if kept is not None:
        kept_L = np.minimum(kept, n_tokens)
        sequence.shrink(kept_L, [int(n) / n_tokens for n in kept_L])
    return sequence


def _cached(sequence: SequenceCache, slots: np.ndarray) -> list[np.ndarray]:
    """What the pool holds at ``slots``, whichever pages they are in."""
    pages, offsets = np.divmod(slots, PAGE_SIZE)
    pool = sequence.pool
    return [pool.kv[pages, :, :, offsets], pool.token_positions[pages, :, offsets], pool.scores[pages, :, offsets]]


def _all_slots(sequence: SequenceCache, layer: int) -> np.ndarray:
    index = np.arange(sequence.kv_len[layer])
    slots: np.ndarray = sequence.page_table[layer, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE
    return slots


kept_counts = st.none() | st.tuples(*[st.integers(1, 40)] * N_LAYERS)


@given(n_tokens=st.integers(1, 40), kept=kept_counts, n_decoded=st.integers(0, 12))
def test_a_fork_holds_the_same_tokens_and_chooses_the_same_slots(
    n_tokens: int, kept: tuple[int, ...] | None, n_decoded: int
) -> None:
    pool = _pool()
    sequence = _sequence(pool, n_tokens, kept)
    for _ in range(n_decoded):
        sequence.append(1)
    twin = sequence.fork()
    pool.check_integrity([*sequence.pages, *twin.pages])
    assert twin.num_computed_tokens == sequence.num_computed_tokens
    assert twin.kv_len.tolist() == sequence.kv_len.tolist()
    for layer in range(N_LAYERS):
        originals, copies = (_cached(s, _all_slots(s, layer)) for s in (sequence, twin))
        assert all(np.array_equal(a, b) for a, b in zip(originals, copies, strict=True))
    for _ in range(10):
        original, copy = sequence.append(1), twin.append(1)
        assert (original % PAGE_SIZE).tolist() == (copy % PAGE_SIZE).tolist()
        assert twin.kv_len.tolist() == sequence.kv_len.tolist()
    assert not set(sequence.pages) & set(twin.pages)


def test_what_happens_to_a_fork_does_not_happen_to_its_original() -> None:
    pool = _pool()
    sequence = _sequence(pool, 23, None)
    before = [_cached(sequence, _all_slots(sequence, layer)) for layer in range(N_LAYERS)]
    twin = sequence.fork()
    pool.kv[twin.pages] = np.nan
    twin.shrink(np.array([3, 4, 5]), [0.1, 0.2, 0.3])
    twin.append(7)
    twin.release()
    assert sequence.kv_len.tolist() == [23] * N_LAYERS
    after = [_cached(sequence, _all_slots(sequence, layer)) for layer in range(N_LAYERS)]
    assert all(np.array_equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    pool.check_integrity(sequence.pages)


def test_a_fork_that_does_not_fit_takes_nothing() -> None:
    pool = _pool(n_pages=20)
    sequence = _sequence(pool, 23, None)
    with pytest.raises(CapacityError, match="pool is full"):
        sequence.fork()
    pool.check_integrity(sequence.pages)
