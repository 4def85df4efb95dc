"""Decode "draw": pages of generated tokens are freed at random, the prompt and the newest tokens never are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import assert_nothing_leaked, random_ids
from tests.serving import assert_idle, engine_under
from trt_kv.errors import CapacityError, UsageError
from trt_kv.plugins.kv_rows import store
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with, settings_from_text
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.draws import Draws, draws_of
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.sampling import SamplingParams

PAGE_SIZE = 4


def pool_of(n_pages: int, dtype: str = "float32") -> HostKvPool:
    return HostKvPool(n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=2, head_size=3, dtype=dtype)


def append(sequence: SequenceCache, n_new: int) -> None:
    """Read ``n_new`` tokens; the position of each is written as an engine does."""
    first = sequence.num_computed_tokens
    pages, offsets = np.divmod(sequence.append(n_new), PAGE_SIZE)
    sequence.pool.token_positions[pages, :, offsets] = np.arange(first, first + n_new)[None, :, None]


def positions_of(sequence: SequenceCache, layer: int) -> list[int]:
    n = int(sequence.kv_len[layer])
    pages = sequence.page_table[layer, : -(-n // PAGE_SIZE)]
    return [int(p) for p in sequence.pool.token_positions[pages, 0].reshape(-1)[:n]]


@settings(max_examples=60)
@given(
    n_prompt=st.integers(1, 21),
    n_generated=st.integers(0, 70),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**31 - 1),
    windows=st.sampled_from([(), (0, 9, 0)]),
)
def test_the_prompt_and_the_newest_tokens_stay_and_the_rest_is_bounded(
    n_prompt: int, n_generated: int, tokens: int, seed: int, windows: Sequence[int]
) -> None:
    draws, pool = Draws(tokens=tokens, seed=seed), pool_of(200)
    sequence = SequenceCache(pool, n_layers=3, windows=windows)
    append(sequence, n_prompt)
    sequence.free_passed()
    sequence.protect()
    for n in range(n_prompt + 1, n_prompt + n_generated + 1):
        append(sequence, 1)
        sequence.free_passed()
        before = [positions_of(sequence, layer) for layer in range(3)]
        sequence.draw(draws)
        pool.check_integrity(sequence.pages)
        for layer in range(3):
            held = positions_of(sequence, layer)
            if windows and windows[layer]:
                assert held == before[layer]
                continue
            assert held == sorted(set(held))
            assert set(range(n_prompt)) | set(range(max(n_prompt, n - PAGE_SIZE), n)) <= set(held)
            n_held = len(held) - n_prompt
            assert n_held < draws.most(PAGE_SIZE)
            assert n_held >= min(n - n_prompt, tokens)
            assert set(held) <= set(before[layer])
            assert len(before[layer]) - len(held) in (0, PAGE_SIZE)
    sequence.release()
    pool.check_integrity([])


@pytest.mark.parametrize("n_prompt", [PAGE_SIZE, PAGE_SIZE + 3])
def test_a_page_survives_each_draw_with_the_same_probability(n_prompt: int) -> None:
    """Random Attention, section 3: of m candidates one goes, so a page survives n draws with probability ((m - 1) / m) ** n."""
    n_draws, draws_by_age = 12, np.zeros((2, 13), np.int64)
    pool = pool_of(200)
    first_page, held = -(-n_prompt // PAGE_SIZE), Draws(tokens=6 * PAGE_SIZE).most(PAGE_SIZE)
    for seed in range(80):
        draws = Draws(tokens=6 * PAGE_SIZE, seed=seed)
        sequence = SequenceCache(pool, n_layers=4)
        append(sequence, n_prompt)
        sequence.protect()
        for n_new in range(1, held + n_draws * PAGE_SIZE + 1):
            append(sequence, 1)
            sequence.draw(draws)
            age, rest = divmod(n_new - held, PAGE_SIZE)
            if age < 0 or rest:
                continue
            for layer in range(4):  # the pages that were candidates at the first draw
                there = {position // PAGE_SIZE for position in positions_of(sequence, layer)}
                candidates = range(first_page, (n_prompt + held - PAGE_SIZE) // PAGE_SIZE)
                draws_by_age[:, age] += [sum(page in there for page in candidates), len(candidates)]
        sequence.release()
    n_candidates = (n_prompt + held - PAGE_SIZE) // PAGE_SIZE - first_page
    survived = draws_by_age[0, :n_draws] / draws_by_age[1, :n_draws]
    expected = ((n_candidates - 1) / n_candidates) ** np.arange(1, n_draws + 1)
    # 320 layers, in each of which the draws of one page exclude those of another.
    np.testing.assert_allclose(survived, expected, atol=0.04)


def test_layers_and_seeds_draw_differently_and_the_same_seed_alike() -> None:
    draws = [Draws(tokens=100, seed=seed).page(None, 50, layer=layer, n_seen=900) for seed in range(4) for layer in range(5)]
    assert len(set(draws)) > 10
    assert draws == [
        Draws(tokens=100, seed=seed).page(None, 50, layer=layer, n_seen=900) for seed in range(4) for layer in range(5)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_pages_with_the_widest_values_stay(dtype: str) -> None:
    pool = pool_of(60, dtype)
    sequence = SequenceCache(pool, n_layers=2)
    sequence.protect()
    draws = Draws(tokens=8 * PAGE_SIZE, extreme=0.3)
    wide = set(range(10, 14))
    for position in range(200):
        append(sequence, 1)
        values = np.tile(np.array([0.0, 0.1, 0.2], np.float32), (2, 1))
        values[1, 0] -= 5.0 * (position in wide)  # in one head only
        for layer in range(2):
            last = sequence._slots(layer, range(int(sequence.kv_len[layer]) - 1, int(sequence.kv_len[layer])))
            pages, offsets = np.divmod(last, PAGE_SIZE)
            pool.kv[pages[0], :, :, offsets[0]] = store(values, pool.dtype)
        sequence.draw(draws)
    for layer in range(2):
        assert wide <= set(positions_of(sequence, layer))
        assert len(set(range(40)) & set(positions_of(sequence, layer))) < 40


def drawing(tokens: int, **settings: Any) -> Policy:
    return policy_with(policy_from_name("randomdecode"), {"draw_tokens": tokens, **settings})


def test_below_its_budget_it_is_the_full_cache_and_beyond_it_is_not(full_engine: Engine) -> None:
    """Bit for bit, until the first draw, which is after ``draws.most`` generated tokens."""
    prompt, answer = random_ids(full_engine, 45, seed=1), random_ids(full_engine, 130, seed=2)
    policy = drawing(70)
    draws = draws_of(policy)
    assert draws is not None
    n_same = draws.most(full_engine.manifest.page_size)
    drawn, full = (
        logits_of(engine_under(full_engine, p, cache_tokens=300).runner, prompt, answer)
        for p in (policy, policy_from_name("full"))
    )
    np.testing.assert_array_equal(drawn[: n_same + 1], full[: n_same + 1])
    assert not np.array_equal(drawn[n_same + 1], full[n_same + 1])
    assert np.isfinite(drawn).all()


def logits_of(runner: ModelRunner, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """[1 + N, V]: after the prompt and after each token of the answer."""
    sequence = runner.new_sequence()
    logits = [runner.prefill(sequence, prompt), *(runner.decode([sequence], [token])[0] for token in answer)]
    sequence.release()
    return np.stack(logits)


def test_a_request_needs_memory_for_its_prompt_and_the_pages_that_stay(full_engine: Engine) -> None:
    """In a pool of exactly what is reserved; the full cache is refused there."""
    prompt = random_ids(full_engine, 40, seed=3)
    params = SamplingParams(max_new_tokens=250, temperature=1.0, seed=5, ignore_eos=True)
    engine = engine_under(full_engine, drawing(64), cache_tokens=40 + 64 + 32)
    generation = engine.generate(prompt, params)
    assert len(generation.token_ids) == 250
    assert max(generation.kv_tokens) < 40 + 64 + 32
    assert_idle(engine)
    with pytest.raises(CapacityError, match="too small"):
        engine_under(full_engine, policy_from_name("full"), cache_tokens=40 + 64 + 32).generate(prompt, params)


def test_a_request_draws_alike_alone_and_in_a_batch_and_after_a_fork(full_engine: Engine) -> None:
    engine = engine_under(full_engine, drawing(64, draw_extreme=0.5, seed=9), cache_tokens=900)
    runner, answer = engine.runner, random_ids(full_engine, 150, seed=4)
    prompts = [random_ids(full_engine, n, seed=n) for n in (21, 40)]
    alone = [logits_of(runner, prompt, answer) for prompt in prompts]
    sequences = [runner.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        runner.prefill(sequence, prompt)
    for token in answer[:120]:
        runner.decode(sequences, [token] * 2)
    forks = [sequence.fork() for sequence in sequences]
    for n, token in enumerate(answer[120:], start=121):
        for pair in (sequences, forks):
            for b, logits in enumerate(runner.decode(pair, [token] * 2)):
                np.testing.assert_array_equal(logits, alone[b][n])
    for sequence in (*sequences, *forks):
        sequence.release()
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("full", ["decode=draw"], "draw_tokens=1024"),
        ("snapkv", ["draw_tokens=64"], "decode 'draw'"),
        ("randomdecode", ["draw_extreme=1"], "[0, 1)"),
        ("snapkv", ["draw_extreme=0.5"], "add --set decode=draw"),
        ("freekv", ["decode=draw", "draw_tokens=64"], "every generated token is kept"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, texts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy_with(policy_from_name(name), settings_from_text(texts))
    assert said in str(caught.value)


def test_any_policy_that_drops_tokens_of_the_prompt_may_draw_generated_ones(small_engine: Engine) -> None:
    texts = ["decode=draw", "draw_tokens=64", "floor=0", "kept=0.3", "window=16", "recent=16"]
    policy = policy_with(policy_from_name("snapkv"), settings_from_text(texts))
    runner = engine_under(small_engine, policy, cache_tokens=900).runner
    sequence = runner.new_sequence()
    runner.prefill(sequence, random_ids(small_engine, 150, seed=7))
    kept = sequence.kv_len.copy()
    assert (kept < 150).any()
    for token in random_ids(small_engine, 200, seed=8):
        runner.decode([sequence], [token])
    draws = draws_of(policy)
    assert draws is not None
    assert (sequence.kv_len - kept < draws.most(small_engine.manifest.page_size)).all()
    assert policy_with(policy, {"decode": "keep"}).draw_tokens == 0
    sequence.release()
