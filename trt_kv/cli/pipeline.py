"""Wires export, calibration and runtime together; the only place that knows all three.

Heavy imports stand inside the functions, because the commands import this module.
"""

import dataclasses
import math
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trt_kv.cli.progress import OnProgress, progress_bars
from trt_kv.cli.requests import CalibrationPlan, GenerationRequest, ModelSource, TargetPlan
from trt_kv.cli.termination import termination_unwinds
from trt_kv.errors import CheckpointError, EngineError, UsageError
from trt_kv.manifest import FILE_NAME as MANIFEST_FILE
from trt_kv.manifest import digest_of, load_manifest, verify_files
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy
from trt_kv.policy_settings import SHARED_BUDGETS, differences, setting_as_text
from trt_kv.presets import is_bundled
from trt_kv.recipe import CREATED_BY, Protected, Recipe, RecipeModel, recipe_from_published, recipe_score
from trt_kv.require import require_tensorrt

if TYPE_CHECKING:
    import torch

    from trt_kv.calibration.prefixkv import Importance
    from trt_kv.export.checkpoint import Checkpoint
    from trt_kv.export.tensorrt_profile import TensorRtOptions

CALIBRATION_TOKENS = 1024


def build_engine(
    *,
    source: ModelSource,
    policy: Policy,
    recipe: Path | None,
    calibration: CalibrationPlan,
    target: TargetPlan,
    out: Path,
    replace: bool,
) -> Path:
    """Build the engine at ``out``, calibrating a recipe first where the policy needs one and none is given.

    An engine that stands there already and was made by the same command from the same weights is left as it is.
    """
    from trt_kv.export import engine
    from trt_kv.export.new_folder import check_destination

    options = _tensorrt_options(target)
    if not (out / MANIFEST_FILE).is_file():
        check_destination(out, replace=replace)
    checkpoint = _open(source)
    command_line = _command_line(source, policy, recipe, calibration, target)
    if not replace and recipe is None and calibration.prompts is None and _is_built(out, command_line, checkpoint):
        click.echo(f"{out} is up to date", err=True)
        return out
    check_destination(out, replace=replace)
    loaded = Recipe.load(recipe) if recipe is not None else None
    if loaded is not None:
        policy = _policy_of_recipe(policy, loaded)
    with termination_unwinds(), progress_bars() as on_progress, tempfile.TemporaryDirectory() as scratch:
        pictures = []
        if policy.needs_recipe:
            from trt_kv.calibration.recipe_plot import picture_from_recipe

            loaded = loaded or _calibrated(checkpoint, policy, calibration, on_progress)
            pictures = [Path(scratch) / "recipe.png"]
            picture_from_recipe(loaded, pictures[0])
        request = engine.EngineRequest(
            checkpoint=checkpoint,
            policy=policy,
            recipe=loaded,
            dtype=target.dtype or "float32",
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

    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError("the picture would overwrite the recipe", got=f"--out {out}", expected="a name that ends in .json")
    for folder in {out.parent, to_published or out.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _open(source)
    if from_published is not None:
        recipe = recipe_from_published(from_published, model=_recipe_model(checkpoint), score=recipe_score(policy))
        _policy_of_recipe(policy, recipe)
    else:
        with progress_bars() as on_progress:
            recipe = _calibrated(checkpoint, policy, calibration, on_progress)
    recipe.save(out)
    picture_from_recipe(recipe, picture)
    if to_published is not None:
        click.echo(f"published form: {recipe.to_published(to_published)}")
    return out


def export_graphs(*, source: ModelSource, policy: Policy, recipe: Path | None, out: Path) -> list[Path]:
    """Write the monolithic graphs into the new folder ``out`` and return their paths."""
    from trt_kv.export import engine
    from trt_kv.export.new_folder import new_folder

    loaded = Recipe.load(recipe) if recipe is not None else None
    checkpoint = _open(source)
    if loaded is not None:
        policy = _policy_of_recipe(policy, loaded)
    request = engine.EngineRequest(checkpoint=checkpoint, policy=policy, recipe=loaded)
    with termination_unwinds(), progress_bars() as on_progress, new_folder(out) as folder:
        engine.export_graphs(request, folder, on_progress)
    return sorted(out.glob("*.onnx"))


def stream_text(*, engine: Path, request: GenerationRequest, on_end: Callable[[str], None]) -> Iterator[str]:
    """Pieces of generated text; ``on_end`` is given one line that says what it took."""
    from trt_kv.runtime.engine import Engine

    options = dataclasses.asdict(request)
    prompt = options.pop("prompt")
    with progress_bars() as on_progress:
        loaded = Engine.load(engine, on_progress=on_progress)
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


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts)


def importance_of(checkpoint: "Checkpoint", policy: Policy, max_tokens: int, page_size: int = 32) -> "Importance":
    """A scorer that runs prompts of up to ``max_tokens`` through the torch decoder and the ops that score at run time.

    It ranks as the recipe for ``policy`` does (``recipe_score``), in every layer.
    """
    from trt_kv.export.decoder import decoder_from_checkpoint
    from trt_kv.program import PHASES, program_of
    from trt_kv.runtime.executors.torch_decoder import TorchDecoderExecutor
    from trt_kv.runtime.kv_pool import KvPool
    from trt_kv.runtime.model_runner import ModelRunner

    config = checkpoint.config
    n_pages = config.n_layers * -(-max_tokens // page_size)
    pool = KvPool(n_pages=n_pages, page_size=page_size, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
    scale = config.head_dim**-0.5
    score = recipe_score(policy)
    scoring = Policy(
        name="scoring",
        summary="",
        score=score.name,
        budget="uniform",
        window=score.window or policy.window,
        heads=score.heads,
        pooling=score.pooling,
    )
    programs = {
        phase: program_of(scoring, phase=phase, n_layers=config.n_layers, scale=scale, page_size=page_size) for phase in PHASES
    }
    decoder = decoder_from_checkpoint(checkpoint, _calibration_dtype(checkpoint))
    return ModelRunner(TorchDecoderExecutor(decoder), pool, programs).importance


def _calibration_dtype(checkpoint: "Checkpoint") -> "torch.dtype":
    """fp32 where the weights then fit into half of the free memory; else the checkpoint's own type, mapped from its files."""
    import torch

    from trt_kv.runtime.memory import available_bytes

    n_weights = sum(math.prod(shape) for shape in checkpoint.config.tensor_shapes().values())
    return torch.float32 if 4 * n_weights < available_bytes() // 2 else checkpoint.tensor(checkpoint.tensor_names[0]).dtype


def _open(source: ModelSource) -> "Checkpoint":
    from trt_kv.export.checkpoint import open_checkpoint
    from trt_kv.export.hub import resolve_checkpoint

    folder = resolve_checkpoint(source.model, source.checkpoint)
    if source.checkpoint is None:
        click.echo(f"no CHECKPOINT given: using the small {source.model} checkpoint that comes with trt-kv", err=True)
    return open_checkpoint(folder)


def _calibrated(checkpoint: "Checkpoint", policy: Policy, plan: CalibrationPlan, on_progress: OnProgress) -> Recipe:
    from trt_kv.calibration.prefixkv import calibrate_prefixkv

    if plan.prompts is None and not is_bundled(checkpoint.folder):
        click.echo("no PROMPTS given: calibrating on trt-kv's synthetic English; prompts like your users' are better", err=True)
    prompts, where = _calibration_prompts(checkpoint, plan)
    return calibrate_prefixkv(
        prompts,
        importance_of(checkpoint, policy, max(len(ids) for ids in prompts)),
        budget=policy.kept,
        score=recipe_score(policy),
        model=_recipe_model(checkpoint),
        source=where,
        seed=plan.seed,
        protected=Protected(sinks=policy.sinks, recent=policy.recent),
        on_sample=lambda done, total: on_progress("calibrating", done, total),
    )


def _calibration_prompts(checkpoint: "Checkpoint", plan: CalibrationPlan) -> tuple[list[list[int]], str]:
    """Token ids of the calibration prompts, and where they come from."""
    from trt_kv.calibration.prompt_files import prompts_from_file
    from trt_kv.calibration.tasks import calibration_prompts
    from trt_kv.runtime.detokenizer import load_tokenizer

    limit = checkpoint.config.max_positions
    if plan.prompts is None:
        tasks = calibration_prompts(plan.samples, context_length=min(CALIBRATION_TOKENS, limit), seed=plan.seed)
        texts, where = [task.prompt for task in tasks], "bundled synthetic English, calibration split"
    else:
        texts, where = prompts_from_file(plan.prompts), plan.prompts.name
        texts = random.Random(plan.seed).sample(texts, min(plan.samples, len(texts)))
    tokenizer = load_tokenizer(checkpoint.folder / "tokenizer.json", error=CheckpointError)
    prompts = [list(tokenizer.encode(text).ids) for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if len(ids) > limit:
            raise UsageError(
                "a calibration prompt is longer than the model's positions",
                got=f"{len(ids)} tokens: {text[:40]!r}...",
                expected=f"at most {limit}",
            )
    return prompts, where


def _policy_of_recipe(policy: Policy, recipe: Recipe) -> Policy:
    """``policy`` with the recipe's budget. Raises ``UsageError`` where the command line asks for another one."""
    asked = policy.kept != policy_from_name(policy.name).kept if policy.name in policy_names() else True
    if asked and abs(policy.kept - recipe.budget) > 1e-6:
        raise UsageError(
            "the recipe was made for another budget",
            got=f"--budget {policy.kept}",
            expected=recipe.budget,
            fix="leave --budget out",
        )
    if recipe_score(policy) != recipe.score:
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


def _recipe_model(checkpoint: "Checkpoint") -> RecipeModel:
    return RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)


def _tensorrt_options(target: TargetPlan) -> "TensorRtOptions | None":
    """How to compile for TensorRT; raises before anything is read where TensorRT is not installed or the profile is none."""
    from trt_kv.export.tensorrt_profile import DEFAULT, TensorRtOptions, build_profile

    if target.target != "tensorrt":
        return None
    profile = build_profile(target.profile or DEFAULT)
    require_tensorrt()
    return TensorRtOptions(profile=profile, timing_cache=target.timing_cache)


def _command_line(source: ModelSource, policy: Policy, recipe: Path | None, plan: CalibrationPlan, target: TargetPlan) -> str:
    """The command that builds the same engine again."""
    words: list[str | Path | int | float] = ["trt-kv", "build", "--model", source.model]
    words += ["--checkpoint", source.checkpoint] if source.checkpoint else []
    words += ["--policy", policy.name]
    words += ["--budget", policy.kept] if policy.budget in SHARED_BUDGETS else []
    words += ["--score", policy.score] if policy.evicts else []
    words += ["--window", policy.window] if policy.score == "window" else []
    changed = differences(policy, policy_from_name(policy.name)) if policy.name in policy_names() else {}
    settings = [setting_as_text(name, value) for name, value in changed.items() if name not in ("kept", "score", "window")]
    words += ["--set", *settings] if settings else []
    if recipe is not None:
        words += ["--recipe", recipe]
    elif policy.needs_recipe:
        words += ["--samples", plan.samples, "--seed", plan.seed]
        words += ["--prompts", plan.prompts] if plan.prompts else []
    words += ["--target", target.target] if target.target != "onnxruntime" else []
    words += ["--profile", target.profile] if target.profile else []
    words += ["--dtype", target.dtype] if target.dtype else []
    return shlex.join(str(word) for word in words)
