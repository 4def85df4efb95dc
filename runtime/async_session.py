"""Conversations for asyncio: ``Session`` behind an ``AsyncEngine``, whose server and callers take turns by the same steps."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from trt_kv.chat.messages import Message
from trt_kv.runtime.async_stream import AsyncRequest, AsyncStream
from trt_kv.runtime.chat import ChatKeywords
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.sampling import SamplingOptions
from trt_kv.runtime.session import Mode, Session
from trt_kv.runtime.text.prompts import Prompt
from trt_kv.runtime.turn import Turn

if TYPE_CHECKING:
    from trt_kv.runtime.async_engine import AsyncEngine


class AsyncSession:
    """A conversation with an ``AsyncEngine``: ``Session`` for asyncio, with its rules. Made by ``AsyncEngine.session``.

    >>> session = engine.session(system="Answer in one sentence.", max_new_tokens=64)
    >>> print((await session.chat("Why is the sky blue?")).text)
    >>> async for piece in session.stream_chat("And at night?"):
    ...     print(piece, end="")
    """

    def __init__(self, owner: "AsyncEngine", session: Session) -> None:
        self.owner = owner
        self.session = session
        """What is remembered. Its own turns wait in the thread that asks for them, so not in an event loop's."""

    @property
    def mode(self) -> Mode:
        return self.session.mode

    @property
    def messages(self) -> list[Message]:
        """See ``Session.messages``."""
        return self.session.messages

    @property
    def token_ids(self) -> list[int]:
        """See ``Session.token_ids``."""
        return self.session.token_ids

    @property
    def last(self) -> Generation | None:
        """The result of the last turn."""
        return self.session.last

    async def chat(self, message: str, **options: Unpack[ChatKeywords]) -> Generation:
        """The answer to a message of the user; errors as for ``Engine.chat``."""
        return await _whole(self.stream_chat(message, **options))

    def stream_chat(self, message: str, **options: Unpack[ChatKeywords]) -> "AsyncAnswer":
        """Stream the answer to a message of the user. The turn begins when the first text is awaited."""
        messages: list[Message] = [{"role": "user", "content": message}]
        return AsyncAnswer(self, partial(self.session.turn_of_messages, messages, **options))

    async def generate(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> Generation:
        """The continuation of all prompts and continuations so far, and of ``prompt``; errors as for ``Engine.generate``."""
        return await _whole(self.stream(prompt, **sampling))

    def stream(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> "AsyncAnswer":
        """Stream the continuation of a prompt. The turn begins when the first text is awaited."""
        return AsyncAnswer(self, partial(self.session.turn_of_prompt, prompt, **sampling))

    async def turn_of_messages(self, messages: Sequence[Message], **options: Unpack[ChatKeywords]) -> Turn:
        """``Session.turn_of_messages``, in another thread: a template may take seconds."""
        return await asyncio.to_thread(self.session.turn_of_messages, messages, **options)

    async def record(self, turn: Turn, queued: AsyncRequest) -> None:
        """Wait until a turn's request has ended and its pages are free, and add it with its answer."""
        await queued.freed()
        self.session.record(turn, queued.request.result(), queued.request.state)

    def fork(self) -> "AsyncSession":
        """A conversation that begins with this one, and goes on independently."""
        return AsyncSession(self.owner, self.session.fork())

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, and begin with a system message, or with none."""
        self.session.reset(system)

    async def save(self, path: str | Path) -> None:
        """Write the conversation to a file, which ``load_session`` reads; see ``Session.save``."""
        await asyncio.to_thread(self.session.save, path)

    async def load(self, path: str | Path) -> None:
        """Become the conversation that ``save`` wrote; see ``Session.load``."""
        await asyncio.to_thread(self.session.load, path)


class AsyncAnswer(AsyncStream):
    """Yields the text of one answer of an ``AsyncSession``, which has it when the iterator has ended. An answer that is
    stopped, by ``aclose``, by cancelling the task that awaits it, or by dropping the iterator, stays as far as it got.
    """

    def __init__(self, session: AsyncSession, make: Callable[[], Turn]) -> None:
        """``make``: what is asked of the engine, once no other turn of the session can begin."""
        self._turn = _RunningTurn(session, make)
        super().__init__(self._turn.begin)

    async def __anext__(self) -> str:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            await self._turn.record()
            raise
        except BaseException:
            self._turn.record_stopped()
            raise

    async def aclose(self) -> None:
        """Stop the answer, if it has not ended. Returns once its pages are freed, which is before the next step."""
        try:
            await super().aclose()
        finally:
            self._turn.record_stopped()

    def __del__(self) -> None:
        super().__del__()
        self._turn.record_stopped()


class _RunningTurn:
    """A turn from its begin to its record. It does not refer to its iterator, which so ends when nothing else does."""

    def __init__(self, session: AsyncSession, make: Callable[[], Turn]) -> None:
        self._session = session
        self._make = make
        self._asked: tuple[Turn, AsyncRequest] | None = None
        """What has been asked and not been recorded."""

    async def begin(self) -> AsyncRequest:
        self._session.session.begin_turn()
        try:
            turn = await asyncio.to_thread(self._make)
            queued = await self._session.owner.submit_turn(turn)
        except BaseException:
            self._session.session.end_turn()
            raise
        self._asked = turn, queued
        return queued

    async def record(self) -> None:
        if self._asked is not None:
            try:
                await self._session.record(*self._asked)
            except BaseException:
                self.record_stopped()
                raise
            self._end()

    def record_stopped(self) -> None:
        """Record a turn that has not been, with what there is of its answer."""
        if self._asked is not None:
            turn, queued = self._asked
            result = queued.request.result()
            if result.error is None:
                result = dataclasses.replace(result, finish_reason="cancelled")
            self._session.session.record_stopped(turn, result)
            self._end()

    def _end(self) -> None:
        self._asked = None
        self._session.session.end_turn()


async def _whole(answer: AsyncAnswer) -> Generation:
    async for _ in answer:
        pass
    return answer.result
