"""Checkpoint + policy -> a folder for TensorRT-LLM; statistics of queries for its TriAttention."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import UsageError
from trt_kv.layer_budget import layer_budgets
from trt_kv.pipeline.calibration_prompts import calibration_prompts, calibration_source
from trt_kv.pipeline.calibration_runs import CALIBRATION_TOKENS, query_statistics_of, recipe_from_prompts
from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.destinations import check_new_file, check_new_folder
from trt_kv.pipeline.given_files import policy_of_recipe, recipe_for_policy
from trt_kv.pipeline.plans import CalibrationPlan, ModelSource
from trt_kv.pipeline.reproduce import command_line_of
from trt_kv.pipeline.requests import BuildRequest
from trt_kv.pipeline.sources import open_source

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint
    from trt_kv.export.targets.tensorrt_llm_options import HandOver


def hand_over(request: BuildRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> Path:
    """Write the folder ``request.out`` for TensorRT-LLM and return that path: its README tells what of the policy is lost.

    Budgets are computed for texts of ``request.source.context`` tokens, by default the model's positions. What the options
    need is calibrated: a recipe, if none is given, and statistics of queries. Raises ``UsageError``, with the reason, for a
    policy or a model that TensorRT-LLM has nothing for.
    """
    from trt_kv.export.new_folder import check_destination
    from trt_kv.export.targets.tensorrt_llm import STATISTICS_FILE, checkpoint_files, write_hand_over
    from trt_kv.export.targets.tensorrt_llm_options import hand_over_of
    from trt_kv.manifest import RECIPE_FILE
    from trt_kv.runtime.processes import will_compute

    will_compute()
    check_destination(request.out)
    check_new_folder(request.out.parent, "--out")
    checkpoint = open_source(request.source, on_note)
    checkpoint_files(checkpoint)
    config, target = checkpoint.config, request.target
    recipe = None if request.recipe is None else recipe_for_policy(request.recipe, request.policy)
    policy = request.policy if recipe is None else policy_of_recipe(request.policy, recipe, on_note)

    def options_with(kept: tuple[float, ...] | None) -> "HandOver":
        applied = policy.applied_to(config.windows)
        budgets = layer_budgets(applied, config.n_layers, kept)
        return hand_over_of(
            config,
            policy,
            budgets,
            context=config.max_positions,
            page_size=target.page_size,
            dtype=target.dtype,
            kv_dtype=target.kv_dtype,
        )

    if recipe is not None:
        recipe.check_model(digest=checkpoint.digest, n_layers=config.n_layers)
    elif policy.applied_to(config.windows).needs_recipe:
        options_with(
            tuple(0.5 + 0.4 * layer / config.n_layers for layer in range(config.n_layers))
        )  # refused before it is measured
        recipe = recipe_from_prompts(checkpoint, policy, request.calibration, on_progress=on_progress, on_note=on_note)
    found = options_with(None if recipe is None else recipe.kept)
    with tempfile.TemporaryDirectory() as scratch:
        statistics = Path(scratch) / STATISTICS_FILE if found.needs_queries else None
        if statistics is not None:
            _measure_queries(checkpoint, request.calibration, statistics, on_progress=on_progress, on_note=on_note)
        extra = []
        if recipe is not None:
            extra.append(Path(scratch) / RECIPE_FILE)
            recipe.save(extra[0])
        write_hand_over(
            checkpoint,
            found,
            request.out,
            statistics=statistics,
            what=f"{checkpoint.name}, policy `{policy.name}`: {policy.summary}.",
            reproduce=command_line_of(request),
            extra_files=extra,
        )
    return request.out


def calibrate_queries(
    source: ModelSource, plan: CalibrationPlan, out: Path, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore
) -> Path:
    """Write statistics of the queries of a model's heads on the prompts of ``plan`` to ``out`` (.safetensors); returns it.

    Per layer, query head and pair of channels, after the norm of queries and before RoPE: the mean of q (``q_mean_real``,
    ``q_mean_imag``) and of |q| (``q_abs_mean``), and RoPE's ``omega`` and ``freq_scale_sq``. TriAttention ranks keys by them
    (arXiv 2604.04921). Raises ``UsageError`` for a model whose heads do not turn as a whole.

    Example::

        from pathlib import Path

        from trt_kv.pipeline import CalibrationPlan, ModelSource, calibrate_queries

        calibrate_queries(ModelSource(model="llama3"), CalibrationPlan(), Path("recipes/queries.safetensors"))
    """
    from trt_kv.runtime.processes import will_compute

    will_compute()
    if out.suffix != ".safetensors":
        raise UsageError("query statistics are a safetensors file", got=f"--out {out}", expected="a name in .safetensors")
    check_new_file(out, "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    _measure_queries(open_source(source, on_note), plan, out, on_progress=on_progress, on_note=on_note)
    return out


def _measure_queries(
    checkpoint: "Checkpoint", plan: CalibrationPlan, out: Path, *, on_progress: OnProgress, on_note: OnNote
) -> None:
    from trt_kv.export.targets.tensorrt_llm import save_statistics

    prompts = calibration_prompts(checkpoint, plan, CALIBRATION_TOKENS, on_note=on_note)
    found = query_statistics_of(checkpoint, prompts, lambda done, total: on_progress("measuring queries", done, total))
    source = calibration_source(checkpoint, plan)
    save_statistics(out, found.arrays, checkpoint.config, n_tokens=found.n_tokens, source=source)
