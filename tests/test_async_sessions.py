"""Conversations for asyncio say what those of threads say, one turn at a time, and a stopped answer leaves nothing behind."""

import asyncio
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from tests.chat_engines import chat_engine
from tests.engines import random_ids
from tests.serving import assert_idle
from trt_kv import AsyncEngine, Engine
from trt_kv.errors import UsageError
from trt_kv.runtime.async_session import AsyncSession
from trt_kv.runtime.session_file import _LENGTH_BYTES, _MAGIC
from trt_kv.serving.http.bodies import SessionBody
from trt_kv.serving.http.generating import EventStream
from trt_kv.serving.http.refusals import RefusedError
from trt_kv.serving.http.sessions import Sessions
from trt_kv.serving.http.settings import ServerSettings

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"cache_tokens": 2500, "n_threads": 1, "chunk": 20}
ANSWER: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
MESSAGES = ("tell me of the old man", "and of the sea", "why?")
MODES = ("exact", "compressed")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.load(chat_engine(tmp_path_factory), **OPTIONS) as engine:
        yield engine


def run(engine: Engine, use: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
    """What ``use`` returns of the engine, which is idle afterwards and stays open for the next test."""

    async def main() -> Any:
        served = AsyncEngine(engine)
        try:
            return await asyncio.wait_for(use(served), 60)
        finally:
            await asyncio.to_thread(engine.core.run_until_idle)
            served._is_closed = True
            if served._thread is not None:
                await asyncio.to_thread(served._thread.join)

    result = asyncio.run(main())
    assert_idle(engine)
    return result


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_has_the_tokens_that_it_has_in_a_thread(engine: Engine, mode: Any, tmp_path: Path) -> None:
    """Whole and streamed, from a file and from a fork."""
    plain = engine.session(mode=mode, system="be brief", **ANSWER)
    expected = [plain.chat(text).token_ids for text in MESSAGES]

    async def use(served: AsyncEngine) -> None:
        session = served.session(mode=mode, system="be brief", **ANSWER)
        assert (await session.chat(MESSAGES[0])).token_ids == expected[0]
        await session.save(tmp_path / "talk")
        fork = session.fork()
        loaded = await served.load_session(tmp_path / "talk", **ANSWER)
        for one in (session, fork, loaded):
            answer = one.stream_chat(MESSAGES[1])
            text = "".join([piece async for piece in answer])
            assert (text, one.mode) == (answer.result.text, mode)
            assert answer.result.token_ids == expected[1]
        assert [one.session.n_turns for one in (session, fork, loaded)] == [2, 2, 2]
        await session.chat(MESSAGES[2])
        assert (session.messages, session.token_ids) == (plain.messages, plain.token_ids)
        await loaded.load(tmp_path / "talk")
        assert loaded.messages == session.messages[:3]
        prompts = served.session(mode=mode, **ANSWER)
        history = [await prompts.generate(random_ids(engine, 30, seed=at)) for at in range(2)]
        other = engine.session(mode=mode, **ANSWER)
        assert [other.generate(random_ids(engine, 30, seed=at)) for at in range(2)] == history

    run(engine, use)


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_is_stopped_stays_as_far_as_it_got(engine: Engine, mode: Any, how: str) -> None:
    first, second, third = (random_ids(engine, n_tokens, seed=n_tokens) for n_tokens in (41, 7, 23))

    async def stop(session: AsyncSession) -> None:
        answer = session.stream(second, max_new_tokens=200)
        await anext(answer)
        if how == "close":
            await answer.aclose()
        elif how == "cancel":

            async def rest() -> None:
                async for _ in answer:
                    pass

            task = asyncio.create_task(rest())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def use(served: AsyncEngine) -> tuple[list[int], Any]:
        session = served.session(mode=mode, **ANSWER)
        await session.generate(first)
        n_before = len(session.token_ids)
        await stop(session)
        assert session.last is not None
        assert session.last.finish_reason == "cancelled"
        said = session.token_ids[n_before:]
        assert said == [*second, *session.last.token_ids]
        assert 0 < len(session.last.token_ids) < 200
        return said, await session.generate(third)

    said, answer = run(engine, use)
    plain = engine.session(mode=mode, **ANSWER)
    plain.generate(first)
    assert plain.generate([*said, *third]).token_ids == answer.token_ids


def test_one_turn_of_a_conversation_runs_at_a_time(engine: Engine, tmp_path: Path) -> None:
    """What else is asked of it then is refused; a fork, or a file, has what was said before."""
    session = engine.session(mode="compressed", **ANSWER)
    session.chat(MESSAGES[0])
    alone = session.fork().chat(MESSAGES[1]).token_ids
    session.save(tmp_path / "before")
    stream = session.stream_chat(MESSAGES[1])
    next(stream)
    for refused in (
        lambda: session.chat("x"),
        lambda: next(session.stream_chat("x")),
        session.reset,
        lambda: session.load(tmp_path / "before"),
    ):
        with pytest.raises(UsageError, match="a turn of this conversation is running"):
            refused()
    assert session.fork().chat(MESSAGES[1]).token_ids == alone
    session.save(tmp_path / "during")
    assert (tmp_path / "during").read_bytes() == (tmp_path / "before").read_bytes()
    for _ in stream:
        pass
    assert session.last is not None
    assert session.last.token_ids == alone
    assert session.n_turns == 2

    async def use(served: AsyncEngine) -> None:
        shared = served.session(**ANSWER)
        results = await asyncio.gather(*(shared.chat(text) for text in MESSAGES), return_exceptions=True)
        assert sum(isinstance(result, UsageError) for result in results) == 2
        assert shared.session.n_turns == 1
        answer = shared.stream_chat(MESSAGES[0])
        await anext(answer)
        with pytest.raises(UsageError, match="a turn of this conversation is running"):
            await shared.load(tmp_path / "before")
        await answer.aclose()
        await shared.chat(MESSAGES[1])
        assert shared.session.n_turns == 3

    run(engine, use)


def test_a_turn_that_is_refused_leaves_a_conversation_as_it_was(engine: Engine) -> None:
    async def use(served: AsyncEngine) -> None:
        session = served.session(**ANSWER)
        for options in ({"n": 2, "temperature": 1.0}, {"top_k": -1}, {"template": "{{ raise_exception('no') }}"}):
            with pytest.raises(UsageError):
                await session.chat("hello", **options)
        with pytest.raises(UsageError, match="bad mode"):
            served.session(mode="lossy")  # type: ignore[arg-type]
        assert (session.messages, session.session.in_turn) == ([], False)
        await session.chat("hello")
        with pytest.raises(UsageError, match="consists of messages"):
            await session.generate("hello")

    run(engine, use)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_is_gone_before_its_stream_begins_ends_its_turn(spec_version: str) -> None:
    ended: list[str] = []
    ending = contextlib.ExitStack()
    ending.callback(ended.append, "once")

    async def events() -> Any:
        try:
            yield "data: never\n\n"
        finally:
            ending.close()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        if spec_version == "2.4":
            raise OSError("the client has gone away")
        await asyncio.sleep(1)

    async def answer() -> None:
        begun = events()
        stream = EventStream(begun, ending)
        with contextlib.suppress(ClientDisconnect):
            await stream({"type": "http", "asgi": {"spec_version": spec_version}}, receive, send)
        await begun.aclose()

    asyncio.run(answer())
    assert ended == ["once"]


def test_a_conversation_is_not_forgotten_while_it_has_a_turn(engine: Engine) -> None:
    now = [0.0]
    settings = ServerSettings(model_name="tiny", session_seconds=10)
    sessions = Sessions(AsyncEngine(engine), settings, now=lambda: now[0])
    held = sessions.take("key", SessionBody(id="a"))
    now[0] = 99.0
    sessions.give_back(sessions.take("key", SessionBody(id="b")))
    with pytest.raises(RefusedError) as refused:
        sessions.take("key", SessionBody(id="a"))
    assert refused.value.code == "session_in_turn"
    sessions.give_back(held)
    assert not sessions._held, "neither has had an answer"


def test_templates_run_beside_the_event_loop(engine: Engine) -> None:
    async def use(served: AsyncEngine) -> set[int]:
        threads = set()
        render = engine.chat_request

        def rendered(*args: Any, **options: Any) -> Any:
            threads.add(threading.get_ident())
            return render(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "chat_request", rendered)
            message = [{"role": "user", "content": "hello"}]
            whole = await served.chat(message, **ANSWER)
            stream = served.stream_chat(message, **ANSWER)
            assert "".join([piece async for piece in stream]) == whole.text
            with pytest.raises(UsageError):
                await anext(served.stream_chat([{"role": "user"}], **ANSWER))
            await served.session(**ANSWER).chat("hello")
        return threads - {threading.get_ident()} if threading.get_ident() not in threads else set()

    assert run(engine, use)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda _: [],
    "no field": lambda found: {name: value for name, value in found.items() if name != "token_ids"},
    "another mode": lambda found: found | {"mode": "lossy"},
    "no messages": lambda found: found | {"messages": "hello"},
    "messages of texts": lambda found: found | {"messages": ["hello"]},
    "an unknown token": lambda found: found | {"token_ids": [10**6, *found["token_ids"]]},
    "a negative token": lambda found: found | {"token_ids": [-1, *found["token_ids"]]},
    "no tokens": lambda found: found | {"token_ids": []},
    "a state of exact": lambda found: found | {"mode": "exact"},
    "more tokens than were said": lambda found: found | {"state": found["state"] | {"num_computed_tokens": 10**6}},
    "negative lengths": lambda found: found | {"state": found["state"] | {"kv_len": [-1] * len(found["state"]["kv_len"])}},
    "lengths of texts": lambda found: found | {"state": found["state"] | {"kv_len": "12"}},
    "longer than its pages": lambda found: found | {"state": found["state"] | {"kv_len": [40] * len(found["state"]["kv_len"])}},
    "fewer layers": lambda found: found | {"state": found["state"] | {"kv_len": found["state"]["kv_len"][:-1]}},
    "fewer tokens than positions": lambda found: found | {"state": found["state"] | {"num_computed_tokens": 20, "n_prompt": 2}},
}


