"""Wires export, calibration and runtime together; the only place that knows all three.

Heavy imports stand inside the functions, because the commands import this module.
"""

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trt_kv.cli.progress import OnProgress, progress_bars
from trt_kv.cli.termination import termination_unwinds
from trt_kv.drift import Drift, drift_settings
from trt_kv.errors import EngineError, UsageError
from trt_kv.manifest import FILE_NAME as MANIFEST_FILE
from trt_kv.manifest import digest_of, load_manifest, verify_files
from trt_kv.pipeline.calibration_runs import drift_from_prompts, recipe_from_prompts, recipe_model
from trt_kv.pipeline.plans import (
    DEFAULT_PAGE_SIZE,
    CalibrationPlan,
    DriftPlan,
    GenerationRequest,
    ModelSource,
    RunOptions,
    TargetPlan,
)
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy
from trt_kv.policy_settings import DEFAULT_KEPT, SHARED_BUDGETS, differences, setting_as_text
from trt_kv.presets import is_bundled
from trt_kv.profiles import DEFAULT as DEFAULT_PROFILE
from trt_kv.profiles import build_profile
from trt_kv.recipe import CREATED_BY, Recipe, recipe_from_published, recipe_score
from trt_kv.require import require_tensorrt

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.huggingface import Checkpoint
    from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
    from trt_kv.runtime.recall.statistics import RecallStatistics


def build_engine(
    *,
    source: ModelSource,
    policy: Policy,
    recipe: Path | None,
    drift: DriftPlan,
    calibration: CalibrationPlan,
    target: TargetPlan,
    out: Path,
    replace: bool,
) -> Path:
    """Build the engine at ``out``, calibrating first what the policy needs and is not given: a recipe, drift thresholds.

    An engine that stands there already and was made by the same command from the same weights is left as it is.
    """
    from trt_kv.export import engine
    from trt_kv.export.new_folder import check_destination

    options = _tensorrt_options(target)
    drift = dataclasses.replace(drift, page_size=target.page_size)
    if not (out / MANIFEST_FILE).is_file():
        check_destination(out, replace=replace)
    checkpoint = _open(source)
    command_line = _command_line(source, policy, recipe, drift, calibration, target)
    reads_files = any(path is not None for path in (recipe, drift.file, calibration.prompts))
    if not replace and not reads_files and _is_built(out, command_line, checkpoint):
        click.echo(f"{out} is up to date", err=True)
        return out
    check_destination(out, replace=replace)
    loaded = Recipe.load(recipe) if recipe is not None else None
    if loaded is not None:
        policy = _policy_of_recipe(policy, loaded)
    thresholds = _loaded_drift(policy, drift)
    with termination_unwinds(), progress_bars() as on_progress, tempfile.TemporaryDirectory() as scratch:
        pictures = []
        if policy.needs_recipe:
            from trt_kv.calibration.recipe_plot import picture_from_recipe

            loaded = loaded or _calibrated(checkpoint, policy, calibration, on_progress)
            pictures.append(Path(scratch) / "recipe.png")
            picture_from_recipe(loaded, pictures[-1])
        if policy.needs_drift:
            from trt_kv.calibration.drift_plot import picture_from_drift

            thresholds = thresholds or _measured(checkpoint, policy, calibration, drift, loaded, on_progress)
            pictures.append(Path(scratch) / "drift.png")
            picture_from_drift(thresholds, pictures[-1])
        request = engine.EngineRequest(
            checkpoint=checkpoint,
            policy=policy,
            recipe=loaded,
            drift=thresholds,
            dtype=target.dtype or "float32",
            page_size=target.page_size,
            tensorrt=options,
            model_source=source.checkpoint or f"bundled {source.model}",
            reproduce=command_line,
        )
        engine.build_engine(request, out, replace=replace, on_progress=on_progress, extra_files=pictures)
    return out


