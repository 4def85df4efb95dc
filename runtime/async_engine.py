"""``Engine`` for asyncio: one thread runs the steps, coroutines await the text of their requests."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
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

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_update: Callable[[], None],
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """Queue a request from any thread, for servers; ``on_update``: see ``Request``. Errors as for ``Engine.submit``."""
        request = self.engine.submit(prompt, params, on_update=on_update, **sampling)
        self._ensure_thread()
        return request

    @property
    def is_running(self) -> bool:
        """Whether requests make progress: false once the engine is closed, or if its thread has ended for another reason."""
        thread = self._thread
        return not self._is_closed and (thread is None or thread.is_alive())

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
        self._request: Request | None = None
        self._changed: asyncio.Event | None = None

    async def __anext__(self) -> str:
        if self._request is None or self._changed is None:
            self._request, self._changed = self._submit()
        request, changed = self._request, self._changed
        try:
            while not request.pieces and not request.is_finished:
                await changed.wait()
                changed.clear()
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
        request, changed = self._request, self._changed
        if request is None or changed is None:
            return
        for one in request.family:
            one.cancelled = True
        await self._wait_for(lambda one: one.is_finished and one.held_sequence is None)

    async def end_of_others(self) -> None:
        """Return when the other samples of the prompt have ended too; raises the error that ended one of them."""
        try:
            await self._wait_for(lambda one: one.is_finished)
        except BaseException:
            await self.aclose()
            raise
        for one in self._request.family if self._request is not None else ():
            if one.error is not None:
                raise one.error

    async def _wait_for(self, state: Callable[[Request], bool]) -> None:
        request, changed = self._request, self._changed
        while request is not None and changed is not None and not all(map(state, request.family)):
            await changed.wait()
            changed.clear()

    def __del__(self) -> None:
        if self._request is not None:
            for one in self._request.family:
                one.cancelled = True  # the thread that runs steps frees its pages

    @property
    def result(self) -> Generation:
        """What has been generated so far; ``RuntimeError`` before the first text was awaited."""
        if self._request is None:
            raise RuntimeError("nothing has been generated: the stream has not been awaited")
        return self._request.result()

    def _submit(self) -> tuple[Request, asyncio.Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        prompt, params, sampling = self._wanted
        (of_prompt,) = params_of_each(1, params, sampling, self._owner.engine.default_sampling)
        if self._one_sample:
            check_one_sample(of_prompt)
        return self._owner.submit(prompt, of_prompt, on_update=tell), changed