@pytest.mark.parametrize("change", [*CHANGES, "no JSON", "no arrays", "a length beyond the end"])
def test_a_file_with_the_right_digest_of_something_else_is_refused(engine: Engine, change: str, tmp_path: Path) -> None:
    """Anybody can make a digest; nothing has changed afterwards."""
    session = engine.session(mode="compressed", **ANSWER)
    session.chat(MESSAGES[0])
    file = tmp_path / "talk"
    session.save(file)
    before = session.token_ids
    body = file.read_bytes()[len(_MAGIC) + 32 :]
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    text, arrays = body[_LENGTH_BYTES:end], body[end:]
    if change in CHANGES:
        text = json.dumps(CHANGES[change](json.loads(text))).encode()
    elif change == "no JSON":
        text = b"{" * 9
    elif change == "no arrays":
        arrays = arrays[: len(arrays) // 2]
    n_text = 2**60 if "beyond" in change else len(text)
    body = n_text.to_bytes(_LENGTH_BYTES, "big") + text + arrays
    file.write_bytes(_MAGIC + hashlib.sha256(body).digest() + body)
    with pytest.raises(UsageError, match=r"is damaged|does not fit this engine"):
        session.load(file)
    assert session.token_ids == before
    session.chat(MESSAGES[1])


def test_a_file_that_cannot_be_written_is_refused_and_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    session = engine.session(**ANSWER)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the session"):
        session.save(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="cannot write the session"):
        session.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have modes on POSIX only")
def test_a_file_is_private_from_the_moment_in_which_it_is_made(engine: Engine, tmp_path: Path) -> None:
    modes = []
    fdopen = os.fdopen

    def opened(descriptor: int, *args: Any, **options: Any) -> Any:
        modes.append(os.fstat(descriptor).st_mode & 0o777)
        return fdopen(descriptor, *args, **options)

    umask = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fdopen", opened)
            engine.session(**ANSWER).save(tmp_path / "talk")
    finally:
        os.umask(umask)
    assert modes == [0o600]
