"""Requests of Triton on one engine: each is a coroutine, which ends it with a final response whatever happens."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trt_kv.errors import BusyError, CapacityError, EngineError, NoTokenLeftError, TrtKvError, UsageError
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.async_stream import AsyncRequest
from trt_kv.serving.admission import Admission, Ticket
from trt_kv.serving.first_tokens import generate_first_tokens
from trt_kv.serving.logs import log_event, log_generated
from trt_kv.serving.triton.metrics import Exporter
from trt_kv.serving.triton.options import ModelOptions
from trt_kv.serving.triton.requests import TritonRequest, in_clients_words, read_request
from trt_kv.serving.triton.responses import Part, Progress, output_arrays

POLL_S = 0.05
"""Longest time, in seconds, until it is noticed that a client has gone, or that the engine's thread has ended."""
METRICS_S = 1.0
"""How often metrics are brought up to date, in seconds."""
END_S = 10.0
"""Time for open requests to end after the engine was closed."""


class ClientGoneError(TrtKvError):
    """The client cancelled its request, or has gone."""


def load_engine(folder: Path, *, gpu: int | None) -> tuple[AsyncEngine, ModelOptions]:
    """The engine of the model version in ``folder``, ready for requests, and its options. Errors as for ``Engine.load``."""
    options = ModelOptions.read(folder)
    engine = AsyncEngine.load(options.engine_folder(folder), **options.load_options(folder, gpu=gpu))
    generate_first_tokens(engine.engine)
    return engine, options


class Service:
    """``take`` may be called from any thread. Answers are sent by one thread, which runs an event loop."""

    def __init__(self, engine: AsyncEngine, options: ModelOptions, backend: Any, *, model_name: str) -> None:
        """``backend``: the module ``triton_python_backend_utils``, or what stands in for it. Takes ownership of ``engine``."""
        self.engine = engine
        self._options = options
        self._backend = backend
        self._admission = Admission(engine.engine.core.statistics, max_queue=options.max_queue)
        self._metrics = Exporter(backend, engine.engine, model_name=model_name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trt-kv answers", daemon=True)
        self._thread.start()
        self._measuring = asyncio.run_coroutine_threadsafe(self._measure(), self._loop)

    @property
    def is_ready(self) -> bool:
        return self.engine.is_running and not self._admission.is_draining

    def take(self, triton_request: Any) -> None:
        """Answer a request, later."""
        sender = triton_request.get_response_sender()
        asyncio.run_coroutine_threadsafe(self._answer(triton_request, sender), self._loop)

    def close(self) -> None:
        """Take no more requests, wait for those that run, end the others, and close the engine."""
        self._admission.is_draining = True
        self._wait_for_answers(self._options.drain_seconds)
        self._measuring.cancel()
        asyncio.run_coroutine_threadsafe(self.engine.close(), self._loop).result()
        self._wait_for_answers(END_S)
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for_answers(self, longest_s: float) -> None:
        deadline = time.monotonic() + longest_s
        while self._admission.n_inside and time.monotonic() < deadline:
            time.sleep(POLL_S / 5)

    async def _measure(self) -> None:
        while True:
            self._metrics.update()
            await asyncio.sleep(METRICS_S)

    async def _answer(self, triton_request: Any, sender: Any) -> None:
        """Every way out of here has sent the final flag."""
        request_id = triton_request.request_id() or None
        try:
            with self._admission.ticket() as ticket:
                arrays = {tensor.name(): tensor.as_numpy() for tensor in triton_request.inputs()}
                parameters = json.loads(triton_request.parameters() or "{}")
                wanted = read_request(arrays, parameters, timeout_us=triton_request.timeout())
                await self._generate(ticket, wanted, sender, request_id)
        except Exception as error:  # noqa: BLE001  (whatever it is, the client is told)
            self._send_error(sender, error, request_id)

    async def _generate(self, ticket: Ticket, wanted: TritonRequest, sender: Any, request_id: str | None) -> None:
        """Run the request, send what it makes, and leave nothing of it in the engine."""
        try:
            queued = await self.engine.submit(wanted.prompt, **wanted.sampling)
        except UsageError as error:
            raise in_clients_words(error) from error
        ticket.request = queued.request
        try:
            await self._follow(queued, wanted, sender)
        finally:
            queued.cancel()  # if it has not ended: its pages are freed before the next step
            for sample in queued.request.family:
                log_generated(sample, request_id=request_id)

    async def _follow(self, queued: AsyncRequest, wanted: TritonRequest, sender: Any) -> None:
        """Send the parts of the answer, or all of it at its end."""
        request = queued.request
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
                async with asyncio.timeout(POLL_S):
                    await queued.changed()
            if sender.is_cancelled():
                raise ClientGoneError("the request was cancelled by its client")
            if not self.engine.is_running and not self._admission.is_draining:
                raise EngineError("the engine has stopped", fix="reload the model")

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

    def _send_error(self, sender: Any, error: Exception, request_id: str | None) -> None:
        """End the request with an error, unless it has ended or cannot be reached."""
        name = next((name for kinds, name in _CODES.items() if isinstance(error, kinds)), "INTERNAL")
        bug = None if isinstance(error, TrtKvError) else error
        log_event("refused", request_id=request_id, code=name, error=type(error).__name__, bug=bug)
        try:
            told = self._backend.TritonError(str(error), getattr(self._backend.TritonError, name))
            response = self._backend.InferenceResponse(error=told)
            sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as failure:  # noqa: BLE001  (the final flag has been sent, or nobody is there any more)
            log_event("unsent", request_id=request_id, error=str(failure))


_CODES: dict[tuple[type[TrtKvError], ...], str] = {
    (UsageError, CapacityError, NoTokenLeftError): "INVALID_ARG",
    (ClientGoneError,): "CANCELLED",
    (BusyError, EngineError): "UNAVAILABLE",
}
"""Triton's names of codes, which it makes statuses of HTTP and gRPC; all other errors are INTERNAL. ``EngineError``: the engine
was closed while the request ran, or has stopped.
"""
