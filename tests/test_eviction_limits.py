"""What every policy does at the ends of its ranges: caches below budget or floor, budgets of nothing, prompts of a token."""

import dataclasses

import numpy as np
import pytest

from tests.engines import SHARES, assert_nothing_leaked, random_ids
from tests.serving import engine_under, small_policy
from tests.test_policy_runs import runner_of
from trt_kv.policies import policy_from_name, policy_names, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

N_LAYERS = len(SHARES)
EVICTING = [name for name in policy_names() if policy_from_name(name).evicts]
RECALLING = [name for name in policy_names() if policy_from_name(name).recalls]
CONSTANT = [name for name in EVICTING if policy_from_name(name).budget == "uniform"]


def held_while_decoding(runner: ModelRunner, prompt: list[int], generated: list[int]) -> tuple[SequenceCache, np.ndarray]:
    """The sequence, and how many tokens each layer holds after the prompt and after each generated token: [1 + N, L]."""
    sequence = runner.new_sequence()
    assert np.isfinite(runner.prefill(sequence, prompt)).all()
    held = [sequence.kv_len.copy()]
    for token_id in generated:
        assert np.isfinite(runner.decode([sequence], [token_id])).all()
        held.append(sequence.kv_len.copy())
    return sequence, np.stack(held)


def evicting_layers(policy: Policy) -> list[int]:
    return [layer for layer in range(N_LAYERS) if layer not in policy.exempt_layers]


@pytest.mark.parametrize("name", EVICTING)
def test_nothing_is_evicted_below_the_floor(name: str, full_engine: Engine) -> None:
    """From a prompt or while decoding; above it, caches grow as the policy says."""
    policy = dataclasses.replace(policy_from_name(name), floor=30)
    prompt, generated = random_ids(full_engine, 21, seed=1), random_ids(full_engine, 14, seed=2)
    sequence, held = held_while_decoding(runner_of(full_engine, policy), prompt, generated)
    seen = len(prompt) + np.arange(len(held))
    assert (held[:10] == seen[:10, None]).all()
    for layer in evicting_layers(policy):
        match policy.decode:
            case "keep":
                assert (held[:, layer] == seen).all()
            case "rank":
                assert (held[9:, layer] == 30).all()
            case _:
                assert (held[9:, layer] == np.maximum(30, held[9:, layer])).all()
                assert held[-1, layer] <= max(30, int(SHARES[layer] * seen[-1]) + 1)
    sequence.release()


@pytest.mark.parametrize("name", EVICTING)
def test_a_prompt_longer_than_the_floor_keeps_at_least_the_floor(name: str, full_engine: Engine) -> None:
    policy = dataclasses.replace(policy_from_name(name), floor=150)
    without = dataclasses.replace(policy, floor=0)
    prompt = random_ids(full_engine, 200, seed=3)
    held, free = (held_while_decoding(runner_of(full_engine, p), prompt, [])[0] for p in (policy, without))
    assert (held.kv_len == np.maximum(free.kv_len, 150)).all()
    for sequence in (held, free):
        sequence.release()
    assert_nothing_leaked(full_engine)


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_budget_that_is_not_full_evicts_nothing(name: str, full_engine: Engine) -> None:
    """H2O and StreamingLLM as published: a cache of a fixed size, which is filled before anything leaves it."""
    settings = {"budget": "constant", "tokens": 24} | ({"recent": 8, "window": 8} if name in ("snapkv", "pyramidkv") else {})
    policy = policy_with(policy_from_name(name), settings)
    prompt, generated = random_ids(full_engine, 11, seed=4), random_ids(full_engine, 20, seed=5)
    sequence, held = held_while_decoding(runner_of(full_engine, policy), prompt, generated)
    seen = len(prompt) + np.arange(len(held))
    expected = np.minimum(seen, 24) if policy.decode == "rank" else seen
    for layer in range(N_LAYERS):
        assert (held[:14, layer] == seen[:14]).all()
        if policy.decode != "row":  # a row policy grows at the share that the prompt kept, here all
            assert (held[:, layer] == expected).all()
    sequence.release()


def test_streamingllm_slides_its_window_when_it_is_full(full_engine: Engine) -> None:
    policy = policy_with(policy_from_name("streamingllm"), {"budget": "constant", "tokens": 16})
    runner = runner_of(full_engine, policy)
    sequence, _ = held_while_decoding(runner, random_ids(full_engine, 9, seed=6), random_ids(full_engine, 21, seed=7))
    for positions in runner.kept_positions(sequence, 3).tolist():
        assert sorted(positions) == [0, 1, 2, 3, *range(18, 30)]
    sequence.release()


@pytest.mark.parametrize("n_prompt", [1, 2, 5, 33])
@pytest.mark.parametrize("name", EVICTING)
def test_at_least_one_token_stays(name: str, n_prompt: int, full_engine: Engine) -> None:
    """With prompts shorter than the window, the pool, the sinks and a page, and a budget that rounds to no token at all."""
    policy = policy_without_floor(name)
    if policy.budget in ("uniform", "recipe", "pyramid"):
        policy = dataclasses.replace(policy, kept=0.01, budget="uniform")
    runner = runner_of(full_engine, policy)
    prompt, generated = random_ids(full_engine, n_prompt, seed=8), random_ids(full_engine, 4, seed=9)
    sequence, held = held_while_decoding(runner, prompt, generated)
    assert held.min() >= 1
    for layer in evicting_layers(policy):
        protected = min(n_prompt, policy.sinks + policy.recent)
        assert held[0, layer] >= protected
        assert all(len(set(positions)) == held[-1, layer] for positions in runner.kept_positions(sequence, layer).tolist())
    sequence.release()
    assert_nothing_leaked(full_engine)


@pytest.mark.parametrize("name", RECALLING)
def test_a_working_set_that_holds_everything_changes_nothing(name: str, small_engine: Engine) -> None:
    """Prompts of one token, shorter than the sinks, than a page, than the budget: the tokens of the full cache."""
    prompts = [random_ids(small_engine, n, seed=n) for n in (1, 3, 4, 9, 17)]
    with engine_under(small_engine, policy_from_name("full")) as full, engine_under(small_engine, small_policy(name)) as engine:
        expected = [g.token_ids for g in full.generate_batch(prompts, max_new_tokens=8)]
        assert [g.token_ids for g in engine.generate_batch(prompts, max_new_tokens=8)] == expected
