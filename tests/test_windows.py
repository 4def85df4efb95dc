"""Layers with an attention window: what they attend to, hold and free, beside layers under any policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.windowed_models import CONFIG, dense_logits, windowed_config, windowed_runner
from trt_kv.layer_budget import ALL
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import CachePages, RequestSize, WorkingSetPages, window_pages

SHARES = (0.5, 0.3, 0.8)
CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "prefixkv": {"kept": 0.5, "decode_distance": 5},
    "h2o": {"kept": 0.4},
    "freekv": {"tokens": 24, "sinks": 4, "recent": 4},
    "reach": {"threshold": 0.1, "window": 7, "pooling": 3},
}
TOLERANCE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
"""fp32 against fp64 attention, over three layers."""


def small_policy(name: str) -> Policy:
    return dataclasses.replace(policy_without_floor(name), **CHANGES[name])


def ids_of(n: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, CONFIG.vocab_size, n)]


def visible(runner: ModelRunner, sequence: SequenceCache, layer: int, n: int) -> np.ndarray:
    """[K, n] bool: which of the first ``n`` positions the layer holds."""
    held_KN = np.zeros((CONFIG.n_kv_heads, n), bool)
    for head, positions in enumerate(runner.kept_positions(sequence, layer)):
        held_KN[head, positions] = True
    return held_KN


def assert_bounded(runner: ModelRunner, config: ModelConfig, sequence: SequenceCache) -> None:
    """Between steps a windowed layer holds the newest tokens, without a gap, that the next query sees, and no page more."""
    n, size = sequence.num_computed_tokens, runner.pool.page_size
    for layer, window in enumerate(config.windows):
        if window:
            held = int(sequence.held_tokens[layer])
            assert min(n, window - 1) <= held < max(window - 1 + size, 1)
            assert sequence._n_pages[layer] == -(-held // size) <= window_pages(window, 1, size)
            assert (runner.kept_positions(sequence, layer) == np.arange(n - held, n)).all()


cases: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "windows": st.tuples(*[st.sampled_from([0, 1, 2, 5, 9, 16, 40])] * 3).filter(any),
        "page_size": st.sampled_from([1, 3, 4, 7, 16]),
        "chunk": st.sampled_from([1, 4, 11, 64]),
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=3),
        "soft_cap": st.sampled_from([0.0, 0.8]),
    }
)


def check(name: str, case: dict[str, Any], n_new: int) -> None:
    """Every logit of prompts and of tokens decoded in one batch, against masked attention over the whole text."""
    config, policy = windowed_config(case["windows"], soft_cap=case["soft_cap"], scale=0.4), small_policy(name)
    shares = SHARES if policy.needs_recipe else None
    runner = windowed_runner(config, policy, page_size=case["page_size"], chunk=case["chunk"], n_pages=900, kept_shares=shares)
    lengths = case["lengths"]
    texts = [ids_of(n + n_new, seed) for seed, n in enumerate(lengths)]
    sequences = [runner.new_sequence() for _ in lengths]
    got: list[list[Floats]] = []
    for sequence, text, n in zip(sequences, texts, lengths, strict=True):
        got.append([*runner.prefill(sequence, text[:n], all_logits=True)])
        assert_bounded(runner, config, sequence)
    evicted = [layer for layer, window in enumerate(config.windows) if not window]
    seen = [{layer: np.tril(np.ones((CONFIG.n_kv_heads, len(text), len(text)), bool)) for layer in evicted} for text in texts]
    for step in range(n_new):
        before = [
            {layer: visible(runner, s, layer, len(t)) for layer in evicted} for s, t in zip(sequences, texts, strict=True)
        ]
        logits_BV = runner.decode(sequences, [text[n + step] for text, n in zip(texts, lengths, strict=True)])
        for b, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
            assert_bounded(runner, config, sequence)
            got[b].append(logits_BV[b])
            for layer in evicted:
                # Decode "row" frees a slot before the step; "rank" evicts after it, so the step saw what was there before.
                held = before[b][layer] if policy.decode == "rank" else visible(runner, sequence, layer, len(texts[b]))
                seen[b][layer][:, n + step] = held
                seen[b][layer][:, n + step, n + step] = True
    for b, text in enumerate(texts):
        np.testing.assert_allclose(np.stack(got[b]), dense_logits(config, text, seen[b]), **TOLERANCE)
    for sequence in sequences:
        sequence.release()
    runner.pool.check_integrity([])


@pytest.mark.parametrize("name", ["full", "prefixkv", "h2o", "reach"])
@settings(max_examples=12)
@given(case=cases)
def test_windows_beside_layers_that_evict_equal_masked_attention(name: str, case: dict[str, Any]) -> None:
    check(name, case, n_new=20)


def logits_after(runner: ModelRunner, prompt: Sequence[int], generated: Sequence[int]) -> Floats:
    sequence = runner.new_sequence()
    got = [runner.prefill(sequence, prompt), *(runner.decode([sequence], [token])[0] for token in generated)]
    sequence.release()
    runner.pool.check_integrity([])
    return np.stack(got)


class Hoarding(SequenceCache):
    """Frees nothing: the op's window alone decides what is seen."""

    def free_passed(self) -> None:
        pass


def hoarding_runner(config: ModelConfig, policy: Policy, *, page_size: int, chunk: int) -> ModelRunner:
    """The references of the ops, on caches that hold every token."""
    runner = windowed_runner(config, policy, page_size=page_size, chunk=chunk, n_pages=900, implementation="reference")
    runner.new_sequence = lambda: Hoarding(runner.pool, n_layers=config.n_layers, windows=config.windows)  # type: ignore[method-assign]
    return runner


