"""Counters and histograms of an engine, for servers and benchmarks."""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SECONDS = tuple(m * 10.0**e for e in range(-4, 3) for m in (1, 2, 5))
"""Upper bounds of the buckets of times, in seconds: 0.1 ms to 500 s."""


@dataclass(kw_only=True)
class Histogram:
    """Counts per bucket, the last one for values above every bound; ``total`` is the sum of the added values."""

    bounds: Sequence[float] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass(kw_only=True)
class EngineStatistics:
    """Counts since the engine was loaded; times in seconds.

    ``time_to_first_token`` counts from a request's arrival, ``time_between_tokens`` from one token of a request to its next,
    ``time_in_queue`` from arrival to admission. ``planning_s`` is the time of scheduling and bookkeeping, ``steps_s`` of
    running the model, ``sampling_s`` of sampling and detokenization.
    """

    n_waiting: int = 0
    n_running: int = 0
    n_finished: dict[str, int] = field(default_factory=dict)
    """Finished requests by finish reason."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    planning_s: float = 0.0
    steps_s: float = 0.0
    sampling_s: float = 0.0
    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_between_tokens: Histogram = field(default_factory=Histogram)
    time_in_queue: Histogram = field(default_factory=Histogram)

    @property
    def tokens_per_step(self) -> float:
        """Average number of prompt and generated tokens per step."""
        return (self.prompt_tokens + self.generated_tokens) / max(1, self.prefill_steps + self.decode_steps)

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value.to_json() if isinstance(value, Histogram) else value for name, value in found.items()}
