"""Choosing a token from a large vocabulary's logits: trt-kv, a full stable sort, and transformers' processors.

Every parameter's own cost is a row; penalties see 2,000 tokens of prompt and answer. Logits are normal, as wide as those of a
language model (standard deviation 3), and narrow (0.1), where most of the vocabulary stays in the nucleus.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, check_close, rounded, take_turns
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import candidates_of, log_total, next_token, top_log_probabilities
from trt_kv.runtime.sampling.processors import LogitsProcessor

VOCABULARY = 128_256
N_SEEN = 2_000
LIMIT_MS = 0.4
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "typical-p 0.9": {"typical_p": 0.9},
    "top-p 0.9, typical-p 0.9": {"top_p": 0.9, "typical_p": 0.9},
    "top-p 0.9, penalties": {"top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
}


def run(_folder: Path, *, quick: bool) -> Report:
    """Each setting with wide and narrow logits; the sides take turns."""
    vocabulary, rounds = (5_000, 3) if quick else (VOCABULARY, 60)
    checks, targets = [], []
    tables: dict[str, list[Row]] = {}
    for kind, spread in (("logits of standard deviation 3", 3.0), ("logits of standard deviation 0.1", 0.1)):
        rng = np.random.default_rng(0)
        logits_V = (rng.normal(size=vocabulary) * spread).astype(np.float32)
        seen = rng.integers(0, vocabulary, N_SEEN).tolist()
        rows = []
        for name, settings in SETTINGS.items():
            params = SamplingParams(**{"temperature": 1.0, "seed": 0} | settings)
            checks.append(_check(f"{name}, {kind}", logits_V, params, seen))
            timings = take_turns(_sides(logits_V, params, seen), rounds=rounds)
            ours = timings.row("trt-kv")
            others = {side: timings.row(side)["median_ms"] for side in timings.samples_ms if side != "trt-kv"}
            rows.append(
                {
                    "parameters": name,
                    **{f"trt_kv_{key}": value for key, value in ours.items()},
                    **{f"{side}_ms": others.get(side) for side in ("sort", "transformers")},
                }
            )
            targets.append(Target(what=f"{name}, {kind}, ms", measured=ours["median_ms"], limit=LIMIT_MS))
        tables[f"{vocabulary} tokens, {kind}"] = rows
    top = take_turns({"top_logprobs 20": lambda: top_log_probabilities(logits_V, 20, log_total(logits_V))}, rounds=rounds)
    tables["log-probabilities"] = [{"what": "20 likeliest tokens", "median_ms": top.row("top_logprobs 20")["median_ms"]}]
    settings = {"vocabulary": vocabulary, "tokens_seen": N_SEEN, "rounds": rounds}
    return Report(title="Choosing a token", settings=settings, checks=checks, tables=tables, targets=() if quick else targets)


def _sides(logits_V: Floats, params: SamplingParams, seen: list[int]) -> dict[str, Callable[[], object]]:
    processor, rng = _processor(params, seen), np.random.default_rng(0)

    def ours() -> int:
        return next_token(processor.process(logits_V) if processor.is_needed else logits_V, params, rng)

    if params.temperature == 0.0:
        return {"trt-kv": ours}
    return {
        "trt-kv": ours,
        "sort": lambda: _sorted_choice(logits_V, params, rng),
        "transformers": _theirs(logits_V, params, seen),
    }


def _processor(params: SamplingParams, seen: list[int]) -> LogitsProcessor:
    processor = LogitsProcessor(params, seen[: N_SEEN // 2])
    for token_id in seen[N_SEEN // 2 :]:
        processor.accept(token_id)
    return processor


def _sorted_choice(logits_V: Floats, params: SamplingParams, rng: np.random.Generator) -> int:
    """Temperature, top-k and top-p by a stable sort of the whole vocabulary; what trt-kv did before."""
    order = np.argsort(-logits_V, kind="stable")
    order = order[: params.top_k] if params.top_k else order
    probabilities = np.exp((logits_V[order].astype(np.float64) - logits_V[order[0]]) / params.temperature)
    probabilities /= probabilities.sum()
    probabilities *= np.cumsum(probabilities) - probabilities < params.top_p
    return int(rng.choice(order, p=probabilities / probabilities.sum()))


def _theirs(logits_V: Floats, params: SamplingParams, seen: list[int]) -> Callable[[], object]:
    import torch

    processors, ids, scores = _processors(params), torch.tensor([seen]), torch.from_numpy(logits_V)[None]

    def choose() -> object:
        left = scores
        for process in processors:
            left = process(ids, left)
        return torch.multinomial(torch.softmax(left, dim=-1), 1)

    return choose


def _processors(params: SamplingParams) -> list[Any]:
    """transformers' processors of the same parameters; it has no presence and frequency penalty."""
    from transformers.generation import logits_process as of

    found: list[Any] = []
    if params.repetition_penalty != 1.0:
        found.append(of.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found.append(of.TemperatureLogitsWarper(params.temperature or 1.0))
    found += [of.TopKLogitsWarper(params.top_k)] if params.top_k else []
    found += [of.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    found += [of.MinPLogitsWarper(params.min_p)] if params.min_p else []
    found += [of.TypicalLogitsWarper(mass=params.typical_p)] if params.typical_p < 1 else []
    return found


def _check(what: str, logits_V: Floats, params: SamplingParams, seen: list[int]) -> Check:
    """The probabilities are transformers', without the penalties that it lacks."""
    import torch

    if params.temperature == 0.0:
        return check_close(
            what,
            np.array(float(next_token(logits_V, params, np.random.default_rng(0)))),
            np.array(float(logits_V.argmax())),
            within=0.0,
        )
    shared = dataclasses.replace(params, presence_penalty=0.0, frequency_penalty=0.0)
    left = candidates_of(_processor(shared, seen).process(logits_V), shared)
    found_V = np.zeros(len(logits_V))
    found_V[slice(None) if left.ids is None else left.ids] = left.weights
    scores = torch.from_numpy(logits_V.astype(np.float64))[None]
    for process in _processors(shared):
        scores = process(torch.tensor([seen]), scores)
    expected_V = torch.softmax(scores, dim=-1)[0].numpy()
    return check_close(what, found_V / found_V.sum(), expected_V, within=rounded(5e-3 * expected_V.max() + 1e-5))
