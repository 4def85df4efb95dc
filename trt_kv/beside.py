"""Work on a second thread while this one does something else: for what releases the interpreter, such as hashing a file."""

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """Work that was started by ``beside``."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._reports: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._is_given_up = False
        self._future: Future[T]

    def report(self, *progress: Any) -> None:
        """Called by the work: ``progress`` reaches ``tell`` on the thread that waits for the result."""
        if self._is_given_up:
            raise InterruptedError
        self._reports.put(progress)

    def result(self) -> T:
        """Wait for the work; its result, or its error. Once only."""
        while (progress := self._reports.get()) is not None:
            self._tell(*progress)
        future = self._future
        del self._future  # which holds the result, and by its callback this job: sessions would live until a collection
        return future.result()

    def _start(self, pool: ThreadPoolExecutor, work: Callable[[Callable[..., None]], T]) -> None:
        self._future = pool.submit(work, self.report)
        self._future.add_done_callback(lambda _: self._reports.put(None))


@contextlib.contextmanager
def beside(work: Callable[[Callable[..., None]], T], tell: Callable[..., None]) -> Iterator[Job[T]]:
    """Run ``work(report)`` on another thread during the block, which asks for the result.

    What the work reports, ``tell`` is called with on this thread. If the block ends without waiting for the result, the work
    ends at its next report.
    """
    job: Job[T] = Job(tell)
    with ThreadPoolExecutor(1, thread_name_prefix="beside") as pool:
        job._start(pool, work)
        try:
            yield job
        finally:
            job._is_given_up = True
