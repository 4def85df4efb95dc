"""A real server of a small engine on a loopback port, in a thread of the test process."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine
from trt_kv.serving.http.server import HttpServer
from trt_kv.serving.http.settings import ServerSettings

MODEL = "tiny"


@dataclass(frozen=True, kw_only=True)
class Served:
    """``url`` of the server, and what it serves. ``slow`` makes steps take that many seconds from now on."""

    server: HttpServer
    engine: Engine
    thread: threading.Thread
    pace: dict[str, float]

    @property
    def url(self) -> str:
        return self.server.url

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Inside the block every step takes ``seconds`` more."""
        self.pace["s"] = seconds
        try:
            yield
        finally:
            self.pace["s"] = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and every page is free."""
        pool, admission = self.engine.runner.pool, self.server.app.state.context.admission
        return pool.n_free == pool.n_pages and admission.n_inside == 0 and not self.engine.core._live


def eventually(state: Any, seconds: float = 10.0) -> bool:
    """Whether ``state()`` becomes true."""
    end = time.monotonic() + seconds
    while not state():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def served(folder: Path, **changes: Any) -> Iterator[Served]:
    """A server of an engine with small memory. ``changes``: fields of ``ServerSettings``."""
    engine = Engine.load(folder, cache_tokens=4000, chunk=16, n_threads=1)
    pace, run = {"s": 0.0}, engine.runner.run

    def run_at_pace(plan: Any) -> Any:
        time.sleep(pace["s"])
        return run(plan)

    engine.runner.run = run_at_pace  # type: ignore[method-assign]
    settings = dataclasses.replace(ServerSettings(model_name=MODEL, port=0, drain_seconds=20), **changes)
    server = HttpServer(AsyncEngine(engine), settings)
    thread = threading.Thread(target=server.run_until_stopped)
    thread.start()
    assert eventually(lambda: server.started)
    try:
        yield Served(server=server, engine=engine, thread=thread, pace=pace)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
