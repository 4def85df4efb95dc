"""Tokens chosen on the device: those that the host chooses from the same logits with the same random numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving import assert_idle, engine_under, prompts_of, small_policy
from trt_kv.errors import LogitsError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import ChoosingExecutor
from trt_kv.runtime.backends.cuda import choice as device_choice
from trt_kv.runtime.backends.cuda.choice import chosen_tokens
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.step import Choice, Chosen, Step, StepResult
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import next_token


class Uniform(np.random.Generator):
    """Gives one number."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self, *_: Any, **__: Any) -> Any:
        return self.number


def on_host(logits_RV: Floats, choices: Sequence[Choice]) -> list[int]:
    """``runtime/sampling``, one row after the other."""
    found = []
    for logits_V, one in zip(logits_RV, choices, strict=True):
        params = SamplingParams(temperature=one.temperature, top_k=one.top_k, top_p=one.top_p, min_p=one.min_p)
        found.append(next_token(logits_V, params, Uniform(one.uniform)))
    return found


def on_device(logits_RV: Floats, choices: Sequence[Choice]) -> list[int]:
    logits = torch.from_numpy(logits_RV)
    ids: list[int] = chosen_tokens(logits, logits.argmax(1), choices).tolist()
    return ids


choices_of_rows = st.builds(
    Choice,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7, 1e-300]),
    top_k=st.sampled_from([0, 1, 3, 40, 10**6]),
    top_p=st.sampled_from([1.0, 0.97, 0.7, 0.2, 1e-6]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)


@given(
    st.lists(choices_of_rows, min_size=1, max_size=6), st.integers(1, 700), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 99)
)
@settings(max_examples=200)
def test_the_device_chooses_what_the_host_chooses(choices: list[Choice], n_tokens: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits_RV = (spread * rng.standard_normal((len(choices), n_tokens))).astype(np.float32)
    assert on_device(logits_RV, choices) == on_host(logits_RV, choices)


@given(st.lists(choices_of_rows, min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=100)
def test_equal_logits_and_impossible_tokens_are_treated_alike(choices: list[Choice], n_tokens: int, seed: int) -> None:
    """Of equal ones the first are kept; a token with a probability of 0 is never chosen."""
    rng = np.random.default_rng(seed)
    logits_RV = rng.integers(-2, 3, (len(choices), n_tokens)).astype(np.float32)
    logits_RV[:, 1:][rng.random((len(choices), n_tokens - 1)) < 0.3] = -np.inf
    found = on_device(logits_RV, choices)
    assert found == on_host(logits_RV, choices)
    assert np.isfinite(logits_RV[np.arange(len(choices)), found]).all()


def test_rows_are_independent_however_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    logits_RV = rng.standard_normal((9, 301)).astype(np.float32)
    choices = [
        Choice(temperature=0.2 * row, top_k=40 * (row % 2), top_p=1.0 - 0.1 * (row % 3), uniform=0.1 * row) for row in range(9)
    ]
    whole = on_device(logits_RV, choices)
    monkeypatch.setattr(device_choice, "_ELEMENTS", 700)
    assert on_device(logits_RV, choices) == whole
    assert [on_device(logits_RV[row : row + 1], choices[row : row + 1])[0] for row in range(9)] == whole


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits_RV = np.tile(np.log(probabilities).astype(np.float32), (4000, 1))
    uniforms = np.random.default_rng(0).random(4000)
    counts = np.bincount(on_device(logits_RV, [Choice(temperature=1.0, uniform=u) for u in uniforms]), minlength=4)
    assert np.abs(counts / 4000 - probabilities).max() < 0.03


@pytest.mark.gpu
def test_on_the_gpu_tokens_are_chosen_as_on_the_cpu() -> None:
    """Few tokens, so that no random number lies between two sums that are rounded differently."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy((3 * rng.standard_normal((64, 97))).astype(np.float32))
    for one in (Choice(), Choice(temperature=0.8), Choice(temperature=0.8, top_k=9, top_p=0.8, min_p=0.05)):
        choices = [dataclasses.replace(one, uniform=float(uniform)) for uniform in rng.random(64)]
        found = chosen_tokens(logits.cuda(), logits.cuda().argmax(1), choices)
        assert torch.equal(found.cpu(), chosen_tokens(logits, logits.argmax(1), choices))


class Choosing(SplitStepExecutor):
    """The host's executor, which chooses as a device does and forgets the logits."""

    spoiled: bool = False
    n_chosen: int = 0

    def run_step_choosing(self, step: Step, pool: Any, choices: Sequence[Choice]) -> StepResult:
        result = self.run_step("decode", step, pool)
        logits = torch.from_numpy(np.array(result.logits))
        if self.spoiled:
            logits[0, 5] = torch.nan
        self.n_chosen += 1
        ids, largest = chosen_tokens(logits, logits.argmax(1), choices).tolist(), logits.amax(1).tolist()
        chosen = tuple(Chosen(token_id=i, largest=value) for i, value in zip(ids, largest, strict=True))
        return StepResult(
            logits=np.empty((0, 0), np.float32), kept=result.kept, adaptive_budget=result.adaptive_budget, chosen=chosen
        )


@pytest.fixture
def choosing(small_engine: Engine) -> Any:
    """An engine whose executor chooses."""
    with engine_under(small_engine, small_policy("h2o")) as engine:
        engine.runner._executor.__class__ = Choosing
        assert isinstance(engine.runner._executor, ChoosingExecutor)
        yield engine


@pytest.mark.parametrize(
    ("options", "chooses"),
    [
        ({}, True),
        ({"temperature": 1.5, "seed": 4}, True),
        ({"temperature": 1.5, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, True),
        ({"temperature": 1.5, "seed": 4, "typical_p": 0.9}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"top_logprobs": 2}, False),
    ],
    ids=str,
)
def test_requests_get_their_tokens_wherever_they_are_chosen(
    options: dict[str, Any], chooses: bool, choosing: Engine, small_engine: Engine
) -> None:
    """Requests that need the logits get them, and so does everybody in their steps."""
    prompts = prompts_of(choosing, (60, 20))
    with engine_under(small_engine, small_policy("h2o")) as host:
        expected = [host.generate(prompt, max_new_tokens=9, **options) for prompt in prompts]
        assert not host.runner.chooses
    executor: Any = choosing.runner._executor
    assert choosing.generate_batch(prompts, max_new_tokens=9, **options) == expected
    assert (executor.n_chosen > 0) == chooses
    n_before = executor.n_chosen
    needy = SamplingParams(max_new_tokens=9, top_logprobs=0)
    both = choosing.generate_batch(prompts, [SamplingParams(max_new_tokens=9, **options), needy])
    assert both[0] == expected[0]
    assert len(both[1].logprobs) == len(both[1].token_ids)
    assert executor.n_chosen < n_before + 5  # before the second prompt was read
    assert_idle(choosing)


def test_logits_that_are_no_numbers_are_noticed_on_the_device(choosing: Engine) -> None:
    executor: Any = choosing.runner._executor
    executor.spoiled = True
    (prompt,) = prompts_of(choosing, (20,))
    with pytest.raises(LogitsError, match="1 generated ones"):
        choosing.generate(prompt, max_new_tokens=5)
    assert_idle(choosing)
