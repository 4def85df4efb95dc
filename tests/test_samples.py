"""Several samples of one prompt: each is a request of its own with the next seed, but the prompt is read once."""

import asyncio
import dataclasses
from typing import Any

import pytest

from tests.engines import Run
from tests.serving import CHUNK, assert_idle, engine_under, prompts_of, small_policy, steps_changed, streamed
from trt_kv.errors import CapacityError, LogitsError, UsageError
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_names
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.scheduler import StepPlan

QUICK = ("full", "prefixkv_paper", "h2o", "freekv")
POLICIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in policy_names()]
SAMPLED: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 60, "repetition_penalty": 1.2, "seed": 11}


@pytest.mark.parametrize("name", POLICIES)
def test_samples_are_the_requests_with_the_next_seeds(name: str, small_engine: Engine) -> None:
    """Token for token, beside another request too; the prompt's chunks are run once."""
    steps: list[str] = []

    def count(plan: StepPlan[Request], logits: Floats) -> Floats:
        steps.append(plan.phase)
        return logits

    with engine_under(small_engine, small_policy(name), **streamed(name)) as engine:
        prompt, beside = prompts_of(engine, (60, 20))
        alone = [engine.generate(prompt, **SAMPLED | {"seed": 11 + i}) for i in range(3)]
        other = engine.generate(beside, max_new_tokens=6)
        with steps_changed(engine, count):
            result = engine.generate(prompt, n=3, **SAMPLED)
        assert steps.count("prefill") == -(-len(prompt) // CHUNK)

        assert [without_others(one) for one in result.samples] == alone
        assert [one.seed for one in result.samples] == [11, 12, 13]
        assert len({one.token_ids for one in result.samples}) > 1
        params = [SamplingParams(**SAMPLED, n=3), SamplingParams(max_new_tokens=6)]
        assert engine.generate_batch([prompt, beside], params) == [result, other]
        assert_idle(engine)


def without_others(one: Generation) -> Generation:
    return dataclasses.replace(one, others=())


def test_samples_without_a_seed_have_one_that_is_told(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, (20,))
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 2.0}
    result = small_engine.generate(prompt, n=2, **options)
    first, second = result.samples
    assert second.seed == first.seed + 1
    assert small_engine.generate(prompt, seed=second.seed, **options).token_ids == second.token_ids
    assert small_engine.generate(prompt, n=2, **options).seed != first.seed


def test_what_cannot_be_sampled_several_times_is_refused(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, (20,))
    with pytest.raises(UsageError, match="greedy choice would all be equal"):
        small_engine.generate(prompt, n=2)
    with pytest.raises(UsageError, match="a stream has the text of one sample"):
        small_engine.stream(prompt, n=2, temperature=1.0)
    with pytest.raises(CapacityError):
        small_engine.generate(prompt, n=10**12, temperature=1.0)
    assert_idle(small_engine)


def test_samples_reserve_a_sequence_each(small_engine: Engine) -> None:
    """An engine for two sequences refuses three samples, and two wait for a request that runs."""
    with engine_under(small_engine, small_policy("full"), max_sequences=2) as engine:
        prompt, beside = prompts_of(engine, (20, 30))
        with pytest.raises(CapacityError, match="sequences"):
            engine.generate(prompt, n=3, temperature=1.0)
        running = engine.submit(beside, max_new_tokens=5)
        samples = engine.submit(prompt, n=2, temperature=1.0, max_new_tokens=3)
        engine.core.wait(lambda: len(running.token_ids) == 4)
        assert not samples.n_prompt_read
        engine.core.run_until_idle()
        assert [len(one.token_ids) for one in samples.family] == [3, 3]
        assert_idle(engine)


