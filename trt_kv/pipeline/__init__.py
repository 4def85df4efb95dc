"""From a checkpoint to an evaluated engine, for Python callers and the command line.

Each function takes one request and two callbacks: ``on_progress(stage, done, total)`` and ``on_note(text)``. It prints nothing,
installs no signal handlers and raises the errors of ``trt_kv.errors``. Importing this package loads nothing heavy.

Example::

    from pathlib import Path

    from trt_kv.pipeline import BuildRequest, EvaluationRequest, ModelSource, build_engine, evaluate
    from trt_kv.policies import policy_from_name

    source, policy = ModelSource(model="llama3"), policy_from_name("prefixkv")
    engine = build_engine(BuildRequest(source=source, policy=policy, out=Path("engines/first")), on_note=print)
    evaluation = evaluate(EvaluationRequest(engine=engine, tasks=Path("examples/evaluate/tasks.jsonl")))
"""

from trt_kv.pipeline.advice import Advice, MeasuredMachine, MeasuredPolicy, PolicyAdvice, WeightSize
from trt_kv.pipeline.advise import AdviceRequest, advise
from trt_kv.pipeline.build import build_engine
from trt_kv.pipeline.calibrate import RecipeFiles, calibrate_drift, calibrate_recipe
from trt_kv.pipeline.callbacks import OnNote, OnProgress
from trt_kv.pipeline.chat import Conversation
from trt_kv.pipeline.environment import Finding, State, examine
from trt_kv.pipeline.evaluation import evaluate
from trt_kv.pipeline.export import export_graphs
from trt_kv.pipeline.handover import calibrate_queries, hand_over
from trt_kv.pipeline.plans import (
    CalibrationPlan,
    DeviceChoice,
    DriftPlan,
    ModelSource,
    ResourceChoice,
    TargetPlan,
    WeightPlan,
)
from trt_kv.pipeline.prefixes import PrefixRemoval, list_prefixes, remove_prefixes
from trt_kv.pipeline.requests import BuildRequest, DriftRequest, EvaluationRequest, ExportRequest, RecipeRequest

__all__ = [
    "Advice",
    "AdviceRequest",
    "BuildRequest",
    "CalibrationPlan",
    "Conversation",
    "DeviceChoice",
    "DriftPlan",
    "DriftRequest",
    "EvaluationRequest",
    "ExportRequest",
    "Finding",
    "MeasuredMachine",
    "MeasuredPolicy",
    "ModelSource",
    "OnNote",
    "OnProgress",
    "PolicyAdvice",
    "PrefixRemoval",
    "RecipeFiles",
    "RecipeRequest",
    "ResourceChoice",
    "State",
    "TargetPlan",
    "WeightPlan",
    "WeightSize",
    "advise",
    "build_engine",
    "calibrate_drift",
    "calibrate_queries",
    "calibrate_recipe",
    "evaluate",
    "examine",
    "export_graphs",
    "hand_over",
    "list_prefixes",
    "remove_prefixes",
]
