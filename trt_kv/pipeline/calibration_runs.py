"""Runs calibration prompts through a checkpoint: recipes and drift thresholds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from trt_kv.chat.turns import text_end_ids
from trt_kv.drift import ALWAYS, Drift, drift_settings
from trt_kv.errors import UsageError
from trt_kv.layer_budget import LayerBudget, layer_budgets
from trt_kv.pipeline.calibration_prompts import calibration_prompts, calibration_source
from trt_kv.pipeline.callbacks import OnNote, OnProgress
from trt_kv.pipeline.continuation import continue_greedily
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE, CalibrationPlan, DriftPlan
from trt_kv.plugins.recall_attention.page_counts import PageLimits, most_rows
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.recipe import Protected, Recipe, RecipeModel, RecipeScore, recipe_score

if TYPE_CHECKING:
    import torch

    from trt_kv.calibration.drift import Trace, TraceOf
    from trt_kv.calibration.prefixkv import Importance
    from trt_kv.calibration.query_statistics import QueryStatistics
    from trt_kv.export.checkpoints.base import Checkpoint

CALIBRATION_TOKENS = 1024
FEW_TOKENS = 32
"""Recipes from shorter prompts are made with a note: hardly a token could be evicted from them."""


class _How(TypedDict):
    """What all calibrations of recipes are told."""

    budget: float
    score: RecipeScore
    model: RecipeModel
    source: str
    seed: int
    protected: Protected
    windowed_layers: tuple[int, ...]
    on_sample: Callable[[int, int], None]


def recipe_from_prompts(
    checkpoint: "Checkpoint", policy: Policy, plan: CalibrationPlan, *, on_progress: OnProgress, on_note: OnNote
) -> Recipe:
    """The recipe that ``policy`` needs, found on the prompts of ``plan``."""
    from trt_kv.calibration.kvzap import calibrate_kvzap
    from trt_kv.calibration.lukv import calibrate_lukv
    from trt_kv.calibration.prefixkv import calibrate_prefixkv
    from trt_kv.pipeline.calibration_heads import usefulness_of
    from trt_kv.pipeline.calibration_surrogate import tokens_of

    _check_decides(checkpoint, policy)
    prompts = calibration_prompts(checkpoint, plan, CALIBRATION_TOKENS, on_note=on_note)
    longest = max(len(ids) for ids in prompts)
    if len(prompts) == 1 or longest < FEW_TOKENS:
        on_note(
            f"note: few or short calibration prompts ({len(prompts)}, the longest of {longest} tokens) make a poor recipe: "
            "give about ten, as long as those in production"
        )
    how: _How = {
        "budget": policy.kept,
        "score": recipe_score(policy),
        "model": recipe_model(checkpoint),
        "source": calibration_source(checkpoint, plan),
        "seed": plan.seed,
        "protected": Protected(sinks=policy.sinks, recent=policy.recent),
        "windowed_layers": checkpoint.config.windowed_layers,
        "on_sample": lambda done, total: on_progress("calibrating", done, total),
    }
    if policy.scoring.predicts:
        return calibrate_kvzap(prompts, tokens_of(checkpoint, longest, on_note), **how)
    if policy.heads == "own":
        return calibrate_lukv(prompts, usefulness_of(checkpoint, policy, longest), **how)
    return calibrate_prefixkv(prompts, importance_of(checkpoint, policy, longest), **how)


def drift_from_prompts(
    checkpoint: "Checkpoint",
    policy: Policy,
    plan: CalibrationPlan,
    drift: DriftPlan,
    recipe: Recipe | None,
    *,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Drift:
    """Thresholds at the rate of ``drift``, measured while the model continues the prompts of ``plan`` under ``policy``.

    Synthetic prompts are twice as long as the tokens that a step attends to, so that there are pages to choose from.
    """
    from trt_kv.calibration.drift import calibrate_drift

    _check_decides(checkpoint, policy)
    policy = policy.applied_to(checkpoint.config.windows)
    n_tokens = max(CALIBRATION_TOKENS, 2 * policy.tokens)
    prompts = calibration_prompts(checkpoint, plan, n_tokens, new_tokens=drift.new_tokens, on_note=on_note)
    kept_shares = recipe.kept if recipe is not None else None
    longest = max(len(ids) for ids in prompts)
    thresholds = calibrate_drift(
        prompts,
        drift_trace_of(checkpoint, policy, longest, drift.new_tokens, page_size=drift.page_size, kept_shares=kept_shares),
        correction_rate=drift.correction_rate,
        model=recipe_model(checkpoint),
        settings=drift_settings(policy, drift.page_size),
        source=calibration_source(checkpoint, plan),
        seed=plan.seed,
        max_new_tokens=drift.new_tokens,
        on_sample=lambda done, total: on_progress("measuring queries", done, total),
    )
    _tell_prompts_without_choice(thresholds, layer_budgets(policy, checkpoint.config.n_layers, kept_shares), on_note)
    return thresholds


def _check_decides(checkpoint: "Checkpoint", policy: Policy) -> None:
    """``UsageError`` if every layer keeps its attention window, or all of its tokens."""
    applied = policy.applied_to(checkpoint.config.windows)
    if not (applied.evicts or applied.recalls):
        raise UsageError(
            f"policy {policy.name!r} decides nothing in {checkpoint.name}, so there is nothing to calibrate",
            got="an attention window in every layer that is not exempt",
            expected="a layer that attends to all tokens",
            fix="build the engine without a recipe or thresholds",
        )


def _tell_prompts_without_choice(drift: Drift, budgets: Sequence[LayerBudget], on_note: OnNote) -> None:
    """A note if prompts are so short that their steps attend to every page."""
    settings = drift.settings
    if settings.budget == "unimetric":
        return
    limits = PageLimits(page_size=settings.page_size, sinks=settings.sinks, recent=settings.recent)
    samples = drift.calibration.samples
    n_short = sum(
        all(
            len(limits.choosable(sample.n_tokens + sample.n_steps)) <= limits.n_chosen(budget.of_prompt(sample.n_tokens))
            for budget in budgets
        )
        for sample in samples
    )
    if n_short:
        on_note(
            f"note: {n_short} of {len(samples)} calibration prompts are no longer than what a step attends to, so nothing is "
            "recalled after them, and thresholds for longer ones may differ: give longer prompts"
        )


def importance_of(
    checkpoint: "Checkpoint", policy: Policy, max_tokens: int, page_size: int = DEFAULT_PAGE_SIZE
) -> "Importance":
    """A scorer that runs prompts of up to ``max_tokens`` through the torch decoder and the same scoring ops as at run time.

    It computes the score of the recipe for ``policy`` (``recipe_score``) in every layer without an attention window.
    """
    from trt_kv.runtime.backends.host.runner import host_runner
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor

    config = checkpoint.config
    n_pages = config.n_layers * -(-max_tokens // page_size)
    pool = HostKvPool(n_pages=n_pages, page_size=page_size, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
    programs = programs_for(checkpoint, scoring_policy(policy), page_size)
    return host_runner(TorchDecoderExecutor(decoder_for(checkpoint)), pool, programs).importance


def scoring_policy(policy: Policy) -> Policy:
    """The ranking of the recipe for ``policy`` (``recipe_score``), in layers that hold all KV heads."""
    score = recipe_score(policy)
    return Policy(
        name="scoring",
        summary="",
        score=score.name,
        budget="uniform",
        window=score.window or policy.window,
        heads="shared" if score.heads == "shared" else "each",
        pooling=score.pooling,
    )


def drift_trace_of(
    checkpoint: "Checkpoint",
    policy: Policy,
    max_tokens: int,
    new_tokens: int,
    *,
    page_size: int,
    kept_shares: Sequence[float] | None = None,
) -> "TraceOf":
    """A function that continues prompts of up to ``max_tokens`` greedily by ``new_tokens``, or to the end of the text.

    It runs the torch decoder with the whole cache in one pool, and selects pages as ``policy`` does, with each step's own
    query.
    """
    from trt_kv.calibration.drift import DriftRecorder
    from trt_kv.plugins.registry import kernel
    from trt_kv.runtime.backends.host.executor import SplitStepExecutor
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
    from trt_kv.runtime.model_runner import ModelRunner

    config = checkpoint.config
    new_tokens = min(new_tokens, config.max_positions)
    programs = programs_for(checkpoint, dataclasses.replace(policy, drift="fixed", tau=ALWAYS), page_size, kept_shares)
    pool = HostKvPool(
        n_pages=config.n_layers * -(-min(max_tokens + new_tokens, config.max_positions) // page_size),
        page_size=page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        n_query_heads=config.n_heads,
        summary_rows=most_rows(programs["prefill"], page_size, "float32"),
    )
    end_ids = text_end_ids(checkpoint.eos_token_ids, checkpoint.tokenizer_files, vocab_size=config.vocab_size)
    recorder = DriftRecorder(kernel("RecallAttention", "cpu"))
    kernels = {"RecallAttention": recorder}
    steps = SplitStepExecutor(TorchDecoderExecutor(decoder_for(checkpoint)), programs, kernels=kernels)
    runner = ModelRunner(steps, pool, programs, decode=policy.decode)

    def trace_of(token_ids: Sequence[int]) -> "Trace":
        n_steps = min(new_tokens, config.max_positions - len(token_ids))
        continue_greedily(runner, token_ids, n_steps, end_ids)
        return recorder.taken()

    return trace_of


def query_statistics_of(
    checkpoint: "Checkpoint", prompts: Sequence[Sequence[int]], on_sample: Callable[[int, int], None]
) -> "QueryStatistics":
    """Statistics of the queries of each layer and head, normed but not rotated, while the torch decoder reads ``prompts``.

    ``UsageError`` for a model whose heads do not turn as a whole in every layer.
    """
    from trt_kv.calibration.query_statistics import QueryRecorder
    from trt_kv.decoder import SelfAttention
    from trt_kv.policies import policy_from_name
    from trt_kv.runtime.backends.host.runner import host_runner
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor

    config, size = checkpoint.config, DEFAULT_PAGE_SIZE
    if config.unrotated_layers or config.local_rope or config.rope.rotary_dim not in (0, config.head_dim):
        raise UsageError(
            f"statistics of queries are of heads that turn as a whole, and those of {checkpoint.name} do not",
            got="layers without RoPE, with another one, or with one for a part of each head",
            expected="one RoPE over all channels in every layer",
        )
    recorder = QueryRecorder(config.n_layers, config.n_heads, config.head_dim)
    decoder = decoder_for(checkpoint)

    def recording(attention: SelfAttention) -> Callable[..., None]:
        def record(_module: object, _inputs: object, projected: "torch.Tensor") -> None:
            recorder.add(attention.layer, attention.heads(projected, attention.q_norm).float().numpy())

        return record

    for module in decoder.modules():
        if isinstance(module, SelfAttention):
            module.q_proj.register_forward_hook(recording(module))
    n_pages = config.n_layers * -(-max(map(len, prompts)) // size)
    pool = HostKvPool(n_pages=n_pages, page_size=size, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
    runner = host_runner(TorchDecoderExecutor(decoder), pool, programs_for(checkpoint, policy_from_name("full"), size))
    for done, ids in enumerate(prompts):
        on_sample(done, len(prompts))
        sequence = runner.new_sequence()
        try:
            runner.prefill(sequence, ids)
        finally:
            sequence.release()
    on_sample(len(prompts), len(prompts))
    return recorder.statistics()


def recipe_model(checkpoint: "Checkpoint") -> RecipeModel:
    """The description of the model in a recipe or a file of thresholds."""
    return RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)


def programs_for(
    checkpoint: "Checkpoint", policy: Policy, page_size: int, kept_shares: Sequence[float] | None = None
) -> Mapping[str, Program]:
    """The programs of ``policy`` for the checkpoint's model, by phase."""
    return {
        phase: program_of_model(checkpoint.config, policy, phase=phase, page_size=page_size, kept_shares=kept_shares)
        for phase in PHASES
    }


def decoder_for(checkpoint: "Checkpoint") -> "torch.nn.Module":
    """The checkpoint's decoder in fp32 if that fits into the memory."""
    from trt_kv.export.decoder import decoder_from_checkpoint

    return decoder_from_checkpoint(checkpoint, _calibration_dtype(checkpoint))


def _calibration_dtype(checkpoint: "Checkpoint") -> "torch.dtype":
    """fp32 if the weights then fit into half of the free memory; else the checkpoint's own type, memory-mapped."""
    import torch

    from trt_kv.runtime.memory import available_bytes

    n_weights = sum(math.prod(shape) for shape in checkpoint.config.tensor_shapes().values())
    return torch.float32 if 4 * n_weights < available_bytes() // 2 else checkpoint.tensor(checkpoint.tensor_names[0]).dtype
