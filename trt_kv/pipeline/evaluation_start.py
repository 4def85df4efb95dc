"""The state of an evaluation before its first new answer: all checks of the request are made here."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import trt_kv
from trt_kv.calibration.prompt_files import ChatPrompt
from trt_kv.calibration.task_files import tasks_from_file
from trt_kv.digests import digest_of
from trt_kv.errors import ReportError, UsageError
from trt_kv.manifest import TOKENIZER_FILE, Manifest, load_manifest
from trt_kv.pipeline.requests import EvaluationRequest
from trt_kv.require import require
from trt_kv.runtime.backends.devices import DENSE, device_from_name

if TYPE_CHECKING:
    from trt_kv.calibration.answer_files import EngineFacts, Evaluation, Run, Settings
    from trt_kv.calibration.task_cases import TaskCase


def begin(request: EvaluationRequest) -> tuple["Evaluation", list["TaskCase"]]:
    """The evaluation before its first answer, and its cases."""
    from trt_kv.calibration.answer_files import Evaluation, Run, Settings
    from trt_kv.calibration.task_cases import CaseRules, cases_from_tasks
    from trt_kv.runtime.chat import chat_encoder_of_engine
    from trt_kv.runtime.text.tokenizer import tokenizer_of_engine

    device_from_name(request.on.device)
    manifest = load_manifest(request.engine, digest=request.digest)
    settings = Settings(
        tasks_digest=digest_of(request.tasks),
        match=request.match,
        max_new_tokens=request.max_new_tokens,
        separator=request.separator,
        trt_kv=trt_kv.__version__,
    )
    tasks = tasks_from_file(request.tasks)[: request.limit]
    facts = _engine_facts(request.engine, manifest, request)
    evaluation = Evaluation(
        tasks=request.tasks.name,
        n_tasks=len(tasks),
        settings=settings,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        run=Run(engine=facts),
        against=_other_run(request, facts, settings, len(tasks)),
    )
    tokenizer = tokenizer_of_engine(request.engine, manifest)
    rules = CaseRules(
        separator=request.separator,
        contains=request.match == "contains",
        max_new_tokens=request.max_new_tokens,
        max_positions=manifest.config.max_positions,
        vocab_size=manifest.config.vocab_size,
    )
    has_chats = any(isinstance(task.prompt, ChatPrompt) for task in tasks)
    chat = chat_encoder_of_engine(request.engine, manifest, tokenizer) if has_chats else None
    return evaluation, cases_from_tasks(tasks, tokenizer, rules, source=request.tasks, chat=chat)


def _engine_facts(folder: Path, manifest: Manifest, request: EvaluationRequest) -> "EngineFacts":
    """Raises ``EngineError`` if loading the engine would, except for changed files."""
    from trt_kv.calibration.answer_files import EngineFacts
    from trt_kv.runtime.backends.host.dense import chosen_dense
    from trt_kv.runtime.compatibility import check_compatible

    check_compatible(folder, manifest)
    on = request.on
    library = chosen_dense(folder, manifest, on.dense) if on.on_host else on.dense or DENSE[0]
    module = {"onnxruntime": "trt_kv.runtime.backends.onnx_runtime", "native": "numba"}.get(library, library)
    version = require(module).ort.__version__ if library == "onnxruntime" else require(module).__version__
    precision = f", {on.precision}" if on.precision is not None else ""
    runs_on = manifest.plan.built_by if manifest.plan is not None else f"{library} {version}{precision}"
    kv_dtype = request.resources.kv_dtype or manifest.kv_dtype
    stored = "" if kv_dtype == manifest.dtype else f", KV cache in {kv_dtype}"
    return EngineFacts(
        name=folder.resolve().name,
        digest=manifest.to_json()["digest"],
        model_name=manifest.model_name,
        model_digest=manifest.model_digest,
        tokenizer_digest=manifest.files[TOKENIZER_FILE].digest,
        policy=manifest.policy,
        target=manifest.target,
        dtype=on.dtype or manifest.dtype,
        runs_on=f"{runs_on}{stored}" if on.on_host else f"{runs_on} on {on.device}",
        windows=manifest.config.windows,
        heads_apart=manifest.heads_apart,
    )


def _other_run(request: EvaluationRequest, facts: "EngineFacts", settings: "Settings", n_tasks: int) -> "Run | None":
    """The run to compare with: of an engine, without answers yet, or the first run of a finished results file; None without
    one.
    """
    from trt_kv.calibration.answer_files import Run

    path = request.against
    if path is None:
        return None
    if path.is_file():
        run = _run_of_file(path, settings, n_tasks)
    else:
        run = Run(engine=_engine_facts(path, load_manifest(path), request))
    for what, mine, theirs in (
        ("models", facts.model_digest, run.engine.model_digest),
        ("tokenizers", facts.tokenizer_digest, run.engine.tokenizer_digest),
    ):
        if mine != theirs:
            raise UsageError(
                f"the two engines have different {what}",
                got=f"{facts.name}: {facts.model_name}, {mine}; {run.engine.name}: {run.engine.model_name}, {theirs}",
                expected="one checkpoint, built with two policies",
                fix="build the other engine from the same checkpoint, e.g. with --policy full",
            )
    return run


def _run_of_file(path: Path, settings: "Settings", n_tasks: int) -> "Run":
    from trt_kv.calibration.answer_files import Evaluation

    found = Evaluation.load(path)
    _check_same_settings(path, found.settings, settings)
    if len(found.run.answers) < n_tasks:
        raise UsageError(
            f"{path} does not have all answers that are to be compared with",
            got=len(found.run.answers),
            expected=n_tasks,
            fix="finish it first, or name its engine instead",
        )
    return dataclasses.replace(found.run, answers=found.run.answers[:n_tasks])


def earlier_of(request: EvaluationRequest, evaluation: "Evaluation") -> "Evaluation | None":
    """The evaluation at ``request.out`` to continue, if any; ``UsageError`` if something else is there."""
    from trt_kv.calibration.answer_files import Evaluation

    if request.out is None or not os.path.lexists(request.out):
        return None
    try:
        earlier = Evaluation.load(request.out)
    except ReportError as cause:
        raise UsageError(
            f"{request.out} exists already and is not an evaluation", got=cause.what, fix="choose another --out"
        ) from cause
    if request.force:
        return None
    fix = "choose another --out, or --force to evaluate again"
    _check_same_settings(request.out, earlier.settings, evaluation.settings, fix=fix)
    for name, before, now in (
        ("engine", earlier.run, evaluation.run),
        ("engine to compare with", earlier.against, evaluation.against),
    ):
        got, asked = ("none" if run is None else _told(run.engine) for run in (before, now))
        if before is not None and got != asked:
            raise UsageError(f"{request.out} has another {name}", got=got, expected=asked, fix=fix)
    if max(len(run.answers) for run in earlier.runs) > evaluation.n_tasks:
        raise UsageError(
            f"{request.out} has more answers than requested",
            got=f"{earlier.n_tasks} tasks",
            expected=f"at most {evaluation.n_tasks}",
            fix=fix,
        )
    return earlier


def _told(facts: "EngineFacts") -> str:
    """The properties of an engine that answers depend on."""
    return f"{facts.digest}, {facts.dtype}, {facts.runs_on}"


def _check_same_settings(
    path: Path, found: "Settings", asked: "Settings", *, fix: str = "use the same tasks and options"
) -> None:
    names = [field.name for field in dataclasses.fields(asked)]
    different = [name for name in names if getattr(found, name) != getattr(asked, name)]
    if different:
        raise UsageError(
            f"{path} was made from other tasks or with other options",
            got=", ".join(f"{name} {getattr(found, name)!r}" for name in different),
            expected=", ".join(f"{name} {getattr(asked, name)!r}" for name in different),
            fix=fix,
        )


def joined(evaluation: "Evaluation", earlier: "Evaluation") -> "Evaluation":
    """``evaluation`` with the answers of ``earlier``."""
    against = evaluation.against
    if against is not None and earlier.against is not None and len(earlier.against.answers) > len(against.answers):
        against = earlier.against
    return dataclasses.replace(evaluation, run=earlier.run, against=against)
