"""What a caller may ask for: parameters for all or for each, seeds that are told, times that run out."""

import dataclasses
from typing import Any

import pytest

from tests.engines import assert_nothing_leaked
from tests.serving import prompts_of
from trt_kv.errors import UsageError
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.sampling import SamplingParams

DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.5}


def test_a_seed_is_drawn_anew_for_each_request_and_makes_its_tokens_again(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, (20,))
    results = [
        small_engine.generate(prompt, **DRAWN),
        *small_engine.generate_batch([prompt] * 3, SamplingParams(**DRAWN)),
    ]
    assert len({result.seed for result in results}) == 4
    assert len({result.token_ids for result in results}) == 4
    for result in results:
        again = small_engine.generate(prompt, **DRAWN, seed=result.seed)
        assert again == result
        assert again.seed == result.seed


def test_a_batch_has_params_for_all_or_for_each(small_engine: Engine) -> None:
    prompts = prompts_of(small_engine, (20, 7, 30))
    params = [SamplingParams(max_new_tokens=n, temperature=float(n), seed=n) for n in (2, 0 + 5, 9)]
    alone = [small_engine.generate(prompt, of_prompt) for prompt, of_prompt in zip(prompts, params, strict=True)]
    assert small_engine.generate_batch(prompts, params) == alone
    assert [len(result.token_ids) for result in alone] == [2, 5, 9]
    for_all = small_engine.generate_batch(prompts, params[2])
    assert for_all == small_engine.generate_batch(prompts, max_new_tokens=9, temperature=9.0, seed=9)
    assert for_all[2] == alone[2]
    with pytest.raises(UsageError, match="the number of params is not"):
        small_engine.generate_batch(prompts, params[:2])


def test_params_and_options_together_are_refused(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, (20,))
    for ask in (small_engine.generate, small_engine.stream, small_engine.submit):
        with pytest.raises(UsageError, match="sampling options are given twice") as caught:
            ask(prompt, SamplingParams(), top_k=3)
        assert "top_k" in str(caught.value)
    assert_nothing_leaked(small_engine)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_a_timeout_that_is_none_is_refused(timeout_s: float, small_engine: Engine) -> None:
    with pytest.raises(UsageError, match="bad timeout_s"):
        small_engine.generate([1], timeout_s=timeout_s)


def test_a_request_whose_time_is_over_ends_with_what_it_has(small_engine: Engine) -> None:
    late, other = prompts_of(small_engine, (30, 20))
    whole = small_engine.generate(late, max_new_tokens=30)
    beside = small_engine.generate(other, max_new_tokens=12)
    stream = small_engine.stream(late, max_new_tokens=30, timeout_s=1000.0)
    next(stream)
    stream._request.times.arrived -= 2000.0
    assert small_engine.generate(other, max_new_tokens=12) == beside
    assert stream.result.finish_reason == "timeout"
    assert whole.token_ids[: len(stream.result.token_ids)] == stream.result.token_ids
    list(stream)
    assert_nothing_leaked(small_engine)
    over = small_engine.generate(late, timeout_s=1e-9)
    assert dataclasses.replace(over, seed=0).finish_reason == "timeout"
    assert over.token_ids == ()


def test_times_are_counted_once_per_token(small_engine: Engine) -> None:
    """Also where the last step gives no token but the end."""
    before = dataclasses.replace(small_engine.core.statistics)
    n_first, n_between = before.time_to_first_token.n, before.time_between_tokens.n
    request = small_engine.submit(prompts_of(small_engine, (20,))[0], max_new_tokens=5)
    small_engine.core.wait(lambda: len(request.token_ids) == 1)
    request.eos_token_ids = range(small_engine.manifest.config.vocab_size)
    small_engine.core.run_until_idle()
    assert request.finish_reason == "stop"
    assert len(request.token_ids) == 1
    statistics = small_engine.core.statistics
    assert (statistics.time_to_first_token.n - n_first, statistics.time_between_tokens.n - n_between) == (1, 0)
