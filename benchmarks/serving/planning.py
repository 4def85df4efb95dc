"""Cost of planning: the share of a decode step that is neither the model nor sampling."""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import Row, rounded
from benchmarks.models import random_tokens
from benchmarks.serving.sides import ServedModel
from benchmarks.serving.traffic import request_of
from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.request import Request
from trt_kv.runtime.statistics import EngineStatistics

N_SEQUENCES = 32
N_PROMPT = 32


def measure(model: ServedModel, *, n_steps: int, rounds: int) -> Row:
    """Medians over ``rounds`` of ``n_steps`` decode steps of 32 sequences, without arrivals or ends."""
    core = model.core(max_sequences=N_SEQUENCES, chunk=N_PROMPT)
    requests = [
        request_of(random_tokens(N_PROMPT, model.config.vocab_size, seed=seed), N_SEQUENCES + (rounds + 1) * n_steps)
        for seed in range(N_SEQUENCES)
    ]
    core.add(requests)
    core.wait(lambda: all(len(request.token_ids) > 1 for request in requests))
    found = [_one(core, requests[-1], n_steps) for _ in range(rounds)]
    for request in requests:
        core.cancel(request)
    medians = np.median(found, axis=0)
    return {
        "sequences": N_SEQUENCES,
        "planning_ms": rounded(medians[0]),
        "sampling_ms": rounded(medians[1]),
        "model_ms": rounded(medians[2]),
        "planning_percent": rounded(np.median([100 * one[0] / sum(one) for one in found])),
    }


def _one(core: EngineCore, request: Request, n_steps: int) -> Sequence[float]:
    """Planning, sampling and the model in ms per step, over ``n_steps``."""
    before = _seconds(core.statistics)
    until = len(request.token_ids) + n_steps
    core.wait(lambda: len(request.token_ids) >= until)
    return [float(ms) for ms in (_seconds(core.statistics) - before) * 1e3 / n_steps]


def _seconds(counts: EngineStatistics) -> np.ndarray:
    return np.array([counts.planning_s, counts.sampling_s, counts.steps_s])
