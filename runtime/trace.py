"""Timing spans in Chrome's trace format, for chrome://tracing, Perfetto and the plots of the benchmarks."""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Trace:
    """Collects spans from any thread, at most ``n_last``, the last ones. ``NO_TRACE`` collects none."""

    def __init__(self, *, n_last: int | None = None) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=n_last)
        self._threads: dict[int, str] = {}
        self._start_ns = time.perf_counter_ns()

    @contextlib.contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Record the block as one span of the current thread, with ``details`` as its arguments."""
        begin_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            end_ns = time.perf_counter_ns()
            thread = threading.current_thread()
            self._threads[thread.native_id or 0] = thread.name
            self.events.append(
                {
                    "name": name,
                    "ph": "X",
                    "ts": (begin_ns - self._start_ns) / 1e3,
                    "dur": (end_ns - begin_ns) / 1e3,
                    "pid": 1,
                    "tid": thread.native_id or 0,
                    "args": details,
                }
            )

    def to_json(self) -> dict[str, Any]:
        """The trace as a JSON document; times in microseconds."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
            for thread, name in self._threads.items()
        ]
        return {"traceEvents": [*names, *self.events], "displayTimeUnit": "ms"}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json()) + "\n")


class _NoTrace(Trace):
    """Records nothing."""

    @contextlib.contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        yield


NO_TRACE: Trace = _NoTrace()
