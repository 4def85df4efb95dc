"""Accuracy of policies on the user's tasks against bytes and time: what is worth its memory, and a recommendation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from trt_kv.errors import UsageError
from trt_kv.kv_memory import token_bytes
from trt_kv.manifest import load_manifest
from trt_kv.pipeline.advice import Advice, MeasuredPolicy
from trt_kv.pipeline.advice_model import Subject
from trt_kv.pipeline.build import build_engine
from trt_kv.pipeline.callbacks import OnNote, OnProgress
from trt_kv.pipeline.destinations import check_new_file
from trt_kv.pipeline.evaluation import evaluate
from trt_kv.pipeline.plans import ModelSource, ResourceChoice, TargetPlan, WeightPlan
from trt_kv.pipeline.requests import BuildRequest, EvaluationRequest
from trt_kv.policies import policy_from_name
from trt_kv.presets import PRESETS

DEFAULT_POLICIES = ("full", "prefixkv", "snapkv", "h2o", "streamingllm", "freekv")
"""Compared unless others are named: one of each kind."""
PICTURE = "advice.png"


def measured_on_tasks(
    advice: Advice,
    subject: Subject,
    *,
    tasks: Path,
    out: Path,
    policies: Sequence[str],
    limit: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Advice:
    """``advice`` with each policy's answers to ``tasks``, and a recommendation. Engines, answers and a picture are written into
    the folder ``out``, where the same call finds them again.
    """
    from trt_kv.calibration.answer_files import summary_of
    from trt_kv.calibration.pareto_plot import picture_from_policies

    if subject.engine is not None:
        raise UsageError(
            "tasks compare policies, and engines with these are built from a checkpoint",
            got=str(subject.engine[0]),
            fix="name the checkpoint; for one engine, trt-kv evaluate",
        )
    picture = out / PICTURE
    check_new_file(picture, "--out")
    is_preset = subject.source in PRESETS
    model, checkpoint = (subject.source, None) if is_preset else (next(iter(PRESETS)), subject.source)
    found = []
    for name in policies or DEFAULT_POLICIES:
        request = BuildRequest(
            source=ModelSource(model=model, checkpoint=checkpoint),
            policy=policy_from_name(name),
            target=TargetPlan(kv_dtype=advice.kv_dtype, page_size=subject.page_size),
            weights=WeightPlan(quant=advice.quant),
            out=out / name,
        )
        engine = build_engine(request, on_progress=on_progress, on_note=on_note)
        evaluation = evaluate(
            EvaluationRequest(
                engine=engine,
                tasks=tasks,
                match="contains",
                batch_size=1,
                limit=limit,
                out=out / f"{name}.json",
                resources=ResourceChoice(),
            ),
            on_progress=on_progress,
            on_note=on_note,
        )
        score, config = summary_of(evaluation)["overall"], load_manifest(engine).config
        kept = [sum(answer.kept_tokens) for answer in evaluation.run.answers]
        accuracy = score["accuracy"]
        found.append(
            MeasuredPolicy(
                name=name,
                n_tasks=score["n_tasks"],
                accuracy=accuracy["value"],
                accuracy_low=accuracy["low"],
                accuracy_high=accuracy["high"],
                cache_bytes=round(sum(kept) / len(kept) * token_bytes(config, advice.kv_dtype)),
                seconds_per_task=score["seconds_per_task"],
                fits=next((one.fits for one in advice.policies if one.name == name), True),
            )
        )
    measured = tuple(dataclasses.replace(one, on_front=is_on_front(one, found)) for one in found)
    picture_from_policies(measured, picture, title=f"{advice.model}, {tasks.name}")
    return dataclasses.replace(advice, measured=measured, recommendation=recommended(measured), picture=str(picture))


def is_on_front(one: MeasuredPolicy, policies: Sequence[MeasuredPolicy]) -> bool:
    """Whether no other policy is at least as good in accuracy, bytes and time, and better in one of them."""

    def goods(policy: MeasuredPolicy) -> tuple[float, float, float]:
        return policy.accuracy, -policy.cache_bytes, -policy.seconds_per_task

    mine = goods(one)
    return not any(all(b >= a for a, b in zip(mine, goods(other), strict=True)) and goods(other) != mine for other in policies)


def recommended(policies: Sequence[MeasuredPolicy]) -> str | None:
    """Of the policies that fit, the one with the fewest bytes whose accuracy may be that of the best one: its 95 % interval
    contains the best accuracy. None if none fits.
    """
    fitting = [policy for policy in policies if policy.fits]
    if not fitting:
        return None
    best = max(policy.accuracy for policy in fitting)
    good = [policy for policy in fitting if policy.accuracy_high >= best]
    return min(good, key=lambda policy: (policy.cache_bytes, policy.seconds_per_task)).name
