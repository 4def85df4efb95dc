"""Estimated duration of a report, and its progress.

Work is estimated in seconds on the machine where the constants below were measured (two cores of an AMD EPYC), scaled by the
time of one document here. N tokens of a context, R rows.
"""

import time
from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]

PREFILL = (1.2e-4, 5.6e-8)
"""Seconds of a prefill, per token and per pair of tokens."""
SCORING = 1.25e-7
"""Seconds per pair of tokens of all scores together."""
FORKING = 0.008
"""Seconds of a fork and its eviction."""
DECODING = (0.006, 1.5e-4, 2.5e-7)
"""Seconds of a decode step: itself, per row, per row and token of the context."""


def seconds_of_full(n_tokens: int, n_fed: int) -> float:
    """The full cache on one document."""
    per_token, per_pair = PREFILL
    return per_token * n_tokens + per_pair * n_tokens**2 + DECODING[0] * n_fed


def seconds_of_comparison(n_tokens: int, n_fed: int, n_rows: int) -> float:
    """All rows on one document."""
    step, per_row, per_row_token = DECODING
    prefill = seconds_of_full(n_tokens, 0) + SCORING * n_tokens**2
    return prefill + n_rows * FORKING + n_fed * (step + n_rows * (per_row + per_row_token * n_tokens))


class Effort:
    """Counts planned and finished work, and calls ``on_progress(stage, done, total)`` in tenths of a second."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self.planned_s = 0.0
        """Seconds of work that are planned."""
        self._done_s = 0.0

    def plan(self, seconds: float) -> None:
        """Add work."""
        self.planned_s += seconds

    def finish(self, seconds: float) -> None:
        """Record planned work as done."""
        self._done_s += seconds
        self._on_progress("measuring", round(10 * self._done_s), max(1, round(10 * self.planned_s)))

    def minutes_here(self, seconds: float, work: Callable[[], object]) -> float:
        """The planned minutes on this machine, from the measured time of ``work``, which should take ``seconds``."""
        start = time.perf_counter()
        work()
        return self.planned_s / 60 * (time.perf_counter() - start) / seconds
