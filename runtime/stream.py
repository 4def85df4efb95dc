"""Text of one request, piece by piece, for a thread that waits for it."""

from collections.abc import Callable, Iterator

from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.kernel_threads import release_kernel_threads
from trt_kv.runtime.request import Request


class Stream(Iterator[str]):
    """Yields the text of one request as it becomes final; see also ``result``. Use it from one thread at a time."""

    def __init__(self, core: EngineCore, request: Request, on_prefill: Callable[[int], None] | None = None) -> None:
        self._core = core
        self._request = request
        self._on_prefill = on_prefill
        self._n_told = 0

    def __next__(self) -> str:
        request = self._request
        while not request.pieces and not request.is_finished:
            try:
                self._core.wait(self._has_news, comes_back=True)
            except BaseException:
                self.close()
                raise
            self._tell_progress()
            if request.is_finished:
                release_kernel_threads()
        if request.pieces:
            return request.pieces.popleft()
        if request.error is not None:
            raise request.error
        raise StopIteration

    def _has_news(self) -> bool:
        request = self._request
        return bool(request.pieces) or request.is_finished or request.n_prompt_read > self._n_told

    def close(self) -> None:
        """Cancel the request if it has not ended. Its pages are freed before the next step."""
        self._core.cancel(self._request)

    def __del__(self) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """What has been generated so far."""
        return self._request.result()

    def _tell_progress(self) -> None:
        if self._request.n_prompt_read > self._n_told:
            self._n_told = self._request.n_prompt_read
            if self._on_prefill is not None:
                self._on_prefill(self._n_told)
