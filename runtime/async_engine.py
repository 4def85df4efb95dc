"""``Engine`` for asyncio: one thread runs the steps, coroutines await the text of their requests."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from trt_kv.chat.messages import Message
from trt_kv.runtime.async_session import AsyncSession
from trt_kv.runtime.async_stream import AsyncRequest, AsyncStream, cancel_queued, notifier
from trt_kv.runtime.chat import ChatKeywords
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.samples import check_one_sample
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import params_of_each
from trt_kv.runtime.session import Mode
from trt_kv.runtime.text.prompts import Prompt
from trt_kv.runtime.turn import Turn

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

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]) -> AsyncStream:
        """Stream the continuation of one prompt. The request is queued when the first text is awaited.

        Closing the iterator (``aclose``), or cancelling the task that awaits it, cancels the request. Errors as for
        ``Engine.stream``.
        """

        async def submit() -> AsyncRequest:
            (of_prompt,) = params_of_each(1, params, sampling, self.engine.default_sampling)
            check_one_sample(of_prompt)
            return await self.submit(prompt, of_prompt)

        return AsyncStream(submit)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generation:
        """Generate the whole continuation of one prompt, or all samples of it. Errors as for ``Engine.generate``."""
        return await self._whole(AsyncStream(partial(self.submit, prompt, params, **sampling)))

    @staticmethod
    async def _whole(stream: AsyncStream) -> Generation:
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
    ) -> AsyncRequest:
        """Queue a request, for servers that need its samples, tokens and times as they come. Errors as for ``Engine.submit``.

        The prompt is encoded in another thread, so that a long one does not hold up the event loop. ``changed``: an event that
        several requests share, so that one task can wait for all of them.
        """
        return await self._queued(partial(self.engine.submit, prompt, params, **sampling), changed)

    async def submit_turn(self, turn: Turn, *, changed: asyncio.Event | None = None) -> AsyncRequest:
        """The same for a turn of a ``Session``, which its server then records."""
        return await self._queued(partial(self.engine.submit_turn, turn), changed)

    async def _queued(self, submit: Callable[..., Request], changed: asyncio.Event | None) -> AsyncRequest:
        self._ensure_thread()
        loop, changed = asyncio.get_running_loop(), changed or asyncio.Event()
        queued = loop.run_in_executor(None, partial(submit, on_update=notifier(loop, changed)))
        try:
            request = await asyncio.shield(queued)
        except asyncio.CancelledError:
            queued.add_done_callback(cancel_queued)
            raise
        return AsyncRequest(request, changed)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatKeywords]
    ) -> AsyncStream:
        """Stream the assistant's answer to a conversation, as ``stream`` does. Errors as for ``Engine.chat``."""

        async def submit() -> AsyncRequest:
            prompt, chosen = await self._chat_request(messages, params, options)
            check_one_sample(chosen)
            return await self.submit(prompt, chosen)

        return AsyncStream(submit)

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatKeywords]
    ) -> Generation:
        """Generate the assistant's answer to a conversation. Errors as for ``Engine.chat``."""
        return await self.generate(*await self._chat_request(messages, params, options))

    async def _chat_request(
        self, messages: Sequence[Message], params: SamplingParams | None, options: ChatKeywords
    ) -> tuple[list[int], SamplingParams]:
        """``Engine.chat_request`` in another thread: a template of a long conversation takes long, and may take seconds."""
        return await asyncio.to_thread(self.engine.chat_request, messages, params, **options)

    def session(self, *, mode: Mode = "exact", system: str | None = None, **options: Unpack[ChatKeywords]) -> AsyncSession:
        """Begin a conversation. Options and errors as for ``Engine.session``.

        >>> session = engine.session(mode="compressed", max_new_tokens=64)
        >>> answers = [(await session.chat(text)).text for text in ("Why is the sky blue?", "And at night?")]
        """
        return AsyncSession(self, self.engine.session(mode=mode, system=system, **options))

    async def load_session(self, path: str | Path, **options: Unpack[ChatKeywords]) -> AsyncSession:
        """The conversation that ``AsyncSession.save`` or ``Session.save`` wrote. Errors as for ``Engine.load_session``."""
        return AsyncSession(self, await asyncio.to_thread(self.engine.load_session, path, **options))

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
