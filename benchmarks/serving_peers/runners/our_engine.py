"""trt-kv in process: what its servers' cost is measured against. Options: those of ``Engine.load``."""

from typing import Any

import trt_kv
from benchmarks.peers.protocol import Setup
from benchmarks.peers.serving import serve
from benchmarks.serving_peers.loads import Load, Served, closed_loop
from trt_kv.openmp import let_threads_wait
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.request import Request


def set_up(setup: Setup) -> tuple[dict[str, Any], Any]:
    """See ``benchmarks.peers.serving.serve``."""
    # As the command line does, before anything loads OpenMP.
    let_threads_wait()
    engine = Engine.load(setup.model, n_threads=setup.threads, **setup.options)

    def run(load: Load) -> Served:
        requests: list[Request] = []
        n_seen: list[int] = []

        def begin(at: int) -> None:
            requests.append(engine.submit(load.prompts[at], max_new_tokens=load.n_tokens, temperature=0.0, ignore_eos=True))
            n_seen.append(0)

        def fresh() -> list[tuple[int, list[int]]]:
            return [(at, one.token_ids[seen:]) for at, (one, seen) in enumerate(zip(requests, n_seen, strict=True))]

        def step() -> list[tuple[int, list[int]]]:
            engine.core.wait(lambda: any(ids for _, ids in fresh()) or any(one.error for one in requests))
            for one in requests:
                if one.error is not None:
                    raise one.error
            found = fresh()
            for at, ids in found:
                n_seen[at] += len(ids)
            return found

        return closed_loop(load, begin, step)

    return {"version": trt_kv.__version__, "backend": engine.runner.description}, run


if __name__ == "__main__":
    serve(set_up, Load)
