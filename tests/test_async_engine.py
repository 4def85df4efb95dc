"""The engine for asyncio: what it says is what the engine says, and who goes away leaves nothing behind."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines import assert_nothing_leaked, load_for_test, random_ids
from trt_kv.errors import EngineError, UsageError
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

Use = Callable[[AsyncEngine], Awaitable[Any]]


def run(folder: Path, use: Use) -> tuple[Engine, Any]:
    """What ``use`` returns of an engine that is closed afterwards, and the engine, whose steps take some milliseconds."""
    engine = load_for_test(folder)
    run_step = engine.runner.run

    def run_slowly(plan: Any) -> Any:
        time.sleep(0.004)
        return run_step(plan)

    engine.runner.run = run_slowly  # type: ignore[method-assign]

    async def main() -> Any:
        async with AsyncEngine(engine) as served:
            return await asyncio.wait_for(use(served), 60)

    return engine, asyncio.run(main())


def settled(engine: Engine) -> bool:
    """Whether everything has been given back, some moments being granted."""
    for _ in range(200):
        if engine.runner.pool.n_free == engine.runner.pool.n_pages:
            return True
        time.sleep(0.02)
    return False


def test_many_tasks_get_what_each_would_get_alone(small_folder: Path, small_engine: Engine) -> None:
    prompts = [random_ids(small_engine, n, seed=n) for n in (70, 12, 40, 5, 90)]
    alone = [small_engine.generate(prompt, max_new_tokens=12) for prompt in prompts]

    async def use(engine: AsyncEngine) -> list[Any]:
        async def streamed(prompt: list[int]) -> tuple[str, Any]:
            stream = engine.stream(prompt, max_new_tokens=12)
            return "".join([piece async for piece in stream]), stream.result

        return list(await asyncio.gather(*(streamed(prompt) for prompt in prompts)))

    engine, said = run(small_folder, use)
    assert said == [(result.text, result) for result in alone]
    assert_nothing_leaked(engine)


def test_closing_an_iterator_cancels_its_request_and_nobody_elses(small_folder: Path, small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 30, seed=3)
    alone = small_engine.generate(prompt, max_new_tokens=40)

    async def use(engine: AsyncEngine) -> Any:
        other = asyncio.create_task(engine.generate(prompt, max_new_tokens=40))
        stream = engine.stream(prompt, max_new_tokens=60)
        await anext(stream)
        await stream.aclose()
        assert stream.result.finish_reason == "cancelled"
        return await other

    engine, result = run(small_folder, use)
    assert result == alone
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("how", ["task", "dropped"])
def test_a_task_that_is_cancelled_and_a_stream_that_is_dropped_free_their_pages(
    how: str, small_folder: Path, small_engine: Engine
) -> None:
    prompt = random_ids(small_engine, 30, seed=4)

    async def use(engine: AsyncEngine) -> bool:
        if how == "task":
            task = asyncio.create_task(engine.generate(prompt, max_new_tokens=90))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = engine.stream(prompt, max_new_tokens=90)
            await anext(stream)
            del stream
        return await asyncio.to_thread(settled, engine.engine)

    assert run(small_folder, use)[1]


def test_what_is_refused_is_refused_where_it_is_awaited(small_folder: Path) -> None:
    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(UsageError, match="the prompt is empty"):
            await engine.generate("")
        with pytest.raises(UsageError, match="bad top_k"):
            await anext(engine.stream("the old storm", top_k=-1))

    run(small_folder, use)


def test_closing_the_engine_ends_open_streams_with_an_error(small_folder: Path) -> None:
    async def use(engine: AsyncEngine) -> None:
        stream = engine.stream("the old storm", max_new_tokens=100)
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            async for _ in stream:
                pass
        with pytest.raises(UsageError, match="has been closed"):
            await engine.generate("the old storm")

    run(small_folder, use)


def test_threads_and_tasks_share_an_engine(small_folder: Path, small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 30, seed=5)
    alone = small_engine.generate(prompt, max_new_tokens=20)

    async def use(engine: AsyncEngine) -> list[Any]:
        in_threads = [asyncio.to_thread(engine.engine.generate, prompt, max_new_tokens=20) for _ in range(3)]
        return list(await asyncio.gather(*in_threads, *(engine.generate(prompt, max_new_tokens=20) for _ in range(3))))

    assert run(small_folder, use)[1] == [alone] * 6


def test_a_client_that_cannot_be_called_loses_its_request_and_nobody_elses(small_folder: Path, small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 30, seed=6)
    alone = small_engine.generate(prompt, max_new_tokens=20)

    def broken() -> None:
        raise RuntimeError("the loop is closed")

    async def use(engine: AsyncEngine) -> Any:
        gone = engine.engine.submit(prompt, on_update=broken, max_new_tokens=60)
        result = await engine.generate(prompt, max_new_tokens=20)
        assert gone.finish_reason == "cancelled"
        return result

    engine, result = run(small_folder, use)
    assert result == alone
    assert_nothing_leaked(engine)


def test_a_request_whose_client_goes_away_while_its_prompt_is_encoded_ends(small_folder: Path) -> None:
    async def use(engine: AsyncEngine) -> int:
        submit = engine.engine.submit

        def submit_slowly(*args: Any, **options: Any) -> Any:
            time.sleep(0.1)
            return submit(*args, **options)

        engine.engine.submit = submit_slowly  # type: ignore[method-assign]
        queued = asyncio.create_task(engine.submit([1, 5, 6], max_new_tokens=60, ignore_eos=True))
        await asyncio.sleep(0.02)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        while not engine.engine.core.statistics.n_finished:
            await asyncio.sleep(0.01)
        return engine.engine.core.statistics.decode_steps

    engine, n_steps = run(small_folder, use)
    assert engine.core.statistics.n_finished == {"cancelled": 1}
    assert n_steps < 20
    assert_nothing_leaked(engine)
