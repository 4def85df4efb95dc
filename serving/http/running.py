"""One HTTP request as it runs: its prompts in the engine, their samples, and the news of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.async_stream import AsyncRequest
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.turn import Turn
from trt_kv.serving.admission import Admission, shutting_down
from trt_kv.serving.http.answers import News


class Running:
    """The requests of several prompts with the same parameters. ``close`` ends those that have not ended."""

    def __init__(self, engine: AsyncEngine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission
        self._changed = asyncio.Event()
        self._queued: list[AsyncRequest] = []
        self._places = contextlib.ExitStack()

    async def start(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> None:
        """Queue all prompts. Raises ``BusyError``, ``UsageError`` or ``CapacityError`` for one, and then runs none."""
        await self._start([partial(self._engine.submit, prompt, params) for prompt in prompts])

    async def start_turn(self, turn: Turn) -> None:
        """Queue a turn of a conversation; errors as for ``start``."""
        await self._start([partial(self._engine.submit_turn, turn)])

    @property
    def only(self) -> AsyncRequest:
        """The request, of which there is one."""
        (queued,) = self._queued
        return queued

    @property
    def samples(self) -> list[Request]:
        """The samples of all prompts, in the order of choices."""
        return [one for queued in self._queued for one in queued.request.family]

    @property
    def results(self) -> list[Generation]:
        """What has been generated so far, for each prompt."""
        return [queued.request.result() for queued in self._queued]

    async def news(self) -> AsyncIterator[News]:
        """What is new of the samples, as it comes, until all have ended; raises the error that ended one of them."""
        n_logprobs = [0] * len(self.samples)
        running = dict(enumerate(self.samples))
        while running:
            for index, sample in list(running.items()):
                has_ended = sample.is_finished  # first: no text is added afterwards
                text = "".join(_taken(sample))
                logprobs = sample.logprobs[n_logprobs[index] :]
                n_logprobs[index] += len(logprobs)
                if has_ended:
                    del running[index]
                    if sample.error is not None:
                        raise sample.error
                    if sample.finish_reason == "cancelled":  # not by this client, who would have closed this
                        raise shutting_down()
                if text or logprobs or has_ended:
                    reason = sample.finish_reason if has_ended else None
                    yield News(index=index, text=text, logprobs=logprobs, finish_reason=reason)
            if running:
                await self._changed.wait()
                self._changed.clear()

    async def end(self) -> list[Generation]:
        """The results, when all samples have ended; raises the error that ended one of them."""
        async for _ in self.news():
            pass
        return self.results

    async def _start(self, submissions: Sequence[Callable[..., Awaitable[AsyncRequest]]]) -> None:
        try:
            tickets = [self._places.enter_context(self._admission.ticket()) for _ in submissions]
            for ticket, submit in zip(tickets, submissions, strict=True):
                queued = await submit(changed=self._changed)
                self._queued.append(queued)
                ticket.request = queued.request
                if self._admission.is_over:
                    ticket.end()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what has not ended; the engine frees its pages before its next step."""
        for queued in self._queued:
            queued.cancel()
        self._places.close()


def _taken(sample: Request) -> list[str]:
    """The text of a sample that nobody has taken yet."""
    taken = []
    while sample.pieces:
        taken.append(sample.pieces.popleft())
    return taken