def test_a_sample_that_fails_leaves_the_others(small_engine: Engine) -> None:
    (prompt,) = prompts_of(small_engine, (20,))

    def spoil(plan: StepPlan[Request], logits: Floats) -> Floats:
        for row, request in enumerate(plan.requests):
            if request.name.startswith("sample 1 of 3") and len(request.token_ids) == 4:
                logits[row, 7] = float("nan")
        return logits

    whole = small_engine.generate(prompt, n=3, **SAMPLED)
    with steps_changed(small_engine, spoil):
        (found,) = small_engine.generate_batch([prompt], n=3, **SAMPLED)
    assert [one.finish_reason == "error" for one in found.samples] == [False, True, False]
    assert [len(one.token_ids) for one in found.samples] == [9, 4, 9]
    assert [found.samples[i].token_ids == whole.samples[i].token_ids for i in (0, 2)] == [True, True]
    with steps_changed(small_engine, spoil), pytest.raises(LogitsError, match="sample 1 of 3 of the request"):
        small_engine.generate(prompt, n=3, **SAMPLED)
    assert_idle(small_engine)


def test_samples_with_asyncio(small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy("full")) as engine:
        (prompt,) = prompts_of(engine, (20,))
        expected = engine.generate(prompt, n=3, **SAMPLED)

        async def ask() -> None:
            shared = AsyncEngine(engine)
            assert await shared.generate(prompt, n=3, **SAMPLED) == expected
            with pytest.raises(UsageError, match="a stream has the text of one sample"):
                await anext(shared.stream(prompt, n=3, **SAMPLED))
            task = asyncio.create_task(shared.generate(prompt, n=3, temperature=1.0, max_new_tokens=60, ignore_eos=True))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while engine.core._live:  # the thread of the steps ends it
                await asyncio.sleep(0.01)
            await shared.close()

        asyncio.run(ask())


def test_samples_on_the_command_line(run: Run, small_folder: Any, small_engine: Engine) -> None:
    expected = small_engine.generate("the old storm", n=2, max_new_tokens=5, temperature=1.5, seed=4)
    words = ("generate", small_folder, "the old storm", *"--n 2 --max-new-tokens 5 --temperature 1.5 --seed 4".split())
    texts = [one.text for one in expected.samples]
    _, out, err = run(*words)
    assert out == f"--- sample 1 of 2, seed 4\n{texts[0]}\n--- sample 2 of 2, seed 5\n{texts[1]}\n"
    for i, one in enumerate(expected.samples, start=1):
        assert f"sample {i}: [{one.n_prompt_tokens} prompt tokens, {len(one.token_ids)} generated" in err
    _, out, _ = run(*words, "--logprobs", "0")
    tables = out.rstrip("\n").split("\n\n")[1:]
    assert [table.split("\n")[0].rstrip() for table in tables] == ["sample 1:", "sample 2:"]
    code, _, err = run("generate", small_folder, "the old storm", "--n", "2")
    assert code == 2
    assert "greedy" in err


def test_log_probabilities_on_the_command_line(run: Run, small_folder: Any, small_engine: Engine) -> None:
    expected = small_engine.generate("the old storm", max_new_tokens=4, top_logprobs=2)
    code, out, _ = run("generate", small_folder, "the old storm", "--max-new-tokens", "4", "--logprobs", "2")
    assert code == 0
    text, table = out.rstrip("\n").split("\n\n")
    assert text == expected.text
    head, *lines = table.split("\n")
    assert head.split() == ["logprob", "id", "token", "likeliest"]
    assert [line.split()[:2] for line in lines] == [[f"{one.logprob:.3f}", str(one.token_id)] for one in expected.logprobs]
    assert all(f"{logprob:.3f}" in line for line, one in zip(lines, expected.logprobs, strict=True) for _, logprob in one.top)


def test_special_tokens_are_shown_if_asked_for(small_engine: Engine) -> None:
    """As text, which stop texts then match too."""
    eos = small_engine.manifest.config.eos_token_ids[0]
    name = small_engine.tokenizer.decode([eos], skip_special_tokens=False)
    (prompt,) = prompts_of(small_engine, (20,))
    forced: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True, "logit_bias": {eos: 1e4}}
    assert name not in small_engine.generate(prompt, **forced).text
    assert small_engine.generate(prompt, skip_special_tokens=False, **forced).text.replace(" ", "") == 3 * name
    for skips in (True, False):
        stopped = small_engine.generate(prompt, skip_special_tokens=skips, stop=name, **forced)
        assert (stopped.finish_reason, stopped.text.strip()) == ("stop", "")
