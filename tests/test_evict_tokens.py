"""EvictTokens beyond the cases of its spec: any shape and attributes, and what the attributes mean."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_onnx_bodies import assert_body_equals_reference, run_in_onnxruntime
from tests.test_op_parity import live_slots, run
from trt_kv.opspec import Case
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import gather_kv, gather_slots, pages_of
from trt_kv.plugins.registry import kernel, op_specs

SPEC = op_specs()["EvictTokens"]
BY_SCORES, NEWEST_FIRST, BY_LOTS = range(3)
TO_BUDGET, TO_DROP = 1, 2
HEADS = {"H": 3, "K": 3, "D": 4, "P": 5, "L": 2}

attribute_values = st.fixed_dictionaries(
    {
        "kept_share": st.floats(0.0, 1.0, width=32).filter(lambda share: share == 0.0 or share > 2**-17),
        "kept_tokens": st.integers(-9, 9),
        "drop": st.sampled_from([1, 1, 2, 7]),
        "sinks": st.integers(0, 4),
        "recent": st.integers(0, 4),
        "recent_share": st.sampled_from([0.0, 0.5, 1.0]),
        "ranking": st.sampled_from([BY_SCORES, NEWEST_FIRST, BY_LOTS]),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@st.composite
def any_inputs(draw: st.DrawFn) -> dict[str, Any]:
    """Inputs whose scores take few values, so that many of them are equal."""
    lengths = tuple(draw(st.lists(st.integers(0, 30), min_size=1, max_size=3)))
    values = {"evict": tuple(draw(st.integers(0, 2)) for _ in lengths)}
    if draw(st.booleans()):
        values["budget"] = tuple(draw(st.integers(-2, 35)) for _ in lengths)
    dims = {**HEADS, "K": draw(st.sampled_from([1, 3])), "P": draw(st.integers(1, 9))}
    case = Case(
        name="any",
        cached=lengths,
        new=(0,) * len(lengths),
        dims=dims,
        attributes=draw(attribute_values),
        values=values,
        own_tokens=draw(st.booleans()),
    )
    inputs = case_inputs(SPEC, case, seed=draw(st.integers(0, 999)))
    inputs["scores"] = np.round(inputs["scores"] * 4)
    return inputs


@settings(max_examples=150)
@given(inputs=any_inputs())
def test_kernel_equals_reference_in_any_case(inputs: dict[str, Any]) -> None:
    expected, got = run(SPEC, "reference", inputs), run(SPEC, "cpu", inputs)
    live = live_slots(SPEC, inputs, expected)
    for name, reference in expected.items():
        where = live if name.endswith("_out") else ...
        np.testing.assert_array_equal(got[name][where], reference[where], err_msg=name)


@settings(max_examples=30)
@given(inputs=any_inputs())
def test_body_equals_reference_in_any_case(inputs: dict[str, Any]) -> None:
    assert_body_equals_reference(SPEC, inputs, run_in_onnxruntime)


def sequence(n_tokens: int, *, own_tokens: bool = False, seed: int = 0, **attributes: float) -> dict[str, Any]:
    """One sequence and the op's attributes; whatever is not asked for decides nothing."""
    neutral = {"kept_share": 1.0, "sinks": 0, "recent": 0}
    case = Case(
        name="one",
        cached=(n_tokens,),
        new=(0,),
        dims=HEADS,
        attributes={**neutral, **attributes},
        own_tokens=own_tokens,
    )
    inputs = case_inputs(SPEC, case, seed=seed)
    inputs["evict"][:] = TO_DROP if attributes.get("drop") else TO_BUDGET
    return inputs


def evict(inputs: dict[str, Any], **attributes: float) -> dict[str, Any]:
    """The inputs as the CPU kernel leaves them, ``kv_len`` included."""
    inputs = copy.deepcopy(inputs | attributes)
    inputs["evict"][:] = TO_DROP if attributes.get("drop") else inputs["evict"]
    (kept,) = kernel("EvictTokens", "cpu")(**inputs)
    inputs["kv_len"] = inputs["kv_len"].copy()
    inputs["kv_len"][inputs["layer"]] = kept
    return inputs


def held(inputs: dict[str, Any], name: str = "token_positions") -> np.ndarray:
    """What the sequence's slots hold, [K, S]; of ``kv`` the keys and values [K, S, 2 D]."""
    n = int(inputs["kv_len"][inputs["layer"], 0])
    pages = pages_of(inputs["page_table"], inputs["layer"], 0, n, inputs["page_size"])
    if name == "kv":
        return np.concatenate(gather_kv(inputs["kv"], pages, n), axis=2)
    return gather_slots(inputs[name], pages, n)


def tokens_of(inputs: dict[str, Any]) -> list[set[int]]:
    return [set(positions) for positions in held(inputs).tolist()]


@pytest.mark.parametrize("drop", [0, 1, 4])
@pytest.mark.parametrize("ranking", [BY_SCORES, NEWEST_FIRST, BY_LOTS])
def test_every_survivor_keeps_its_key_value_and_score(drop: int, ranking: int) -> None:
    """Sources are overwritten by other survivors while tokens move within their own pages."""
    before = sequence(38, own_tokens=True, kept_share=0.6, drop=drop, ranking=ranking)
    after = evict(before)
    for head in range(HEADS["K"]):
        slot_of = {position: slot for slot, position in enumerate(held(before)[head].tolist())}
        came_from = [slot_of[position] for position in held(after)[head].tolist()]
        for name in ("kv", "scores"):
            np.testing.assert_array_equal(held(after, name)[head], held(before, name)[head][came_from])


