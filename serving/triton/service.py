"""Requests of Triton on one engine: each is a coroutine, which ends it with a final response whatever happens."""

import asyncio
import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trt_kv.errors import CapacityError, EngineError, TrtKvError, UsageError
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.request import Request
from trt_kv.serving.triton.options import ModelOptions
from trt_kv.serving.triton.requests import TritonRequest, in_clients_words, read_request
from trt_kv.serving.triton.responses import Part, Progress, output_arrays

POLL_S = 0.05
"""Longest time, in seconds, until it is noticed that a client has gone, or that the engine's thread has ended."""
END_S = 10.0
"""Time for open requests to end after the engine was closed."""


class QueueFullError(TrtKvError):
    """More requests wait than are allowed to."""


class CancelledError(TrtKvError):
    """The client cancelled its request, or has gone."""


def load_engine(folder: Path, *, gpu: int | None) -> tuple[AsyncEngine, ModelOptions]:
    """The engine of the model version in ``folder``, and its options. Errors as for ``Engine.load``."""
    options = ModelOptions.read(folder)
    return AsyncEngine.load(options.engine_folder(folder), **options.load_options(folder, gpu=gpu)), options


@dataclass(eq=False)
class _Ticket:
    """A request of Triton that has not been answered; ``request``: once the engine has it."""

    request: Request | None = None

    @property
    def waits(self) -> bool:
        return self.request is None or self.request.times.admitted is None


class Service:
    """``take`` may be called from any thread. Answers are sent by one thread, which runs an event loop."""

    def __init__(self, engine: AsyncEngine, options: ModelOptions, backend: Any) -> None:
        """``backend``: the module ``triton_python_backend_utils``, or what stands in for it. Takes ownership of ``engine``."""
        self.engine = engine
        self._options = options
        self._backend = backend
        self._tickets: set[_Ticket] = set()
        self._is_closing = False
        self._loop = asyncio.new_event_loop()
        self._submitting = ThreadPoolExecutor(1, thread_name_prefix="trt-kv prompts")
        self._thread = threading.Thread(target=self._loop.run_forever, name="trt-kv answers", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return not self._is_closing and self.engine.is_running

    def take(self, triton_request: Any) -> None:
        """Answer a request, later."""
        sender = triton_request.get_response_sender()
        asyncio.run_coroutine_threadsafe(self._answer(triton_request, sender), self._loop)

    def close(self) -> None:
        """Take no more requests, wait for those that run, end the others, and close the engine."""
        self._is_closing = True
        self._wait_for_answers(self._options.drain_seconds)
        asyncio.run_coroutine_threadsafe(self.engine.close(), self._loop).result()
        self._wait_for_answers(END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._submitting.shutdown()

    def _wait_for_answers(self, longest_s: float) -> None:
        deadline = time.monotonic() + longest_s
        while self._tickets and time.monotonic() < deadline:
            time.sleep(POLL_S / 5)

    async def _answer(self, triton_request: Any, sender: Any) -> None:
        """Every way out of here has sent the final flag."""
        ticket = _Ticket()
        self._tickets.add(ticket)
        try:
            self._check_may_wait()
            arrays = {tensor.name(): tensor.as_numpy() for tensor in triton_request.inputs()}
            parameters = json.loads(triton_request.parameters() or "{}")
            wanted = read_request(arrays, parameters, timeout_us=triton_request.timeout())
            await self._follow(ticket, wanted, sender)
        except Exception as error:  # noqa: BLE001  (whatever it is, the client is told)
            self._send_error(sender, error)
        finally:
            _give_up(ticket)
            self._tickets.discard(ticket)

    def _check_may_wait(self) -> None:
        if self._is_closing:
            raise QueueFullError("the model is being unloaded", fix="send the request to another replica")
        n_waiting = sum(ticket.waits for ticket in self._tickets) - 1
        if n_waiting >= self._options.max_queue:
            raise QueueFullError(
                "the queue is full",
                got=f"{n_waiting} requests that wait",
                expected=f"fewer than {self._options.max_queue}",
                fix="send the request again later, or to another replica",
            )

    async def _follow(self, ticket: _Ticket, wanted: TritonRequest, sender: Any) -> None:
        """Run the request, and send its parts, or all of it at its end."""
        changed = asyncio.Event()

        def tell() -> None:
            self._loop.call_soon_threadsafe(changed.set)

        submit = partial(self._submit, wanted, tell)
        ticket.request = request = await self._loop.run_in_executor(self._submitting, submit)
        progress = [Progress(request=one) for one in request.family]
        prefix = wanted.prompt if wanted.repeats_prompt and isinstance(wanted.prompt, str) else ""
        while True:
            ended = all(one.is_finished for one in request.family)
            if error := next((one.error for one in request.family if one.error is not None), None):
                raise error
            if ended or (wanted.streams and progress[0].has_news(tokens="output_ids" in wanted.returned)):
                parts = [one.take() for one in progress]
                self._send(sender, wanted, parts, prefix, n_prompt_tokens=len(request.prompt_ids), is_last=ended)
                prefix = ""
            if ended:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), POLL_S)
            changed.clear()
            if sender.is_cancelled():
                raise CancelledError("the request was cancelled by its client")
            if not self.engine.is_running and not self._is_closing:
                raise EngineError("the engine has stopped", fix="reload the model")

    def _submit(self, wanted: TritonRequest, tell: Callable[[], None]) -> Request:
        try:
            return self.engine.submit(wanted.prompt, on_update=tell, **wanted.sampling)
        except UsageError as error:
            raise in_clients_words(error) from error

    def _send(
        self,
        sender: Any,
        wanted: TritonRequest,
        parts: Sequence[Part],
        prefix: str,
        *,
        n_prompt_tokens: int,
        is_last: bool,
    ) -> None:
        tokenizer = self.engine.engine.tokenizer
        arrays = output_arrays(parts, wanted.returned, prefix=prefix, n_prompt_tokens=n_prompt_tokens, tokenizer=tokenizer)
        tensors = [self._backend.Tensor(name, array) for name, array in arrays.items()]
        flags = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        sender.send(self._backend.InferenceResponse(tensors), flags=flags)

    def _send_error(self, sender: Any, error: Exception) -> None:
        """End the request with an error, unless it has ended or cannot be reached."""
        name = next((name for kind, name in _CODES if isinstance(error, kind)), "INTERNAL")
        log = self._backend.Logger
        if name == "INTERNAL":
            log.log_error("".join(traceback.format_exception(error)))
        try:
            told = self._backend.TritonError(str(error), getattr(self._backend.TritonError, name))
            response = self._backend.InferenceResponse(error=told)
            sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as failure:  # noqa: BLE001  (the final flag has been sent, or nobody is there any more)
            log.log_verbose(f"a response was not sent: {failure}")


_CODES = (
    (UsageError, "INVALID_ARG"),
    (CapacityError, "INVALID_ARG"),
    (CancelledError, "CANCELLED"),
    (QueueFullError, "UNAVAILABLE"),
)
"""Triton's names of codes; it makes them statuses of HTTP and gRPC. All other errors are INTERNAL."""


def _give_up(ticket: _Ticket) -> None:
    """Cancel what the engine still does for a request; its pages are freed before the next step."""
    for one in ticket.request.family if ticket.request is not None else ():
        one.cancelled = True
