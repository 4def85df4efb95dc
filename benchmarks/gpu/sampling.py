"""Choosing tokens where the logits are, beside copying the logits to the host and choosing there, as before.

128,256 tokens, logits of standard deviation 3, batches of a decode step. Times are the host's, from logits on the device to
tokens in Python, because both sides end there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import device
from benchmarks.harness import Report, Row, check_close, take_turns
from trt_kv.runtime.backends.cuda.choice import chosen_tokens
from trt_kv.runtime.backends.step import Choice
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import next_token

VOCABULARY = 128_256
MOST_DIFFERENT = 0.02
"""Share of tokens that may differ: exponentials are rounded differently, and a random number may lie between two sums."""
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9, min-p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def run(*, quick: bool) -> Report:
    """Every setting at every batch; the two sides choose from the same logits with the same random numbers."""
    vocabulary, batches, rounds = (1_000, (1, 3), 3) if quick else (VOCABULARY, (1, 8, 64), 30)
    rows: list[Row] = []
    n_different = n_tokens = 0
    for batch in batches:
        generator = np.random.default_rng(batch)
        logits_RV = torch.from_numpy((3 * generator.standard_normal((batch, vocabulary))).astype(np.float32)).to(device())
        for name, settings in SETTINGS.items():
            params = SamplingParams(**{"temperature": 1.0} | settings)
            choices = [_choice(params, uniform) for uniform in np.random.default_rng(7).random(batch)]
            ours, theirs = functools.partial(_on_device, logits_RV, choices), functools.partial(_on_host, logits_RV, params)
            n_different += sum(one != other for one, other in zip(ours(), theirs(), strict=True))
            n_tokens += batch
            sides: dict[str, Callable[[], object]] = {"on the device": ours, "copied to the host": theirs}
            timings = take_turns(sides, rounds=rounds)
            times = {f"{side.replace(' ', '_')}_ms": timings.row(side)["median_ms"] for side in sides}
            rows.append({"batch": batch, "parameters": name} | times)
    share = np.array(n_different / n_tokens)
    checks = [check_close("share of tokens that differ", share, np.zeros(()), within=MOST_DIFFERENT)]
    settings = {"vocabulary": vocabulary, "rounds": rounds}
    return Report(title="Choosing tokens", settings=settings, checks=checks, tables={"from logits to tokens": rows})


def _choice(params: SamplingParams, uniform: float) -> Choice:
    return Choice(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, uniform=float(uniform)
    )


@torch.inference_mode()
def _on_device(logits_RV: Tensor, choices: Sequence[Choice]) -> list[int]:
    tokens: list[int] = chosen_tokens(logits_RV, logits_RV.argmax(1), choices).tolist()
    return tokens


def _on_host(logits_RV: Tensor, params: SamplingParams) -> list[int]:
    rng = np.random.default_rng(7)
    return [next_token(logits_V, params, rng) for logits_V in logits_RV.cpu().numpy()]
