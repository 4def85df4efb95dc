"""Recall without overlap, as a baseline."""

from trt_kv.runtime.backends.host.recall.background import Job, settle_in_place


class SynchronousCopies:
    """Copies without overlap: jobs run, in order of submission, when their result is waited for."""

    def submit(self, job: Job) -> None:
        """Nothing yet."""

    def settle(self, job: Job) -> None:
        settle_in_place(job)

    def close(self) -> None:
        """Nothing runs."""
