"""Sampling beside transformers' processors: the same tokens left, the same probabilities, for any combination of parameters."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import candidates_of, log_probability, log_total, next_token, top_log_probabilities
from trt_kv.runtime.sampling.processors import LogitsProcessor
from trt_kv.runtime.sampling.selection import drawn, keep_best

V = 1500
END = (7, 11)


def logits_of(seed: int, spread: float, n: int = V) -> np.ndarray:
    """[V] fp32, all different, as a model's are."""
    rng = np.random.default_rng(seed)
    return (rng.permutation(n) / n * spread + rng.random(n) * 1e-3).astype(np.float32)


def probabilities(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    left = candidates_of(logits_V, params)
    found_V = np.zeros(len(logits_V))
    found_V[slice(None) if left.ids is None else left.ids] = left.weights
    shares_V: np.ndarray = found_V / found_V.sum()
    return shares_V


def theirs_of(logits_V: np.ndarray, ids: list[int], processors: list[Any]) -> np.ndarray:
    scores = torch.from_numpy(logits_V.astype(np.float64))[None]
    for process in processors:
        scores = process(torch.tensor([ids]), scores)
    return scores[0].numpy()


filters = st.fixed_dictionaries(
    {"temperature": st.floats(0.2, 3.0)},
    optional={
        "top_k": st.integers(1, V + 5),
        "top_p": st.floats(0.05, 0.999),
        "min_p": st.floats(0.001, 0.9),
        "typical_p": st.floats(0.05, 0.99),
    },
)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**16), spread=st.sampled_from([0.5, 6.0, 30.0]), chosen=filters)
def test_filters_leave_what_transformers_leaves(seed: int, spread: float, chosen: dict[str, Any]) -> None:
    logits_V = logits_of(seed, spread)
    warpers: list[Any] = [theirs.TemperatureLogitsWarper(chosen["temperature"])]
    warpers += [theirs.TopKLogitsWarper(chosen["top_k"])] if "top_k" in chosen else []
    warpers += [theirs.TopPLogitsWarper(chosen["top_p"])] if "top_p" in chosen else []
    warpers += [theirs.MinPLogitsWarper(chosen["min_p"])] if "min_p" in chosen else []
    warpers += [theirs.TypicalLogitsWarper(mass=chosen["typical_p"])] if "typical_p" in chosen else []
    scores = theirs_of(logits_V, [0], warpers)
    expected_V = torch.softmax(torch.from_numpy(scores), 0).numpy()
    found_V = probabilities(logits_V, SamplingParams(**chosen))
    lost, added = (found_V == 0) & (expected_V > 1e-30), (found_V > 0) & (expected_V == 0)  # fp32 has no smaller ones
    differing = np.flatnonzero(lost | added)
    assert len(differing) <= 1 + ("typical_p" in chosen), "rounding may move the last token of a filter, not more"
    if not len(differing):
        np.testing.assert_allclose(found_V, expected_V, rtol=2e-4, atol=1e-12)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**16),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=30),
    generated=st.lists(st.integers(0, V - 1), max_size=30),
    penalty=st.floats(0.5, 2.0),
    bad_words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4),
    min_tokens=st.integers(0, 20),
)
def test_processors_change_logits_as_transformers_does(
    seed: int, prompt: list[int], generated: list[int], penalty: float, bad_words: list[list[int]], min_tokens: int
) -> None:
    logits_V = logits_of(seed, 20.0) - np.float32(10.0)
    ours = LogitsProcessor(
        SamplingParams(repetition_penalty=penalty, min_tokens=min_tokens, bad_words=bad_words),
        prompt,
        end_ids=END,
        bad_words=bad_words,
    )
    for token_id in generated:
        ours.accept(token_id)
    processors: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(penalty)]
    processors += [theirs.NoBadWordsLogitsProcessor(bad_words, torch.tensor([], dtype=torch.long))] if bad_words else []
    processors += [theirs.MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, torch.tensor(END))]
    expected_V = theirs_of(logits_V, prompt + generated, processors)
    before_V = logits_V.copy()
    np.testing.assert_allclose(ours.process(logits_V), expected_V, rtol=1e-6)
    np.testing.assert_array_equal(logits_V, before_V)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    processor = LogitsProcessor(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0}), [1, 1, 2])
    for token_id in (2, 4, 4, 4):
        processor.accept(token_id)
    np.testing.assert_allclose(processor.process(np.zeros(6, np.float32)), [0.0, 0.0, -0.75, 2.0, -1.25, 0.0])