@given(n=st.integers(0, 40), n_drops=st.integers(1, 9), ranking=st.integers(0, 2), sinks=st.integers(0, 4))
def test_dropping_one_by_one_keeps_what_dropping_at_once_keeps(n: int, n_drops: int, ranking: int, sinks: int) -> None:
    inputs = sequence(n, own_tokens=True, sinks=sinks, recent=2, ranking=ranking)
    at_once = evict(inputs, kept_tokens=-n_drops)
    for _ in range(n_drops):
        inputs = evict(inputs, drop=1)
    assert (
        tokens_of(inputs)
        == tokens_of(at_once)
        == tokens_of(evict(sequence(n, own_tokens=True, sinks=sinks, recent=2, ranking=ranking), drop=n_drops))
    )


def test_dropping_one_token_moves_one_token_per_head() -> None:
    before = sequence(33, own_tokens=True, drop=1)
    after = evict(before)
    moved = (held(after) != held(before)[:, :-1]).sum(axis=1)
    assert (moved <= 1).all()
    assert moved.any()


@given(n_prompt=st.integers(1, 30), budget=st.integers(5, 20), n_new=st.integers(0, 25), sinks=st.integers(0, 4))
def test_newest_first_is_streamingllm(n_prompt: int, budget: int, n_new: int, sinks: int) -> None:
    """Compressed after the prompt, then one token in and one out: always the sinks and the newest tokens."""
    inputs = sequence(n_prompt + n_new, ranking=NEWEST_FIRST, sinks=sinks)
    layer, page_size = inputs["layer"], HEADS["P"]
    inputs["kv_len"][layer] = n_prompt
    held_slots = np.arange(n_prompt)
    table = inputs["page_table"][layer, 0]
    inputs["token_positions"][table[held_slots // page_size], :, held_slots % page_size] = held_slots[:, None]
    inputs = evict(inputs, kept_share=0.0, kept_tokens=budget)
    for position in range(n_prompt, n_prompt + n_new):
        slot = int(inputs["kv_len"][layer, 0])
        inputs["token_positions"][table[slot // page_size], :, slot % page_size] = position
        inputs["kv_len"][layer] += 1
        if slot + 1 > budget:
            inputs = evict(inputs, drop=1)
    n = n_prompt + n_new
    newest = max(0, min(n, budget) - sinks)
    expected = set(range(min(n, sinks))) | set(range(n - newest, n))
    assert tokens_of(inputs) == [expected] * HEADS["K"]


@given(n=st.integers(1, 40), kept_share=st.sampled_from([0.0, 0.3, 0.5]), drop=st.sampled_from([0, 1, 3]))
def test_each_head_keeps_what_it_would_keep_alone(n: int, kept_share: float, drop: int) -> None:
    inputs = sequence(n, own_tokens=True, kept_share=kept_share, drop=drop, sinks=1, recent=1, recent_share=0.5)
    together = tokens_of(evict(inputs))
    for head in range(HEADS["K"]):
        alone = inputs | {name: inputs[name][:, head : head + 1] for name in ("token_positions", "scores")}
        alone["kv"] = inputs["kv"][:, :, head : head + 1]
        assert tokens_of(evict(alone)) == [together[head]]


def test_equal_rankings_keep_equal_tokens_in_all_heads() -> None:
    inputs = sequence(31, kept_share=0.4)
    inputs["scores"][:] = inputs["scores"][:, :1]
    for drop in (0, 1, 5):
        assert len({frozenset(tokens) for tokens in tokens_of(evict(inputs, drop=drop))}) == 1


@given(n=st.integers(0, 40), few=st.integers(0, 40), more=st.integers(0, 40), ranking=st.integers(0, 2))
def test_a_larger_budget_keeps_everything_that_a_smaller_one_keeps(n: int, few: int, more: int, ranking: int) -> None:
    inputs = sequence(n, own_tokens=True, kept_share=0.0, ranking=ranking, sinks=2, recent=1)
    fewer, all_of_them = (tokens_of(evict(inputs, kept_tokens=tokens)) for tokens in sorted((few, more)))
    assert all(small <= large for small, large in zip(fewer, all_of_them, strict=True))


def test_lots_hang_on_seed_layer_and_head_and_on_nothing_else() -> None:
    inputs = sequence(40, kept_share=0.5, ranking=BY_LOTS)
    first = tokens_of(evict(inputs))
    assert len({frozenset(tokens) for tokens in first}) == HEADS["K"]
    assert tokens_of(evict(inputs, seed=1)) != first
    elsewhere = inputs | {
        "token_positions": inputs["token_positions"][:, :, ::-1],
        "scores": np.full_like(inputs["scores"], np.nan),
    }
    assert tokens_of(evict(elsewhere)) == first
    other_layer = inputs | {name: inputs[name][::-1] for name in ("page_table", "kv_len")} | {"layer": 0}
    assert tokens_of(evict(other_layer)) != first


@given(n=st.integers(1, 60), sinks=st.integers(0, 4), share=st.sampled_from([0.25, 0.5, 1.0]), kept=st.integers(0, 60))
def test_the_recent_share_is_of_the_kept_tokens_without_sinks(n: int, sinks: int, share: float, kept: int) -> None:
    """The newest tokens have the lowest scores: those of them that stay are there for being recent."""
    inputs = sequence(n, kept_share=0.0, kept_tokens=kept, sinks=sinks, recent_share=share)
    inputs["scores"] = -inputs["token_positions"].astype(np.float32)
    target = min(n, max(1, kept))
    n_recent = int(share * max(0, target - sinks))
    positions = np.sort(held(inputs)[0])
    n_kept = min(n, max(target, sinks + n_recent))
    expected = set(positions[: n_kept - n_recent].tolist()) | set(positions[n - min(n, n_recent) :].tolist())
    assert tokens_of(evict(inputs)) == [expected] * HEADS["K"]
