"""trt-kv itself, on an engine folder. Options: those of ``Engine.load``."""

import os
from itertools import pairwise
from typing import Any

import trt_kv
from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.runners.placed_caches import PlacedCaches, read_bytes
from benchmarks.peers.serving import Run, joules, serve
from trt_kv.runtime.engine import Engine


def set_up(setup: Setup) -> tuple[dict[str, Any], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    # As the command line does, before anything loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    options = dict(setup.options)
    if "host_tier" in options:
        options["host_tokens"] = setup.context
    else:
        options["cache_tokens"] = setup.context
    engine = Engine.load(setup.model, n_threads=setup.threads, **options)
    caches = PlacedCaches(engine)

    def run(job: Job) -> Answer:
        return caches.decode(job) if job.synthetic else request_of(engine, job)

    return {"version": trt_kv.__version__, "backend": engine.runner.description}, run


def request_of(engine: Engine, job: Job) -> Answer:
    """A request as any client sends it."""
    prompt = prompt_ids(job, engine.manifest.config.vocab_size)
    # One token more than is timed: the sequence, and so what it holds, lasts as long as its request.
    request = engine.submit(prompt, max_new_tokens=job.n_tokens + 2, temperature=0.0, ignore_eos=True)
    engine.core.wait(lambda: bool(request.times.tokens) or request.is_finished)
    before = joules()
    engine.core.wait(lambda: len(request.times.tokens) > job.n_tokens or request.is_finished)
    after = joules()
    kv_bytes = None if request.held_sequence is None else read_bytes(engine, request.held_sequence)
    engine.core.wait(lambda: request.is_finished)
    if request.error is not None:
        raise request.error
    tokens = request.times.tokens[: job.n_tokens + 1]
    return Answer(
        first_token_s=request.times.to_first_token_s,
        token_ms=[1e3 * (b - a) for a, b in pairwise(tokens)],
        kv_bytes=kv_bytes,
        joules=None if before is None or after is None else after - before,
    )


if __name__ == "__main__":
    serve(set_up)
