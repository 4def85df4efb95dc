"""The page pool: exact accounting, all or nothing, memory only where it is used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.errors import CapacityError
from trt_kv.runtime.backends.host.store import HostKvPool


def small_pool(n_pages: int = 7) -> HostKvPool:
    return HostKvPool(n_pages=n_pages, page_size=5, n_kv_heads=2, head_size=3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30))
def test_every_page_is_free_or_owned_exactly_once(steps: list[tuple[bool, int]]) -> None:
    """Any order of taking and giving back."""
    pool = small_pool()
    held: list[list[int]] = []
    for takes, number in steps:
        if not takes:
            if held:
                pool.release(held.pop(number % len(held)))
            continue
        n_free = pool.n_free
        if number <= n_free:
            held.append(pool.allocate(number, owner=pool.new_owner()))
        else:
            with pytest.raises(CapacityError, match=f"{number} pages of 5 tokens needed, {n_free} of 7 free"):
                pool.allocate(number, owner=1)
            assert pool.n_free == n_free
        owned = [page for pages in held for page in pages]
        pool.check_integrity(owned)
        assert pool.used_bytes == len(owned) * pool.page_bytes


@pytest.mark.parametrize(
    ("break_it", "owned"),
    [
        (lambda pool: pool.allocate(2, owner=1), []),
        (id, [0]),
        (lambda pool: pool.allocate(1, owner=1), [0, 0]),
        (id, [7]),
    ],
    ids=["lost", "free and used", "used twice", "not of this pool"],
)
def test_lost_and_doubled_pages_are_noticed(break_it: Callable[[HostKvPool], object], owned: list[int]) -> None:
    pool = small_pool()
    break_it(pool)
    with pytest.raises(CapacityError, match="lost track"):
        pool.check_integrity(owned)


def test_bytes_are_those_of_keys_values_positions_and_scores() -> None:
    pool = small_pool()
    assert pool.page_bytes == 5 * 2 * (2 * 3 * 4 + 8 + 4)
    assert pool.used_bytes == 0


def test_a_large_pool_takes_memory_only_as_it_is_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    pool = HostKvPool(n_pages=2000, page_size=32, n_kv_heads=8, head_size=128)
    assert pool.kv.nbytes == 500 * 2**20
    assert resident_bytes() - before < 2**24
    pool.kv[:20] = 1.0
    assert resident_bytes() - before < 2**26
