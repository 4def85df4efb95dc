"""TokenScores beyond the cases of its spec: any shape and attributes, any chunking, and what the attributes mean."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_op_parity import run
from trt_kv.opspec import Case
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import gather_slots, pages_of
from trt_kv.plugins.registry import kernel, op_specs

SPEC = op_specs()["TokenScores"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sequences of any length, some of whose prompts end in this step."""
    n_sequences = draw(st.integers(1, 4))
    new = tuple(draw(st.lists(st.integers(1, 9), min_size=n_sequences, max_size=n_sequences)))
    n_kv_heads = draw(st.integers(1, 4))
    own_tokens = draw(st.booleans())
    attributes = {
        "window": draw(st.sampled_from([0, 1, 3, 20])),
        "per_head": 1 if own_tokens else draw(st.integers(0, 1)),
        "pooling": draw(st.sampled_from([1, 3, 5, 9])),
        "average": draw(st.integers(0, 1)),
        "generated": draw(st.integers(0, 1)),
    }
    remaining = [draw(st.integers(-1, 3)) + (n - 1 - i) for n in new for i in range(n)]
    return Case(
        name="any",
        cached=tuple(draw(st.lists(st.integers(0, 30), min_size=n_sequences, max_size=n_sequences))),
        new=new,
        dims={"H": n_kv_heads * draw(st.integers(1, 3)), "K": n_kv_heads, "D": 5, "P": draw(st.integers(1, 9)), "L": 2},
        attributes=attributes,
        values={"prompt_remaining": tuple(remaining)},
        own_tokens=own_tokens,
    )


@settings(max_examples=80)
@given(case=cases(), seed=st.integers(0, 999))
def test_kernel_equals_reference_in_any_case(case: Case, seed: int) -> None:
    inputs = case_inputs(SPEC, case, seed=seed)
    expected, got = (run(SPEC, name, inputs)["scores_out"] for name in ("reference", "cpu"))
    np.testing.assert_allclose(got, expected, atol=SPEC.tolerance.atol, rtol=SPEC.tolerance.rtol)


def whole_prompt(n_tokens: int, attributes: dict[str, int], seed: int) -> dict[str, Any]:
    """A prompt in one chunk, its slots in an order of their own, with the softmax denominators of its causal attention."""
    case = Case(
        name="prompt",
        cached=(0,),
        new=(n_tokens,),
        dims={"H": 6, "K": 3, "D": 5, "P": 4, "L": 1},
        attributes=attributes,
        values={"positions": tuple(range(n_tokens)), "prompt_remaining": tuple(range(n_tokens - 1, -1, -1))},
    )
    inputs = case_inputs(SPEC, case, seed=seed)
    pages, offsets = np.divmod(inputs["slots"][0], 4)
    inputs["token_positions"][pages, :, offsets] = inputs["positions"][:, None]
    inputs["scores"][:] = 0.0
    inputs["lse"] = np.log(np.exp(causal_logits(inputs)).sum(axis=2)).T.astype(np.float32)
    return inputs


def causal_logits(inputs: dict[str, Any]) -> np.ndarray:
    """[H, N, N] fp64, -inf where a query may not see a token; rows and columns in order of position."""
    pages, offsets = np.divmod(inputs["slots"][0], inputs["page_size"])
    k_NKD = inputs["kv"][pages, 0, :, offsets].astype(np.float64)
    k_NHD = k_NKD.repeat(inputs["q"].shape[1] // k_NKD.shape[1], axis=1)
    logits = np.einsum("nhd,mhd->hnm", inputs["q"], k_NHD) * inputs["scale"]
    return np.where(np.tri(len(k_NKD), dtype=bool), logits, -np.inf)


def scores_of(inputs: dict[str, Any]) -> np.ndarray:
    """[K, N] in order of position, by the CPU kernel."""
    inputs = copy.deepcopy(inputs)
    kernel("TokenScores", "cpu")(**inputs)
    n_cached = int(inputs["kv_len"][0, 0])
    pages = pages_of(inputs["page_table"], 0, 0, n_cached, inputs["page_size"])
    order = np.argsort(gather_slots(inputs["token_positions"], pages, n_cached), axis=1)
    return np.take_along_axis(gather_slots(inputs["scores"], pages, n_cached), order, axis=1)


@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_scores_are_column_sums_of_the_attention_matrix_and_means_with_average(window: int) -> None:
    inputs = whole_prompt(23, {"window": window, "per_head": 1}, seed=0)
    weights_HNN = np.exp(causal_logits(inputs) - inputs["lse"].T[:, :, None])
    weights_KNN = weights_HNN.reshape(3, 2, 23, 23).mean(axis=1)[:, -window:]
    np.testing.assert_allclose(scores_of(inputs), weights_KNN.sum(axis=1), atol=1e-5)
    n_sees = np.tri(23)[-window:].sum(axis=0)
    np.testing.assert_allclose(scores_of({**inputs, "average": 1}), weights_KNN.sum(axis=1) / n_sees, atol=1e-5)
    shared_KN = np.tile(weights_KNN.mean(axis=0).sum(axis=0), (3, 1))
    np.testing.assert_allclose(scores_of({**inputs, "per_head": 0}), shared_KN, atol=1e-5)


@given(window=st.integers(0, 30), reach=st.integers(0, 6), n_tokens=st.integers(1, 26))
def test_pooling_is_snapkvs_average_pooling_of_the_tokens_before_the_window(window: int, reach: int, n_tokens: int) -> None:
    kernel_size = 2 * reach + 1
    inputs = whole_prompt(n_tokens, {"window": window, "per_head": 1}, seed=1)
    expected_KN = scores_of(inputs)
    n_pooled = max(0, n_tokens - window)
    if n_pooled:
        before = torch.from_numpy(expected_KN[None, :, :n_pooled])
        expected_KN[:, :n_pooled] = torch.nn.functional.avg_pool1d(before, kernel_size, padding=reach, stride=1)[0].numpy()
    np.testing.assert_allclose(scores_of({**inputs, "pooling": kernel_size}), expected_KN, atol=1e-5)


@given(cuts=st.sets(st.integers(1, 22)), window=st.sampled_from([0, 4, 9]))
def test_a_prompt_in_chunks_is_scored_as_in_one_piece(cuts: set[int], window: int) -> None:
    attributes = {"window": window, "per_head": 1, "pooling": 3, "average": 1}
    inputs = whole_prompt(23, attributes, seed=2)
    expected_KN = scores_of(inputs)
    bounds = [0, *sorted(cuts), 23]
    slots = inputs["page_table"][0, 0, np.arange(23) // 4] * 4 + np.arange(23) % 4
    # A cache fills its slots in order; the drawn inputs do not.
    for name in ("kv", "token_positions"):
        state = np.moveaxis(inputs[name], -1 if name == "token_positions" else -2, 1)
        state[np.divmod(slots, 4)] = state[np.divmod(inputs["slots"][0], 4)].copy()
    inputs["scores"][:] = np.nan
    for start, end in itertools.pairwise(bounds):
        rows = slice(start, end)
        step = inputs | {name: inputs[name][rows] for name in ("q", "lse", "positions", "prompt_remaining")}
        step |= {"slots": slots[None, rows], "kv_len": np.array([[end]]), "cu_tokens": np.array([0, end - start])}
        kernel("TokenScores", "cpu")(**step)
    pages = pages_of(inputs["page_table"], 0, 0, 23, 4)
    np.testing.assert_allclose(gather_slots(inputs["scores"], pages, 23), expected_KN, atol=1e-5)
