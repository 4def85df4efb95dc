"""The random lots: the same numbers in any int64 arithmetic, and nothing to be seen in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.plugins.lots import LOTS, PRIME, ROUNDS, key_of, lot_of, scrambled

numbers = st.integers(0, 2**31 - 1)


@given(seed=numbers, layer=numbers, head=numbers, position=numbers)
def test_int64_never_overflows(seed: int, layer: int, head: int, position: int) -> None:
    """Python's integers have no size; numpy raises no error where int64 wraps, but the numbers would differ."""
    expected = lot_of(key_of(seed, layer, head), position)
    got = lot_of(key_of(*np.array([[seed], [layer], [head]])), np.array([position]))
    assert got.tolist() == [expected]
    assert 0 <= expected < LOTS
    assert float(np.float32(expected)) == expected


def test_a_round_is_a_permutation_of_the_remainders() -> None:
    """x**5 has the inverse x**d with 5 d = 1 modulo PRIME - 1."""
    inverse = pow(5, -1, PRIME - 1)
    drawn = np.random.default_rng(0).integers(0, PRIME, 50).tolist()
    for x in [0, 1, PRIME - 1, *drawn]:
        assert (pow(scrambled(x, ROUNDS[0]), inverse, PRIME) - ROUNDS[0]) % PRIME == x


def _shares(seed: int, layer: int, head: int, n: int = 20_000) -> np.ndarray:
    lots: np.ndarray = lot_of(key_of(seed, layer, head), np.arange(n)) / LOTS
    return lots


@pytest.mark.parametrize("key", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**31 - 2, 31, 7)])
def test_lots_of_neighbouring_positions_are_uniform_and_do_not_depend_on_each_other(key: tuple[int, int, int]) -> None:
    """Within five standard deviations of what independent uniform numbers give."""
    lots = _shares(*key)
    counts = np.bincount((lots * 50).astype(int), minlength=50)
    expected = len(lots) / 50
    assert abs(((counts - expected) ** 2 / expected).sum() - 49) < 5 * np.sqrt(2 * 49)
    for step in (1, 2, 16):
        assert abs(np.corrcoef(lots[step:], lots[:-step])[0, 1]) < 5 / np.sqrt(len(lots))


def test_seeds_layers_and_heads_draw_lots_that_have_nothing_in_common() -> None:
    keys = [(seed, layer, head) for seed in (0, 1, 2) for layer in (0, 1, 2) for head in (0, 1, 2)]
    correlations = np.corrcoef([_shares(*key) for key in keys])
    np.fill_diagonal(correlations, 0.0)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)
