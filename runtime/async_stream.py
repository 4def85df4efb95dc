"""Requests that coroutines wait for, while another thread runs the steps."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request


class AsyncStream(AsyncIterator[str]):
    """Yields the text of one request as it becomes final; see also ``result``. Use it from one task at a time."""

    def __init__(self, submit: "Callable[[], Awaitable[AsyncRequest]]") -> None:
        """``submit``: queues the request, once."""
        self._submit = submit
        self._queued: AsyncRequest | None = None

    async def __anext__(self) -> str:
        if self._queued is None:
            self._queued = await self._submit()
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


def notifier(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    """What sets ``changed`` from another thread."""

    def tell() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    return tell


def cancel_queued(queued: "asyncio.Future[Request]") -> None:
    """End a request whose client went away while it was queued."""
    if not queued.cancelled() and queued.exception() is None:
        for one in queued.result().family:
            one.cancelled = True