def calibrate_recipe(
    *,
    source: ModelSource,
    policy: Policy,
    calibration: CalibrationPlan,
    from_published: Path | None,
    to_published: Path | None,
    out: Path,
) -> Path:
    """Write a recipe to ``out`` and its picture beside it; optionally also in the published form."""
    from trt_kv.calibration.recipe_plot import picture_from_recipe

    picture = _picture_beside(out, "recipe")
    for folder in {out.parent, to_published or out.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _open(source)
    if from_published is not None:
        recipe = recipe_from_published(from_published, model=recipe_model(checkpoint), score=recipe_score(policy))
        _policy_of_recipe(policy, recipe)
    else:
        with progress_bars() as on_progress:
            recipe = _calibrated(checkpoint, policy, calibration, on_progress)
    recipe.save(out)
    picture_from_recipe(recipe, picture)
    if to_published is not None:
        click.echo(f"published form: {recipe.to_published(to_published)}")
    return out


def calibrate_drift(
    *,
    source: ModelSource,
    policy: Policy,
    calibration: CalibrationPlan,
    drift: DriftPlan,
    recipe: Path | None,
    out: Path,
) -> Path:
    """Write drift thresholds to ``out`` and their picture beside it, measured under ``recipe`` where the policy needs one."""
    from trt_kv.calibration.drift_plot import picture_from_drift

    picture = _picture_beside(out, "thresholds")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = _open(source)
    loaded = Recipe.load(recipe) if recipe is not None else None
    if loaded is not None:
        loaded.check_model(digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
        policy = _policy_of_recipe(policy, loaded)
    with progress_bars() as on_progress:
        if policy.needs_recipe:
            loaded = loaded or _calibrated(checkpoint, policy, calibration, on_progress)
        thresholds = _measured(checkpoint, policy, calibration, drift, loaded, on_progress)
    thresholds.save(out)
    picture_from_drift(thresholds, picture)
    return out


def export_graphs(*, source: ModelSource, policy: Policy, recipe: Path | None, drift: DriftPlan, out: Path) -> list[Path]:
    """Write the monolithic graphs into the new folder ``out`` and return their paths."""
    from trt_kv.export import engine
    from trt_kv.export.new_folder import new_folder

    loaded = Recipe.load(recipe) if recipe is not None else None
    checkpoint = _open(source)
    if loaded is not None:
        policy = _policy_of_recipe(policy, loaded)
    thresholds = _loaded_drift(policy, drift)
    request = engine.EngineRequest(checkpoint=checkpoint, policy=policy, recipe=loaded, drift=thresholds)
    with termination_unwinds(), progress_bars() as on_progress, new_folder(out) as folder:
        engine.export_graphs(request, folder, on_progress)
    return sorted(out.glob("*.onnx"))


def stream_text(
    *, engine: Path, request: GenerationRequest, running: RunOptions, on_end: Callable[[str], None]
) -> Iterator[str]:
    """Pieces of generated text; ``on_end`` is given lines that say what it took."""
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.trace import NO_TRACE, Trace

    trace = NO_TRACE if running.trace is None else Trace()
    options = dataclasses.asdict(request)
    prompt = options.pop("prompt")
    with progress_bars() as on_progress:
        loaded = Engine.load(engine, host_tier=running.host_tier, trace=trace, on_progress=on_progress, **running.on.options)
        n_prompt = len(loaded.encode(prompt))
        stream = loaded.stream(prompt, on_prefill=lambda done: on_progress("reading the prompt", done, n_prompt), **options)
        first = next(stream, "")
    yield first
    yield from stream
    result = stream.result
    held, seen = _mean(result.kv_tokens), result.n_seen
    exempt = loaded.manifest.policy.exempt_layers
    others = [n for layer, n in enumerate(result.kv_tokens) if layer not in exempt]
    told = f", {_mean(others) / seen:.0%} in layers that are not exempt" if exempt and others else ""
    on_end(
        f"[{result.n_prompt_tokens} prompt tokens, {len(result.token_ids)} generated, finished: {result.finish_reason}; "
        f"KV cache holds {held:.0f} of {seen} tokens per layer ({held / seen:.0%}{told})]"
    )
    if not running.on.on_host:
        on_end(f"[run by {loaded.runner.description}]")
    if loaded.runner.recall is not None:
        on_end(_told_recall(loaded.runner.recall.statistics, len(result.token_ids)))
    loaded.close()
    if running.trace is not None:
        trace.save(running.trace)
        on_end(f"[trace: {running.trace}, for chrome://tracing or ui.perfetto.dev]")


def _told_recall(counts: "RecallStatistics", n_generated: int) -> str:
    moved = counts.moved_bytes / max(1, n_generated) / 2**10
    return (
        f"[recalled {moved:.0f} KiB per token from the host; {counts.head_rate:.0%} of KV heads drifted and were corrected, in "
        f"{counts.layer_step_rate:.0%} of layer-steps; waited {counts.waited_ms:.0f} ms for copies]"
    )


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts)


def _open(source: ModelSource) -> "Checkpoint":
    from trt_kv.export.checkpoints.hub import resolve_checkpoint
    from trt_kv.export.checkpoints.huggingface import open_checkpoint

    folder = resolve_checkpoint(source.model, source.checkpoint)
    if source.checkpoint is None:
        click.echo(f"no CHECKPOINT given: using the small {source.model} checkpoint that comes with trt-kv", err=True)
    return open_checkpoint(folder)


def _picture_beside(out: Path, what: str) -> Path:
    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError(f"the picture would overwrite the {what}", got=f"--out {out}", expected="a name that ends in .json")
    return picture


def _calibrated(checkpoint: "Checkpoint", policy: Policy, plan: CalibrationPlan, on_progress: OnProgress) -> Recipe:
    _tell_what_prompts(checkpoint, plan)
    return recipe_from_prompts(checkpoint, policy, plan, on_progress)


def _measured(
    checkpoint: "Checkpoint",
    policy: Policy,
    plan: CalibrationPlan,
    drift: DriftPlan,
    recipe: Recipe | None,
    on_progress: OnProgress,
) -> Drift:
    _tell_what_prompts(checkpoint, plan)
    return drift_from_prompts(checkpoint, policy, plan, drift, recipe, on_progress)


def _tell_what_prompts(checkpoint: "Checkpoint", plan: CalibrationPlan) -> None:
    if plan.prompts is None and not is_bundled(checkpoint.folder):
        click.echo("no PROMPTS given: calibrating on trt-kv's synthetic English; prompts like your users' are better", err=True)


def _loaded_drift(policy: Policy, plan: DriftPlan) -> Drift | None:
    """The thresholds in the file of ``plan``, if it names one. Raises ``UsageError`` where another rate is asked for."""
    if plan.file is None:
        return None
    loaded = Drift.load(plan.file)
    if plan.rate is not None and plan.rate != loaded.correction_rate:
        raise UsageError(
            "the thresholds were made for another correction rate",
            got=f"--correction-rate {plan.rate}",
            expected=loaded.correction_rate,
            fix="leave --correction-rate out, or calibrate again",
        )
    measured, wanted = (dataclasses.asdict(s) for s in (loaded.settings, drift_settings(policy, loaded.settings.page_size)))
    changed = [name for name in wanted if measured[name] != wanted[name]]
    if changed:
        told = ", ".join(f"{name} {measured[name]}" for name in changed)
        click.echo(f"the thresholds were measured with {told}: rates of correction may be others here", err=True)
    return loaded


def _policy_of_recipe(policy: Policy, recipe: Recipe) -> Policy:
    """``policy`` with the recipe's budget. Raises ``UsageError`` where the command line asks for another one."""
    preset = policy_from_name(policy.name) if policy.name in policy_names() else None
    default = preset.kept if preset is not None and preset.budget in SHARED_BUDGETS else DEFAULT_KEPT
    if (preset is None or policy.kept != default) and abs(policy.kept - recipe.budget) > 1e-6:
        raise UsageError(
            "the recipe was made for another budget",
            got=f"--budget {policy.kept}",
            expected=recipe.budget,
            fix="leave --budget out",
        )
    if recipe_score(policy) != recipe.score and not policy.recalls:
        score = recipe.score
        settings = [f"score={score.name}", *([f"window={score.window}"] if score.window else [])]
        settings += [f"heads={score.heads}", f"pooling={score.pooling}"]
        click.echo(
            f"the recipe's shares were found with {score.described}, this policy ranks by {policy.score}; "
            f"to rank as the recipe does, add --set {' '.join(settings)}",
            err=True,
        )
    return dataclasses.replace(policy, kept=recipe.budget)


def _is_built(folder: Path, command_line: str, checkpoint: "Checkpoint") -> bool:
    """Whether ``folder`` holds a whole engine made by this version, by this command, from these weights and settings."""
    try:
        manifest = load_manifest(folder)
        verify_files(folder, manifest)
    except EngineError:
        return False
    made = (manifest.reproduce, manifest.created_by, manifest.model_digest)
    copied = {path.name: digest_of(path) for path in checkpoint.tokenizer_files}
    recorded = {name: manifest.files[name].digest for name in copied if name in manifest.files}
    return made == (command_line, CREATED_BY, checkpoint.digest) and recorded == copied


def _tensorrt_options(target: TargetPlan) -> "TensorRtOptions | None":
    """How to compile for TensorRT; raises before anything is read where TensorRT is not installed or the profile is none."""
    from trt_kv.export.targets.tensorrt_profile import TensorRtOptions

    if target.target != "tensorrt":
        return None
    profile = build_profile(target.profile or DEFAULT_PROFILE)
    require_tensorrt()
    return TensorRtOptions(profile=profile, timing_cache=target.timing_cache)


def _command_line(
    source: ModelSource, policy: Policy, recipe: Path | None, drift: DriftPlan, plan: CalibrationPlan, target: TargetPlan
) -> str:
    """The command that builds the same engine again."""
    words: list[str | Path | int | float] = ["trt-kv", "build", "--model", source.model]
    words += ["--checkpoint", source.checkpoint] if source.checkpoint else []
    words += ["--policy", policy.name]
    words += ["--budget", policy.kept] if policy.budget in SHARED_BUDGETS and recipe is None else []
    words += ["--score", policy.score] if policy.evicts else []
    words += ["--window", policy.window] if policy.score == "window" else []
    changed = differences(policy, policy_from_name(policy.name)) if policy.name in policy_names() else {}
    settings = [setting_as_text(name, value) for name, value in changed.items() if name not in ("kept", "score", "window")]
    words += ["--set", *settings] if settings else []
    words += ["--recipe", recipe] if recipe is not None else []
    if policy.needs_drift and drift.file is not None:
        words += ["--drift", drift.file]
    elif policy.needs_drift:
        words += ["--correction-rate", drift.correction_rate, "--new-tokens", drift.new_tokens]
    if (policy.needs_recipe and recipe is None) or (policy.needs_drift and drift.file is None):
        words += ["--samples", plan.samples, "--seed", plan.seed]
        words += ["--prompts", plan.prompts] if plan.prompts else []
    words += ["--target", target.target] if target.target != "onnxruntime" else []
    words += ["--profile", target.profile] if target.profile else []
    words += ["--dtype", target.dtype] if target.dtype else []
    words += ["--page-size", target.page_size] if target.page_size != DEFAULT_PAGE_SIZE else []
    return shlex.join(str(word) for word in words)
