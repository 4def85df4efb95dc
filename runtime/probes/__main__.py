"""``python -m trt_kv.runtime.probes``: a request as JSON on standard input, results as JSON on standard output.

A process of its own, which has loaded no more than an engine's process has, so that memory and threads are like those.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from trt_kv.openmp import let_threads_wait


def main() -> None:
    """Read a request, measure, write the results."""
    let_threads_wait()
    request = json.load(sys.stdin)
    json.dump(measured(request), sys.stdout)


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """Results of a request, which ``trt_kv.pipeline.advice_probe`` writes.

    ``times``: by what was timed ("token", "prompt") and kind of layer, ms at the two points; None when ``seconds`` had passed.
    """
    from trt_kv.program import OpNode
    from trt_kv.runtime.cpus import threads_for
    from trt_kv.runtime.probes import bandwidth
    from trt_kv.runtime.probes.engine_steps import engine_steps, resident_bytes
    from trt_kv.runtime.probes.layers import LayerProbe, LayerShape

    n_threads, base_bytes = threads_for(0), resident_bytes()
    steps = None
    if request["engine"] is not None:
        steps = engine_steps(
            Path(request["engine"]),
            batch=request["batch"],
            kv_dtype=request["shape"]["kv_dtype"],
            weight_bytes=request["weight_bytes"],
            base_bytes=base_bytes,
        )
    shape = LayerShape(n_threads=n_threads, **request["shape"])
    probes = {
        what: [
            LayerProbe(shape, {phase: tuple(map(OpNode.from_json, nodes)) for phase, nodes in kind.items()}) for kind in of_what
        ]
        for what, of_what in request["kinds"].items()
    }
    for what, of_what in probes.items():
        for probe in of_what:
            probe.warm_up(what)
    started = time.perf_counter()
    speed = bandwidth.gb_per_s(n_threads) if probes else None
    times: dict[str, list[list[float] | None]] = {what: [None] * len(of_what) for what, of_what in probes.items()}
    in_turn = sorted((index, what) for what, of_what in probes.items() for index in range(len(of_what)))
    for index, what in in_turn:
        if time.perf_counter() - started < request["seconds"]:
            times[what][index] = [probes[what][index].ms(what, n) for n in request["points"][what]]
    return {
        "n_threads": n_threads,
        "base_bytes": base_bytes,
        "gb_per_s": speed,
        "times": times,
        "probe_s": time.perf_counter() - started,
        "engine": None if steps is None else dataclasses.asdict(steps),
    }


if __name__ == "__main__":
    main()
