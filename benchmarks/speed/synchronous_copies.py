"""Recall in which nothing overlaps, to compare with."""

from trt_kv.runtime.backends.host.recall.background import Job, settle_in_place


class SynchronousCopies:
    """Nothing overlaps: jobs run when somebody waits for them, in the order in which they came."""

    def submit(self, job: Job) -> None:
        """Nothing yet."""

    def settle(self, job: Job) -> None:
        settle_in_place(job)

    def close(self) -> None:
        """Nothing runs."""
