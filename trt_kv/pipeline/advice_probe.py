"""Measures this machine for advice, in a process of its own (``trt_kv.runtime.probes``)."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trt_kv.errors import EngineError
from trt_kv.pipeline.advice import MeasuredMachine
from trt_kv.pipeline.advice_model import PlannedPolicy, Subject
from trt_kv.pipeline.advice_time import LayerTimes, Nodes, TimeModel, kind_of, prompt_times, recalls, token_times
from trt_kv.pipeline.callbacks import OnProgress
from trt_kv.policies import policy_from_name
from trt_kv.program import PHASES

PROBE_SECONDS = 10.0
"""No further kind of layer is probed when this has passed; one takes well below a second on an idle machine."""
TOKEN_POINTS = (1024, 3072)
MOST_PROMPT_FLOPS = 1e10
"""Of the attention of a probed layer."""
CHUNK = 512
"""Prompt tokens per step of an engine by default (``trt_kv.runtime.model_runner.DEFAULT_CHUNK``)."""


def measure(
    subject: Subject, planned: Sequence[PlannedPolicy], *, batch: int, with_times: bool, on_progress: OnProgress
) -> tuple[MeasuredMachine, TimeModel | None]:
    """Probe this machine, and with an engine time some of its steps. ``EngineError`` if that fails, with what it said last."""
    every = [subject.planned(policy_from_name("full")), *planned]
    kinds = {"token": _kinds(every, "decode"), "prompt": _kinds(planned, "prefill")} if with_times else {}
    request = _request(subject, kinds, batch)
    on_progress("probing this machine", 0, 1)
    found = _run(request)
    on_progress("probing this machine", 1, 1)
    machine = MeasuredMachine(
        gb_per_s=found["gb_per_s"],
        n_threads=found["n_threads"],
        probe_s=found["probe_s"],
        program_bytes=found["base_bytes"],
    )
    steps = found["engine"]
    if steps is not None:
        machine = dataclasses.replace(machine, program_bytes=steps["program_bytes"])
    if not with_times:
        return machine, None
    layers = _layer_times(kinds, found, request, subject.page_size)
    model = TimeModel(machine, layers)
    own = next((one for one in planned if one.is_engine), None)
    if own is None or steps is None:
        return machine, model
    short = steps["short_tokens"]
    of_step = model.caches_ms(own, [short] * own.cache.n_layers, short)
    of_chunk = model.reading_ms(own, steps["chunk_tokens"])
    if of_step is not None:
        machine = dataclasses.replace(machine, step_ms=max(0.0, steps["step_ms"] - batch * of_step))
    if of_chunk is not None:
        per_token = max(0.0, steps["chunk_ms"] - of_chunk) / steps["chunk_tokens"]
        machine = dataclasses.replace(machine, prompt_ms_per_token=per_token)
    return machine, TimeModel(machine, layers)


def _kinds(planned: Sequence[PlannedPolicy], phase: str) -> dict[str, dict[str, Nodes]]:
    """A layer of each kind in ``phase``, with its nodes of both phases.

    Plain attention comes first, which others are compared with, then what an engine needs, and last what recalls.
    """
    own = {kind_of(nodes) for one in planned if one.is_engine for nodes in one.programs[phase]}
    found: dict[str, dict[str, Nodes]] = {}
    for one in planned:
        for layer, nodes in enumerate(one.programs[phase]):
            found.setdefault(kind_of(nodes), {name: one.programs[name][layer] for name in PHASES})

    def order(entry: tuple[str, Mapping[str, Nodes]]) -> tuple[bool, bool, bool, int, str]:
        kind, nodes = entry[0], entry[1][phase]
        return len(nodes) > 1 or recalls(nodes), kind not in own, recalls(nodes), len(nodes), kind

    return dict(sorted(found.items(), key=order))


def _request(subject: Subject, kinds: Mapping[str, Mapping[str, Mapping[str, Nodes]]], batch: int) -> dict[str, Any]:
    """What ``trt_kv.runtime.probes`` reads."""
    config, most = subject.config, max(2, subject.config.max_positions - 8)
    longest = max(2, min(most, int((MOST_PROMPT_FLOPS / (2 * config.n_heads * config.head_dim)) ** 0.5)))
    last = min(TOKEN_POINTS[-1], most)
    return {
        "engine": None if subject.engine is None else str(subject.engine[0]),
        "batch": batch,
        "weight_bytes": subject.weights[0].n_bytes,
        "shape": {
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "kv_dtype": subject.kv_dtype,
            "page_size": subject.page_size,
            "chunk": CHUNK,
        },
        "kinds": {
            what: [
                {phase: [node.to_json() | {"layer": 0} for node in nodes] for phase, nodes in kind.items()}
                for kind in of_what.values()
            ]
            for what, of_what in kinds.items()
        },
        "points": {"token": [max(1, min(TOKEN_POINTS[0], last // 2)), last], "prompt": [max(1, longest // 2), longest]},
        "seconds": PROBE_SECONDS,
    }


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the process that measures."""
    command = [sys.executable, "-m", "trt_kv.runtime.probes"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError("this machine could not be measured", got=said[-1], fix="free memory, or use --no-measure")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _layer_times(
    kinds: Mapping[str, Mapping[str, Mapping[str, Nodes]]], found: Mapping[str, Any], request: Mapping[str, Any], page_size: int
) -> LayerTimes:
    """What the measured times say about each kind of layer."""
    points, times = request["points"], found["times"]
    token: dict[str, tuple[float, float, float]] = {}
    for (kind, nodes), ms in zip(kinds["token"].items(), times["token"], strict=True):
        if ms is not None:
            plain = next(iter(token.values()), (0.0, 0.0, 0.0))[1]
            token[kind] = token_times(nodes["decode"], points["token"], ms, page_size=page_size, per_attended=plain)
    prompt = {
        kind: prompt_times(nodes["prefill"], points["prompt"], ms)
        for (kind, nodes), ms in zip(kinds["prompt"].items(), times["prompt"], strict=True)
        if ms is not None
    }
    return LayerTimes(prompt=prompt, token=token)
