"""What RecallAttention means beyond its spec's cases: its extremes are the known methods, its budget is kept to the page."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.opspec import Case
from trt_kv.plugins.cached_attention.arguments import Arguments
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.recall_attention import reference
from trt_kv.plugins.recall_attention.choice import best_pages, drifted_heads
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.spec import SPEC
from trt_kv.plugins.registry import kernel

DIMS = {"H": 6, "K": 3, "D": 10, "P": 4, "L": 2}


def decoding(
    *, seed: int = 0, cached: tuple[int, ...] = (90, 61), dims: dict[str, int] = DIMS, **attributes: Any
) -> dict[str, Any]:
    """One generated token for each of some sequences."""
    attributes = {"kept_share": 0.0, "kept_tokens": 36, "sinks": 3, "recent": 5} | attributes
    case = Case(
        name="decoding",
        cached=cached,
        new=(1,) * len(cached),
        dims=DIMS,
        attributes=attributes,
        values={"prompt_remaining": (-1,) * len(cached)},
        in_order=True,
    )
    return case_inputs(SPEC, case, seed=seed)


def results(inputs: dict[str, Any], **changes: Any) -> tuple[np.ndarray, ...]:
    """out, lse, corrected of the CPU kernel."""
    return kernel("RecallAttention", "cpu")(**copy.deepcopy(inputs | changes))


@given(seed=st.integers(0, 10**6), pooling=st.integers(0, 3))
def test_a_tau_above_one_is_retrieval_by_the_steps_own_query(seed: int, pooling: int) -> None:
    """Whatever was remembered: as if the query before had been this one (synchronous retrieval, as Quest's)."""
    inputs = decoding(seed=seed, pooling=pooling)
    out, lse, corrected = results(inputs, tau=1.01)
    assert corrected.all()
    same = inputs["last_query"].copy()
    same[inputs["query_rows"][inputs["layer"]]] = inputs["q"]
    for tau, last_query in ((1.01, np.zeros_like(same)), (1.01, np.full_like(same, np.nan)), (-1.01, same)):
        again = results(inputs, tau=tau, last_query=last_query)
        np.testing.assert_array_equal(again[0], out)
        np.testing.assert_array_equal(again[1], lse)


@given(seed=st.integers(0, 10**6), pooling=st.integers(0, 3))
def test_a_tau_below_minus_one_is_pure_speculation(seed: int, pooling: int) -> None:
    """The pages are the last query's, whatever this step's query is; with tau above one they are this step's."""
    inputs = decoding(seed=seed, pooling=pooling)
    before = inputs["last_query"][inputs["query_rows"][inputs["layer"]]]
    for q in (inputs["q"], -inputs["q"], 7 * before):
        for tau, probes in ((-1.01, before), (1.01, q)):
            assert not np.isnan(results(only_pages_of(inputs, probes), tau=tau, q=q)[0]).any()
    assert not results(inputs, tau=-1.01)[2].any()


@given(seed=st.integers(0, 10**6))
def test_every_page_of_the_budget_is_attended_to(seed: int) -> None:
    """Sinks, newest and chosen pages together fill the budget; poison in any of them shows in its KV head's output."""
    inputs = decoding(seed=seed, cached=(90,), kept_tokens=36, sinks=3, recent=5)
    (pages_of_heads,) = pages_by_hand(inputs, inputs["q"])
    for head, pages in enumerate(pages_of_heads):
        assert len(pages) == 36 // 4 == len({0, 21, 22} | pages)
        for page in pages:
            poisoned = copy.deepcopy(inputs)
            poisoned["kv"][poisoned["page_table"][1, 0, page], 1, head, 1] = np.nan
            broken_H = np.isnan(results(poisoned, tau=1.01)[0][0]).any(axis=1)
            assert broken_H.reshape(3, -1).all(axis=1).tolist() == [other == head for other in range(3)]


def pages_by_hand(inputs: dict[str, Any], probes_BHD: np.ndarray) -> list[list[set[int]]]:
    """For each sequence and KV head the pages to attend to, by the reference's values and a sort in plain Python."""
    layer, size, found = inputs["layer"], inputs["page_size"], []
    for b, n in enumerate(inputs["kv_len"][layer]):
        n_sinks, first_newest = -(-inputs["sinks"] // size), (int(n) - inputs["recent"]) // size
        room = inputs["kept_tokens"] // size - n_sinks - (-(-(inputs["recent"] - 1) // size) + 1)
        between, table = range(n_sinks, first_newest), inputs["page_table"][layer, b]
        always = {*range(n_sinks), *range(first_newest, -(-int(n) // size))}
        heads = []
        for head, probe_GD in enumerate(np.split(probes_BHD[b].astype(np.float64), inputs["kv"].shape[2])):
            summaries = inputs["summaries"][table[between.start : between.stop], head]
            values = reference.page_values(probe_GD, summaries, inputs["pooling"], 1.0)
            ranked = sorted((-value, page) for value, page in zip(values, between, strict=True))
            heads.append(always | {page for _, page in ranked[:room]})
        found.append(heads)
    return found


def only_pages_of(inputs: dict[str, Any], probes_BHD: np.ndarray) -> dict[str, Any]:
    """The inputs with values that are no numbers in all pages but those that the probes choose."""
    poisoned = copy.deepcopy(inputs)
    for b, heads in enumerate(pages_by_hand(inputs, probes_BHD)):
        n_pages = -(-int(inputs["kv_len"][inputs["layer"], b]) // inputs["page_size"])
        for head, pages in enumerate(heads):
            others = sorted(set(range(n_pages)) - pages)
            poisoned["kv"][inputs["page_table"][inputs["layer"], b, others], 1, head] = np.nan
    return poisoned


@given(n=st.integers(1, 200), seed=st.integers(0, 1000))
def test_a_budget_of_everything_is_cached_attention_bit_for_bit(n: int, seed: int) -> None:
    inputs = decoding(seed=seed, cached=(n,), kept_share=1.0, kept_tokens=4 * DIMS["P"] + 8)
    inputs["prompt_len"] = np.array([n])
    out, lse, _ = results(inputs)
    names = [field.name for field in dataclasses.fields(Arguments) if field.name in inputs]
    full = kernel("CachedAttention", "cpu")(**copy.deepcopy({name: inputs[name] for name in names}))
    np.testing.assert_array_equal(out, full[0])
    np.testing.assert_array_equal(lse, full[1])


@given(
    n_tokens=st.integers(1, 300),
    page_size=st.integers(1, 40),
    sinks=st.integers(0, 50),
    recent=st.integers(1, 60),
    budget=st.integers(0, 200),
)
def test_pages_divide_into_sinks_choosable_and_newest(
    n_tokens: int, page_size: int, sinks: int, recent: int, budget: int
) -> None:
    """Every token is in one of the three; protected tokens are protected; only full pages can be chosen; the budget holds."""
    limits = PageLimits(page_size=page_size, sinks=sinks, recent=recent)
    between, first_newest = limits.choosable(n_tokens), limits.first_newest(n_tokens)
    n_pages = -(-n_tokens // page_size)
    assert n_pages - first_newest <= limits.n_newest
    assert all(token // page_size >= first_newest for token in range(max(0, n_tokens - recent), n_tokens))
    assert all(token // page_size < limits.n_sinks for token in range(sinks))
    assert set(range(n_pages)) == {*range(min(n_pages, limits.n_sinks)), *between, *range(first_newest, n_pages)}
    assert all((page + 1) * page_size <= n_tokens - 1 for page in between)
    if budget >= page_size * (limits.n_sinks + limits.n_newest):
        assert limits.n_most(budget) * page_size <= budget
    after = limits.choosable(n_tokens + 1)
    assert after.start == between.start
    assert after.stop >= between.stop


def test_drift_is_the_mean_cosine_of_a_group() -> None:
    last = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    now = np.array([[1, 0], [0, -1], [2, 0], [1, 1]], np.float32)
    expected = [(1 - 1) / 2, (1 + 2**-0.5) / 2]
    for tau in (-0.1, 0.1, 0.8, 0.86, 1.0):
        assert drifted_heads(now, last, 2, tau).tolist() == [value < tau for value in expected]
    assert drifted_heads(np.full_like(now, np.nan), last, 2, -1.01).all()
    assert drifted_heads(np.zeros_like(now), last, 2, -1.01).all()


@given(
    values=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    n_chosen=st.integers(0, 30),
    pooling=st.integers(2, 3),
)
def test_the_best_pages_are_chosen_and_of_equal_ones_the_lower(values: list[int], n_chosen: int, pooling: int) -> None:
    """Against a sort of (value, page) in plain Python."""
    n_chosen = min(n_chosen, len(values))
    summaries = np.repeat(np.array(values, np.float32)[:, None, None, None], 2, axis=2)
    chosen = best_pages(np.ones((1, 1), np.float32), np.arange(len(values)), summaries, n_chosen, pooling, 1.0)
    ranked = sorted(range(len(values)), key=lambda page: (-values[page], page))
    assert chosen.tolist() == [sorted(ranked[:n_chosen])]


@pytest.mark.parametrize("pooling", range(4))
def test_poolings_agree_where_a_group_has_one_query(pooling: int) -> None:
    """With one query head per KV head mean and maximum are the same, and a softmax keeps the order of its bounds."""
    rng = np.random.default_rng(0)
    summaries = np.sort(rng.standard_normal((40, 3, 2, 5), np.float32), axis=2)
    probe = rng.standard_normal((3, 5), np.float32)
    expected = best_pages(probe, np.arange(40), summaries, 7, 3, 1.0)
    np.testing.assert_array_equal(best_pages(probe, np.arange(40), summaries, 7, pooling, 1.0), expected)


def test_summaries_bound_what_a_query_can_see() -> None:
    """Quest's bound is one: no key of the page scores higher. ArkVale's summary lies within it."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((9, 5), np.float32)
    (lo, hi), (inner_lo, inner_hi) = (reference.summary_of(keys, summary) for summary in (0, 1))
    for query in rng.standard_normal((50, 5)):
        assert np.maximum(query * lo, query * hi).sum() >= (keys @ query).max() - 1e-6
    assert (lo <= inner_lo).all()
    assert (inner_lo <= inner_hi).all()
    assert (inner_hi <= hi).all()
