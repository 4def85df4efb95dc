"""Background copies that overlap with the model's computation: jobs, and what runs them.

A job is a generator that yields an event to wait for, or None at a point where it may be paused. So the same job can run on a
thread, in place, or step by step in a test that chooses the worst order.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from trt_kv.errors import RecallError, load_option

Work = Callable[[], Iterator[threading.Event | None]]


class Job:
    """Background work on one layer of one sequence.

    ``after``: the previous job on the same layer and sequence. This job starts when that one has ended, and fails if it failed.
    """

    def __init__(self, what: str, work: Work, *, after: "Job | None") -> None:
        self.what = what
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.after = after
        self._work = work
        self._claim = threading.Lock()

    def steps(self) -> Iterator[threading.Event | None]:
        """The work, step by step. The caller must call ``finish`` at the end."""
        if self.after is not None:
            yield self.after.done
            if self.after.error is not None:
                raise self.after.error
            self.after = None
        yield from self._work()

    def finish(self, error: BaseException | None) -> None:
        """Mark the job as ended, with its error or None. None of its work may run afterwards."""
        self.error = error
        self.done.set()

    def run(self) -> None:
        """Run the whole job on the current thread, blocking on its events. Does nothing if another thread has started it."""
        if not self._claim.acquire(blocking=False):
            return
        error: BaseException | None = None
        try:
            for event in self.steps():
                if event is not None:
                    event.wait()
        except Exception as raised:  # noqa: BLE001  (``join`` raises it, whatever it is)
            error = raised
        except BaseException as raised:
            self.finish(raised)
            raise
        self.finish(error)


class Copies(Protocol):
    """Runs jobs; implementations decide when and on which thread."""

    def submit(self, job: Job) -> None:
        """Queue a job. It may start immediately, later, or only when it is settled."""
        ...

    def settle(self, job: Job) -> None:
        """Wait for the job and all jobs before it. The events they wait for must be set already, or be set by other threads.

        A job that was never submitted is run here.
        """
        ...

    def close(self) -> None:
        """Stop accepting jobs."""
        ...


class ThreadedCopies:
    """Runs jobs on background threads, started in submission order, so that no job waits for one that cannot start.

    A thread that settles a job that has not started runs the job itself.
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
    """Run a job and those before it on the current thread; wait for those that other threads have started."""
    if (before := job.after) is not None:
        settle_in_place(before)
    job.run()
    job.done.wait()


def join(copies: Copies, job: Job) -> None:
    """Wait for a job. If it failed, raise ``RecallError`` from its error."""
    copies.settle(job)
    if job.error is not None:
        raise lost_pages(f"the KV cache on the host: {job.what} failed", job.error) from job.error


def lost_pages(what: str, error: BaseException) -> RecallError:
    """The error of a request whose pages could not be copied because of ``error``."""
    disk_is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    place = f"choose another disk with {load_option('host_tier', 'file:PATH')}"
    fix = f"free space on the disk of the host tier, or {place}" if disk_is_full else f"check the host tier's disk, or {place}"
    return RecallError(what, got=f"{type(error).__name__}: {error}", fix=f"this request is lost, others are not; {fix}")
