"""``Engine`` for asyncio: one thread runs the steps, coroutines await the text of their requests."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from trt_kv.chat.messages import Message
from trt_kv.runtime.chat import ChatKeywords
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.samples import check_one_sample
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import params_of_each
from trt_kv.runtime.session import Turn
from trt_kv.runtime.text.prompts import Prompt

IDLE_S = 1.0
"""Longest wait of the idle thread, in seconds, before it checks again for requests and for ``close``."""


class AsyncEngine:
    """An asyncio wrapper of ``Engine``. May be used from several event loops.

    >>> engine = AsyncEngine(Engine.load("engines/llama3-prefixkv"))
    >>> async for piece in engine.stream("the old man ...", max_new_tokens=32):
    ...     print(piece, end="")
    >>> await engine.close()
    """

    def __init__(self, engine: Engine) -> None:
        """Takes ownership of ``engine``: ``close`` closes it too. The thread starts with the first request."""
        self.engine = engine
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "AsyncEngine":
        """Open an engine folder; options and errors as for ``Engine.load``. Takes seconds, and blocks the event loop."""
        return cls(Engine.load(path, **options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]
    ) -> "AsyncStream":
        """Stream the continuation of one prompt. The request is queued when the first text is awaited.

        Closing the iterator (``aclose``), or cancelling the task that awaits it, cancels the request. Errors as for
        ``Engine.stream``.
        """
        return AsyncStream(self, prompt, params, sampling)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generation:
        """Generate the whole continuation of one prompt, or all samples of it. Errors as for ``Engine.generate``."""
        stream = AsyncStream(self, prompt, params, sampling, one_sample=False)
        async for _ in stream:
            pass
        await stream.end_of_others()
        return stream.result

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        changed: asyncio.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "AsyncRequest":
        """Queue a request, for servers that need its samples, tokens and times as they come. Errors as for ``Engine.submit``.

        The prompt is encoded in another thread, so that a long one does not hold up the event loop. ``changed``: an event that
        several requests share, so that one task can wait for all of them.
        """
        return await self._queued(partial(self.engine.submit, prompt, params, **sampling), changed)

    async def submit_turn(self, turn: Turn, *, changed: asyncio.Event | None = None) -> "AsyncRequest":
        """The same for a turn of a ``Session``, which its server then records."""
        return await self._queued(partial(self.engine.submit_turn, turn), changed)

    async def _queued(self, submit: Callable[..., Request], changed: asyncio.Event | None) -> "AsyncRequest":
        self._ensure_thread()
        loop, changed = asyncio.get_running_loop(), changed or asyncio.Event()
        queued = loop.run_in_executor(None, partial(submit, on_update=_notifier(loop, changed)))
        try:
            request = await asyncio.shield(queued)
        except asyncio.CancelledError:
            queued.add_done_callback(_cancel_queued)
            raise
        return AsyncRequest(request, changed)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatKeywords]
    ) -> "AsyncStream":
        """Stream the assistant's answer to a conversation. Errors as for ``Engine.chat``, those of the messages at once."""
        prompt, params = self.engine.chat_request(messages, params, **options)
        return self.stream(prompt, params)

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatKeywords]
    ) -> Generation:
        """Generate the assistant's answer to a conversation. Errors as for ``Engine.chat``."""
        prompt, params = self.engine.chat_request(messages, params, **options)
        return await self.generate(prompt, params)

    async def pin(self, prompt: Prompt, *, cache_salt: str = "") -> int:
        """Keep the beginning of a prompt in the prefix cache. Errors as for ``Engine.pin``."""
        return await asyncio.to_thread(self.engine.pin, prompt, cache_salt=cache_salt)

    async def unpin(self, prompt: Prompt, *, cache_salt: str = "") -> int:
        """Undo one ``pin`` of the same prompt."""
        return await asyncio.to_thread(self.engine.unpin, prompt, cache_salt=cache_salt)

    @property
    def is_running(self) -> bool:
        """Whether requests make progress: false once the engine is closed, or if its thread has ended for another reason."""
        thread = self._thread
        return not self._is_closed and (thread is None or thread.is_alive())

    async def close(self) -> None:
        """Abort all requests, stop the thread and close the engine. Open streams raise ``EngineError``."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _close(self) -> None:
        self._is_closed = True
        self.engine.close()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        """Body of the thread: wait for requests and run their steps, until ``close``."""
        core = self.engine.core
        while not self._is_closed:
            core.wait_for_work(IDLE_S)
            core.run_until_idle()

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_closed:
                thread = threading.Thread(target=self._run, name="trt-kv steps", daemon=True)
                thread.start()
                self._thread = thread


class AsyncStream(AsyncIterator[str]):
    """Yields the text of one request as it becomes final; see also ``result``. Use it from one task at a time."""

    def __init__(
        self,
        owner: AsyncEngine,
        prompt: Prompt,
        params: SamplingParams | None,
        sampling: SamplingOptions,
        *,
        one_sample: bool = True,
    ) -> None:
        self._owner = owner
        self._wanted = prompt, params, sampling
        self._one_sample = one_sample
        self._queued: AsyncRequest | None = None

    async def __anext__(self) -> str:
        if self._queued is None:
            self._queued = self._submit()
        request = self._queued.request
        try:
            while not request.pieces and not request.is_finished:
                await self._queued.changed()
        except BaseException:
            await self.aclose()
            raise
        if request.pieces:
            return request.pieces.popleft()
        if request.error is not None:
            raise request.error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it has not ended. Returns once its pages are freed, which is before the next step."""
        if self._queued is not None:
            self._queued.cancel()
            await self._queued.freed()

    async def end_of_others(self) -> None:
        """Return when the other samples of the prompt have ended too; raises the error that ended one of them."""
        if self._queued is None:
            return
        try:
            await self._queued.finished()
        except BaseException:
            await self.aclose()
            raise
        for one in self._queued.request.family:
            if one.error is not None:
                raise one.error

    def __del__(self) -> None:
        if self._queued is not None:
            self._queued.cancel()

    @property
    def result(self) -> Generation:
        """What has been generated so far; ``RuntimeError`` before the first text was awaited."""
        if self._queued is None:
            raise RuntimeError("nothing has been generated: the stream has not been awaited")
        return self._queued.request.result()

    def _submit(self) -> "AsyncRequest":
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        prompt, params, sampling = self._wanted
        engine = self._owner.engine
        (of_prompt,) = params_of_each(1, params, sampling, engine.default_sampling)
        if self._one_sample:
            check_one_sample(of_prompt)
        request = engine.submit(prompt, of_prompt, on_update=_notifier(loop, changed))
        self._owner._ensure_thread()
        return AsyncRequest(request, changed)


class AsyncRequest:
    """A queued request, and its forks if several samples were asked for. Await it from one task at a time."""

    def __init__(self, request: Request, changed: asyncio.Event) -> None:
        self.request = request
        self._changed = changed

    async def changed(self) -> None:
        """Return when a sample of it has new text, or has ended, since the last call."""
        await self._changed.wait()
        self._changed.clear()

    async def finished(self) -> None:
        """Return when every sample has ended."""
        await self._until(lambda one: one.is_finished)

    async def freed(self) -> None:
        """Return when every sample has ended and its pages are free."""
        await self._until(lambda one: one.is_finished and one.held_sequence is None)

    def cancel(self) -> None:
        """End it, if it has not ended. The thread that runs steps frees its pages, before the next step."""
        for one in self.request.family:
            one.cancelled = True

    async def _until(self, state: Callable[[Request], bool]) -> None:
        while not all(map(state, self.request.family)):
            await self.changed()


def _notifier(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    """What sets ``changed`` from another thread."""

    def tell() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    return tell


def _cancel_queued(queued: "asyncio.Future[Request]") -> None:
    """End a request whose client went away while it was queued."""
    if not queued.cancelled() and queued.exception() is None:
        for one in queued.result().family:
            one.cancelled = True