@pytest.mark.parametrize("streamed", [False, True])
@settings(max_examples=8)
@given(case=cases.filter(lambda case: not all(case["windows"])))
def test_windows_beside_layers_that_recall_equal_a_cache_that_frees_nothing(streamed: bool, case: dict[str, Any]) -> None:
    """And are not in host memory."""
    config, policy = windowed_config(case["windows"], soft_cap=case["soft_cap"]), small_policy("freekv")
    sizes = {"page_size": case["page_size"], "chunk": case["chunk"]}
    text = ids_of(case["lengths"][0] + 30, 5)
    prompt, generated = text[:-30], text[-30:]
    runner = windowed_runner(config, policy, **sizes, n_pages=900, streamed=streamed)
    assert runner._host_layers == [layer for layer, window in enumerate(config.windows) if not window]
    got = logits_after(runner, prompt, generated)
    runner.close()
    np.testing.assert_allclose(got, logits_after(hoarding_runner(config, policy, **sizes), prompt, generated), **TOLERANCE)
    everything = dataclasses.replace(policy, tokens=200)
    roomy = windowed_runner(config, everything, **sizes, n_pages=900, streamed=streamed)
    whole = logits_after(roomy, prompt, generated)
    roomy.close()
    np.testing.assert_allclose(whole, dense_logits(config, text)[len(prompt) - 1 :], **TOLERANCE)


@pytest.mark.parametrize("name", ["full", "prefixkv", "h2o", "freekv"])
@settings(max_examples=6)
@given(case=cases, n_before=st.integers(0, 12))
def test_a_fork_at_any_point_continues_alike_and_on_its_own(name: str, case: dict[str, Any], n_before: int) -> None:
    config, policy = windowed_config(case["windows"]), small_policy(name)
    streamed = policy.recalls and not all(config.windows)
    shares = SHARES if policy.needs_recipe else None
    sizes = {"page_size": case["page_size"] + 1, "chunk": case["chunk"], "kept_shares": shares, "streamed": streamed}
    runner = windowed_runner(config, policy, **sizes, n_pages=900)
    prompt, before, ours, theirs = (ids_of(n, seed) for seed, n in enumerate((case["lengths"][0], n_before, 18, 18)))
    sequence = runner.new_sequence()
    runner.prefill(sequence, prompt)
    for token in before:
        runner.decode([sequence], [token])
    twin = sequence.fork()
    got = np.stack([runner.decode([sequence, twin], list(pair)) for pair in zip(ours, theirs, strict=True)], axis=1)
    for end in (sequence, twin):
        end.release()
    runner.pool.check_integrity([])
    for logits, generated in zip(got, (ours, theirs), strict=True):
        alone = logits_after(runner, prompt, before + generated)
        np.testing.assert_allclose(logits, alone[-18:], **TOLERANCE)
    runner.close()


@settings(max_examples=40)
@given(
    window=st.integers(1, 30),
    page_size=st.integers(1, 9),
    chunk=st.integers(1, 20),
    size=st.builds(RequestSize, n_prompt=st.integers(1, 90), max_new_tokens=st.integers(1, 40)),
)
def test_what_is_reserved_for_a_window_is_enough_and_is_needed(
    window: int, page_size: int, chunk: int, size: RequestSize
) -> None:
    config = windowed_config([window] * 3)
    runner = windowed_runner(config, small_policy("full"), page_size=page_size, chunk=chunk, n_pages=600)
    pages = CachePages(runner.pool, budgets=runner._budgets, n_protected=0, windows=config.windows, chunk=chunk)
    sequence, most = runner.new_sequence(), 0
    n_left = size.n_prompt
    while n_left:
        n_new = min(chunk, n_left)
        sequence.append(n_new)
        most = max(most, len(sequence.pages))
        sequence.free_passed()
        n_left -= n_new
    assert len(sequence.pages) <= pages.after_reading(size)
    for _ in range(size.max_new_tokens - 1):
        sequence.append(1)
        assert len(sequence.pages) <= pages.after_reading(size)
        most = max(most, len(sequence.pages))
        sequence.free_passed()
    assert most <= pages.while_reading(size) <= most + 3
    assert sequence.num_computed_tokens == size.n_prompt + size.max_new_tokens - 1


def test_beside_layers_that_recall_a_chunk_is_reserved_only_while_the_prompt_is_read() -> None:
    """(8 + 3 + 20) / 4 pages for one sequence that reads, (8 + 3 + 1) / 4 for each that decodes."""
    runner = windowed_runner(windowed_config([9, 9, 9]), small_policy("full"), page_size=4, chunk=20)
    pages = WorkingSetPages(runner.pool, limits=[None] * 3, budgets=[ALL] * 3, windows=[9, 9, 9], chunk=20)
    for n_sequences, reading in ((1, 3 * 8), (2, 3 * 8), (3, 3 * 3 * 3)):
        size = RequestSize(n_prompt=90, max_new_tokens=40, n_sequences=n_sequences)
        assert (pages.while_reading(size), pages.after_reading(size)) == (reading, n_sequences * 3 * 3)


def test_a_context_longer_than_the_pool_fits_if_layers_have_windows() -> None:
    """300 tokens in pages for 3 layers of 30."""
    config = windowed_config([16, 9, 5])
    runner = windowed_runner(config, small_policy("full"), page_size=4, chunk=8, n_pages=3 * 8)
    pages = CachePages(runner.pool, budgets=runner._budgets, n_protected=0, windows=config.windows, chunk=8)
    assert pages.while_reading(RequestSize(n_prompt=260, max_new_tokens=40)) <= runner.pool.n_pages
    text = ids_of(300, 3)
    got = logits_after(runner, text[:260], text[260:])
    np.testing.assert_allclose(got, dense_logits(config, text)[259:], **TOLERANCE)
