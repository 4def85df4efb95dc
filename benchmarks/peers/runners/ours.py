"""trt-kv itself, on an engine folder. Options: those of ``Engine.load``."""

from typing import Any

import trt_kv
from benchmarks.peers.protocol import Answer, Job, Setup
from benchmarks.peers.runners.our_requests import request_of
from benchmarks.peers.runners.placed_caches import PlacedCaches
from benchmarks.peers.serving import Run, serve
from trt_kv.openmp import let_threads_wait
from trt_kv.runtime.engine import Engine


def set_up(setup: Setup) -> tuple[dict[str, Any], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    # As the command line does, before anything loads OpenMP.
    let_threads_wait()
    options = dict(setup.options)
    if "host_tier" in options:
        options["host_tokens"] = setup.context
    else:
        options["cache_tokens"] = setup.context
    # The others' prefix caches are off, or find nothing.
    engine = Engine.load(setup.model, n_threads=setup.threads, prefix_cache=False, **options)
    caches = PlacedCaches(engine)

    def run(job: Job) -> Answer:
        return caches.decode(job) if job.synthetic else request_of(engine, job)

    return {"version": trt_kv.__version__, "backend": engine.runner.description}, run


if __name__ == "__main__":
    serve(set_up)
