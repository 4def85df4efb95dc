"""Counters and histograms of an engine, for servers and benchmarks."""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.generation import Generation, RequestRecall

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
    ``time_in_queue`` from arrival to admission, ``time_reading`` from there to the first token, ``time_decoding`` from there
    to the end, ``time_of_request`` from arrival to the end. ``planning_s`` is the time of scheduling and bookkeeping,
    ``steps_s`` of running the model, ``sampling_s`` of sampling and detokenization. ``held_tokens``: per layer, how many of the
    ``computed_tokens`` of finished requests were held at their end.
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
    time_reading: Histogram = field(default_factory=Histogram)
    time_decoding: Histogram = field(default_factory=Histogram)
    time_of_request: Histogram = field(default_factory=Histogram)
    computed_tokens: int = 0
    held_tokens: list[int] = field(default_factory=list)

    def count_end(self, generation: Generation, now: float) -> None:
        """Count a request that ended at ``now``, in seconds of ``time.monotonic``; its forks are counted on their own."""
        reason, times = generation.finish_reason, generation.times
        self.n_finished[reason] = self.n_finished.get(reason, 0) + 1
        self.time_of_request.add(now - times.arrived)
        if times.admitted is not None and times.tokens:
            self.time_reading.add(times.tokens[0] - times.admitted)
            self.time_decoding.add(now - times.tokens[0])
        self.computed_tokens += generation.num_computed_tokens
        before = self.held_tokens or [0] * len(generation.kv_tokens)
        if generation.kv_tokens:
            self.held_tokens = [n + held for n, held in zip(before, generation.kv_tokens, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        """Average number of prompt and generated tokens per step."""
        return (self.prompt_tokens + self.generated_tokens) / max(1, self.prefill_steps + self.decode_steps)

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"n_finished": dict(self.n_finished)}
        return {name: value.to_json() if isinstance(value, Histogram) else value for name, value in found.items()}


@dataclass(kw_only=True)
class RecallStatistics:
    """Counts of recall since the last ``reset``; L layers, K KV heads.

    A layer-step is one layer of one generated token, a page-head the keys and values of one KV head in one page. A KV head is
    corrected if its query drifted, so that its pages are chosen again before attention.
    """

    n_layers: int
    n_kv_heads: int
    page_head_bytes: int
    n_pages: int = 0
    """Pages on the host, by whose numbers a request's counts are found."""
    layer_steps_L: Ints = field(init=False)
    corrected_LK: Ints = field(init=False)
    corrected_layer_steps_L: Ints = field(init=False)
    moved_ahead_L: Ints = field(init=False)
    """Page-heads that were copied in the background."""
    moved_at_once_L: Ints = field(init=False)
    """Page-heads that were copied before attention, while the step waited."""
    pages_written: int = field(init=False)
    waited_ms: float = field(init=False)
    """Time that steps waited for copies."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.layer_steps_L, self.corrected_layer_steps_L, self.moved_ahead_L, self.moved_at_once_L = (
            np.zeros(self.n_layers, np.int64) for _ in range(4)
        )
        self.corrected_LK = np.zeros((self.n_layers, self.n_kv_heads), np.int64)
        self.pages_written = 0
        self.waited_ms = 0.0
        self._of_row: Ints = np.zeros((self.n_pages, 3), np.int64)
        """Layer-steps, corrected KV heads and moved page-heads of each layer of a sequence, by its first host page."""

    def count(self, layer: int, rows_B: Ints, corrected_BK: Ints, *, n_moved_ahead: int = 0, n_moved_at_once: int = 0) -> None:
        """Count a step of ``layer`` for the sequences with the first host pages ``rows``."""
        self.layer_steps_L[layer] += len(rows_B)
        self._of_row[rows_B, 0] += 1
        if corrected_BK.any():
            self.corrected_LK[layer] += corrected_BK.sum(axis=0)
            self.corrected_layer_steps_L[layer] += np.count_nonzero(corrected_BK.any(axis=1))
            self._of_row[rows_B, 1] += corrected_BK.sum(axis=1)
        if n_moved := n_moved_ahead + n_moved_at_once:
            self.moved_ahead_L[layer] += n_moved_ahead
            self.moved_at_once_L[layer] += n_moved_at_once
            self._of_row[rows_B, 2] += n_moved

    def of_request(self, rows: Sequence[int]) -> RequestRecall:
        """What was recalled for the sequence whose layers have the first host pages ``rows``."""
        n_steps, n_corrected, n_moved = (int(n) for n in self._of_row[list(rows)].sum(axis=0))
        pairs = n_steps * self.n_kv_heads
        return RequestRecall(moved_bytes=n_moved * self.page_head_bytes, correction_rate=n_corrected / max(1, pairs))

    def forget(self, rows: Sequence[int]) -> None:
        """Set the counts of a sequence to 0, so that the next one with these pages begins there."""
        self._of_row[list(rows)] = 0

    @property
    def head_rate(self) -> float:
        """Share of (layer-step, KV head) pairs that were corrected."""
        return float(self.corrected_LK.sum()) / max(1, int(self.layer_steps_L.sum()) * self.n_kv_heads)

    @property
    def layer_step_rate(self) -> float:
        """Share of layer-steps in which any KV head was corrected."""
        return float(self.corrected_layer_steps_L.sum()) / max(1, int(self.layer_steps_L.sum()))

    @property
    def moved_bytes(self) -> int:
        return self.page_head_bytes * int(self.moved_ahead_L.sum() + self.moved_at_once_L.sum())

    def to_json(self) -> dict[str, Any]:
        """Counts as lists, and the rates computed from them."""
        counts = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in dataclasses.asdict(self).items()
        }
        rates = {"head_rate": self.head_rate, "layer_step_rate": self.layer_step_rate, "moved_bytes": self.moved_bytes}
        return counts | rates