@pytest.mark.parametrize("params", [{}, {"top_logprobs": 3}, {"min_tokens": 4}])
def test_logits_that_nothing_changes_are_not_copied(params: dict[str, Any]) -> None:
    assert not LogitsProcessor(SamplingParams(**params), [1, 2]).is_needed


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=70),
    repeats=st.sampled_from([1, 3, 100]),
    share=st.floats(0.01, 1.5),
    seed=st.integers(0, 99),
)
def test_the_best_are_a_prefix_of_the_sorted_tokens(values: list[float], repeats: int, share: float, seed: int) -> None:
    """Also of more equal tokens than are sorted."""
    values_N = np.tile(np.array(values, np.float32), repeats)
    weights_N = np.random.default_rng(seed).integers(0, 5, len(values_N)).astype(np.float32)
    order = sorted(np.flatnonzero(weights_N), key=lambda n: (-values_N[n], n))
    mass, total, expected = share * weights_N.sum(), 0.0, []
    for n in order:
        expected.append(n)
        total += float(weights_N[n])
        if total >= mass:
            break
    found_N = weights_N.copy()
    if weights_N.any():
        keep_best(values_N, found_N, mass)
    assert np.flatnonzero(found_N).tolist() == sorted(expected)
    np.testing.assert_array_equal(found_N[sorted(expected)], weights_N[sorted(expected)])


@given(
    weights=st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=1300), uniform=st.floats(0.0, 1.0, exclude_max=True)
)
def test_what_is_drawn_has_a_weight(weights: list[float], uniform: float) -> None:
    weights_N = np.array([*weights, 1.0], np.float32)
    index = drawn(weights_N, uniform)
    assert weights_N[index] > 0
    before = weights_N[:index].sum(dtype=np.float64)
    assert before - 1e-3 <= uniform * weights_N.sum(dtype=np.float64) <= before + weights_N[index] + 1e-3


@pytest.mark.parametrize("n", [5, 600, 40_000])
def test_the_likeliest_tokens_and_their_log_probabilities(n: int) -> None:
    logits_V = logits_of(3, 12.0, n)
    expected_V = torch.log_softmax(torch.from_numpy(logits_V.astype(np.float64)), 0).numpy()
    found = top_log_probabilities(logits_V, 4, log_total(logits_V))
    assert [token_id for token_id, _ in found] == np.argsort(-logits_V)[:4].tolist()
    np.testing.assert_allclose([value for _, value in found], [expected_V[i] for i, _ in found], rtol=1e-5)
    assert log_probability(logits_V, n // 2, log_total(logits_V)) == pytest.approx(expected_V[n // 2], rel=1e-5)
    assert top_log_probabilities(logits_V, 0, 0.0) == ()


def test_top_k_of_equal_logits_are_the_first() -> None:
    logits_V = np.zeros(4000, np.float32)
    assert candidates_of(logits_V, SamplingParams(temperature=1.0, top_k=3)).ids == pytest.approx([0, 1, 2])


def test_forbidden_tokens_are_never_drawn() -> None:
    logits_V = np.full(600, -np.inf, np.float32)
    logits_V[[5, 590]] = 1.0, 2.0
    rng = np.random.default_rng(0)
    for filters_ in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.1}, {"typical_p": 0.9}):
        params = SamplingParams(temperature=1.0, **filters_)
        assert {next_token(logits_V, params, rng) for _ in range(50)} <= {5, 590}


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6])
def test_the_best_of_a_vocabulary_beside_a_value_far_away(spread: float) -> None:
    """The first passes leave nearly all tokens in one bracket."""
    rng = np.random.default_rng(1)
    values_N = rng.normal(size=20_000).astype(np.float32)
    values_N[17] = -spread * 1e3
    weights_N = rng.random(20_000).astype(np.float32)
    order = np.argsort(-values_N, kind="stable")
    before_N = np.cumsum(weights_N[order], dtype=np.float64) - weights_N[order]
    for share in (0.0003, 0.1, 0.9, 0.9999):
        mass = share * weights_N.sum(dtype=np.float64)
        found_N = weights_N.copy()
        keep_best(values_N, found_N, mass)
        assert abs(np.count_nonzero(found_N) - np.count_nonzero(before_N < mass)) <= 1, "rounding may move the last one"
        assert set(np.flatnonzero(found_N)) <= set(order[: np.count_nonzero(found_N)])


def test_top_k_counts_tokens_that_may_not_come_next_last() -> None:
    logits_V = np.full(600, -np.inf, np.float32)
    logits_V[[5, 590]] = 1.0, 2.0
    found = top_log_probabilities(logits_V, 4, log_total(logits_V))
    assert [token_id for token_id, _ in found] == [590, 5, 0, 1]
