"""Copies that go on while the model computes: jobs that say what they wait for, and who runs them.

A job is a generator. It yields an event to wait for it, or None where it may be interrupted; so the same job runs on a thread,
in place, or step by step under a test that chooses the worst order.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from trt_kv.errors import RecallError

Work = Callable[[], Iterator[threading.Event | None]]


class Job:
    """One piece of background work on one layer of one sequence.

    ``after``: the job before it on the same layer and sequence; it begins when that one has ended, and fails where it failed.
    """

    def __init__(self, what: str, work: Work, *, after: "Job | None") -> None:
        self.what = what
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.after = after
        self._work = work
        self._claim = threading.Lock()

    def steps(self) -> Iterator[threading.Event | None]:
        """The work, step by step. Whoever runs it calls ``finish`` in the end."""
        if self.after is not None:
            yield self.after.done
            if self.after.error is not None:
                raise self.after.error
            self.after = None
        yield from self._work()

    def finish(self, error: BaseException | None) -> None:
        """The work has ended, well or not; nothing of it runs any more."""
        self.error = error
        self.done.set()

    def run(self) -> None:
        """Do the whole work on the current thread, waiting where it waits; nothing, where another thread has begun it."""
        if not self._claim.acquire(blocking=False):
            return
        error: BaseException | None = None
        try:
            for event in self.steps():
                if event is not None:
                    event.wait()
        except Exception as raised:  # noqa: BLE001  (handed to whoever joins the job, whatever it is)
            error = raised
        except BaseException as raised:
            self.finish(raised)
            raise
        self.finish(error)


class Copies(Protocol):
    """Who runs jobs, and when."""

    def submit(self, job: Job) -> None:
        """Take a job; it may begin at once, later, or only when somebody waits for it."""
        ...

    def settle(self, job: Job) -> None:
        """Return when the job is done, and all before it. What it waits for has happened, or happens without the caller.

        A job that was never submitted is done here.
        """
        ...

    def close(self) -> None:
        """No job is taken any more."""
        ...


class ThreadedCopies:
    """Jobs run on background threads, begun in the order in which they came; so no job waits for one that cannot begin.

    Who waits for a job that no thread has begun yet does it himself.
    """

    def __init__(self, n_threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="recall")

    def submit(self, job: Job) -> None:
        self._pool.submit(job.run)

    def settle(self, job: Job) -> None:
        settle_in_place(job)

    def close(self) -> None:
        self._pool.shutdown()


def settle_in_place(job: Job) -> None:
    """Do a job and those before it on the current thread, or wait for the threads that have begun them."""
    if (before := job.after) is not None:
        settle_in_place(before)
    job.run()
    job.done.wait()


def join(copies: Copies, job: Job) -> None:
    """Wait for a job; ``RecallError`` where it failed, from what it failed with."""
    copies.settle(job)
    if job.error is not None:
        raise RecallError(
            f"the KV cache on the host: {job.what} failed",
            got=f"{type(job.error).__name__}: {job.error}",
            fix="this request is lost, others are not; check the disk and the memory of the host tier, then send it again",
        ) from job.error
