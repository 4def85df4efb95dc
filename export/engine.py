"""Checkpoint + policy + recipe -> engine folder, built beside its destination and renamed into place."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from trt_kv.cache_layers import heads_apart
from trt_kv.chat.turns import text_end_ids
from trt_kv.drift import Drift
from trt_kv.engine_files import file_records
from trt_kv.errors import CheckpointError, RecipeError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.graph import graph_from_checkpoint, save_graphs
from trt_kv.export.new_folder import new_folder
from trt_kv.export.packed_weights import PackedWeights
from trt_kv.export.quantized_graph import quantize_graph
from trt_kv.export.shared_weights import link_weights
from trt_kv.export.split import program_from_graph
from trt_kv.export.targets.onnxruntime import save_onnxruntime_parts
from trt_kv.export.targets.parts import Parts
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.export.triton_repository import write_repository
from trt_kv.manifest import DRIFT_FILE, DTYPES, GRAPHS, KV_DTYPES, RECIPE_FILE, Manifest, Plan, Quantization
from trt_kv.opspec import OP_VERSION
from trt_kv.plugins.predicted_scores.frequencies import key_frequencies
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.recipe import CREATED_BY, Recipe
from trt_kv.surrogate import Predictor

DEFAULT_PAGE_SIZE = 32

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total) during a long operation."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What to build. ``reproduce`` is the command that makes the same engine again.

    With ``tensorrt`` the engine is compiled by TensorRT, otherwise its target is ONNX Runtime. ``dtype`` is the compute type of
    the graphs; types other than float32 run on GPUs only. ``quantization``: how big matrices are stored; None: in ``dtype``. It
    runs on CPUs only. ``kv_dtype`` is the type in which the KV cache is stored; None: as ``dtype``.
    """

    checkpoint: Checkpoint
    policy: Policy
    recipe: Recipe | None = None
    drift: Drift | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    dtype: str = "float32"
    quantization: Quantization | None = None
    kv_dtype: str | None = None
    tensorrt: TensorRtOptions | None = None
    model_source: str = ""
    reproduce: str = ""

    def __post_init__(self) -> None:
        self.checkpoint.config.check_page_size(self.page_size)
        if self.dtype not in DTYPES:
            raise UsageError("unsupported compute type", got=self.dtype, expected=" or ".join(DTYPES))
        if self.quantization is not None:
            self.quantization.check(UsageError)
            if self.is_for_gpus:
                raise UsageError(
                    "quantised weights are for ONNX Runtime on a CPU",
                    got=f"target {self.target}, {self.dtype}",
                    expected="target onnxruntime, float32",
                    fix="leave the quantisation out",
                )
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise UsageError("unsupported type of the KV cache", got=self.kv_dtype, expected=" or ".join(KV_DTYPES))
        if self.is_for_gpus and self.kv_dtype not in (None, self.dtype):
            raise UsageError(
                "on a GPU the KV cache is stored in the type of the computation",
                got=f"kv_dtype={self.kv_dtype} for an engine in {self.dtype}",
                expected=self.dtype,
                fix="leave the type of the KV cache out, or build for the CPU: target onnxruntime in float32",
            )
        if self.is_for_gpus and heads_apart(self.checkpoint.config, self.applied_policy) > 1:
            raise UsageError(
                "KV heads with budgets of their own are for ONNX Runtime on a CPU",
                got=f"heads 'own' for target {self.target}, {self.dtype}",
                expected="target onnxruntime, float32",
                fix="build with --set heads=each, whose budgets are per layer",
            )
        if self.is_for_gpus and self.applied_policy.scoring.predicts:
            raise UsageError(
                "predicted scores are for ONNX Runtime on a CPU",
                got=f"score {self.policy.score!r} for target {self.target}, {self.dtype}",
                expected="target onnxruntime, float32",
                fix="take another policy, such as prefixkv",
            )
        if self.applied_policy.needs_recipe and self.recipe is None:
            raise RecipeError(f"policy {self.policy.name!r} needs a recipe", fix="calibrate one: trt-kv calibrate --help")
        if self.recipe is not None:
            self.recipe.check_model(digest=self.checkpoint.digest, n_layers=self.checkpoint.config.n_layers)
            self._check_recipe_is_for_policy(self.recipe)
        self._check_drift()

    def _check_recipe_is_for_policy(self, recipe: Recipe) -> None:
        policy = self.applied_policy
        if policy.needs_recipe and (recipe.surrogate is not None) != policy.scoring.predicts:
            raise RecipeError(
                f"the recipe is not for policy {policy.name!r}",
                got=f"a recipe of method {recipe.method!r}",
                expected="method 'kvzap'" if policy.scoring.predicts else "kept shares: method 'prefixkv' or 'lukv'",
                fix=f"calibrate one: trt-kv calibrate --policy {policy.name}",
            )
        if not policy.needs_recipe or recipe.budget != policy.kept:
            raise RecipeError(
                f"the recipe is not for policy {policy.name!r}",
                got=f"a recipe for budget {recipe.budget}",
                expected=f"budget {policy.kept}" if policy.needs_recipe else "no recipe",
                fix="take the policy's budget from the recipe, or calibrate one for the policy",
            )

    def _check_drift(self) -> None:
        policy = self.applied_policy
        if policy.needs_drift != (self.drift is not None):
            raise RecipeError(
                f"policy {policy.name!r} " + ("needs drift thresholds" if policy.needs_drift else "reads no drift thresholds"),
                expected=f"thresholds if and only if drift is 'calibrated'; it is {policy.drift!r}",
                fix="calibrate them: trt-kv calibrate --policy freekv" if policy.needs_drift else "leave them out",
            )
        if self.drift is not None:
            self.drift.check_model(digest=self.checkpoint.digest, n_layers=self.checkpoint.config.n_layers)
            if self.drift.settings.exempt_layers != policy.exempt_layers:
                raise RecipeError(
                    f"the drift thresholds are not for policy {policy.name!r}",
                    got=f"thresholds for all layers except {list(self.drift.settings.exempt_layers)}",
                    expected=f"thresholds for all layers except {list(policy.exempt_layers)}",
                    fix="calibrate them for this policy: trt-kv calibrate --policy freekv",
                )

    @property
    def applied_policy(self) -> Policy:
        """What the policy decides in this model: layers with an attention window are exempt from it."""
        return self.policy.applied_to(self.checkpoint.config.windows)

    @property
    def is_for_gpus(self) -> bool:
        return self.tensorrt is not None or self.dtype != "float32"

    @property
    def target(self) -> str:
        return "onnxruntime" if self.tensorrt is None else "tensorrt"

    @functools.cached_property
    def packed_weights(self) -> PackedWeights | None:
        """The matrices that the engine has in blocks; None if all are stored in its ``dtype``."""
        return None if self.quantization is None else PackedWeights(self.checkpoint, self.quantization)

    @property
    def kept_shares(self) -> list[float] | None:
        """A recipe's share of each layer of the cache; None if the policy reads none."""
        if self.recipe is None or self.applied_policy.budget != "recipe":
            return None
        return self.recipe.shares_of_cache(heads_apart=heads_apart(self.checkpoint.config, self.applied_policy))

    @property
    def predictors(self) -> list[Predictor] | None:
        """With what each layer of the cache predicts scores; None if the policy predicts none."""
        if self.recipe is None or self.recipe.surrogate is None:
            return None
        config = self.checkpoint.config
        return self.recipe.surrogate.predictors(
            config, self.policy.kept, key_frequencies(config), heads_apart=heads_apart(config, self.applied_policy)
        )

    @property
    def taus(self) -> list[float] | None:
        """Each layer's drift threshold; exempt layers have the policy's tau, which is not read."""
        return None if self.drift is None else [self.policy.tau if tau is None else tau for tau in self.drift.taus]


def export_graphs(
    request: EngineRequest,
    folder: Path,
    on_progress: OnProgress | None = None,
    *,
    offsets: Mapping[str, int] | None = None,
    to_cut: bool = False,
) -> None:
    """Write the monolithic graphs ``prefill.onnx`` and ``decode.onnx`` and the ``weights.data`` they share into ``folder``.

    ``offsets``: of the weights in ``weights.data``, if it is there already. ``to_cut``: also write a graph to cut segments
    from, if the decode graph has several ops that attend in a layer (``_graph_to_cut``).
    """
    graphs = {}
    packed = request.packed_weights
    programs = _programs(request)
    if to_cut and _graph_to_cut(request) != "decode":
        config, whole = request.checkpoint.config, policy_from_name("full")
        programs[_graph_to_cut(request)] = program_of_model(config, whole, phase="decode", page_size=request.page_size)
    for done, (name, program) in enumerate(programs.items()):
        _tell(on_progress, "tracing graphs", done, len(programs))
        graphs[name] = graph_from_checkpoint(
            request.checkpoint, program, page_size=request.page_size, dtype=getattr(torch, request.dtype)
        )
        if packed is not None:
            quantize_graph(graphs[name], packed)
    _tell(on_progress, "tracing graphs", len(programs), len(programs))
    save_graphs(graphs, folder, lambda done, total: _tell(on_progress, "writing weights", done, total), offsets=offsets)


def _programs(request: EngineRequest) -> dict[str, Program]:
    return {
        phase: program_of_model(
            request.checkpoint.config,
            request.policy,
            phase=phase,
            page_size=request.page_size,
            kept_shares=request.kept_shares,
            taus=request.taus,
            predictors=request.predictors,
        )
        for phase in PHASES
    }


def _graph_to_cut(request: EngineRequest) -> str:
    """The graph whose segments an engine has: the decode graph, or one that attends once per layer where that one does not."""
    return "decode" if heads_apart(request.checkpoint.config, request.applied_policy) == 1 else "whole_layers"


def build_engine(
    request: EngineRequest,
    destination: Path,
    *,
    replace: bool = False,
    on_progress: OnProgress | None = None,
    extra_files: Sequence[Path] = (),
) -> Manifest:
    """Build the engine at ``destination``; ``extra_files`` (e.g. a plot of the recipe) are copied into it.

    All or nothing: the folder is made under another name and renamed when complete. With an engine beside it that has the same
    weights it shares their file. Raises ``UsageError`` if something else is at ``destination``, ``EngineError`` if the disk is
    full or cannot be written.
    """
    _check_tokenizer(request.checkpoint)
    with new_folder(destination, replace=replace) as folder:
        graphs = folder / GRAPHS
        graphs.mkdir()
        offsets, packed = None, request.packed_weights
        if request.tensorrt is None:  # a plan has its own copy of the weights, and the graphs do not stay
            offsets = link_weights(
                request.checkpoint,
                destination,
                graphs,
                dtype=request.dtype,
                packed=packed,
                on_weight=lambda done, total: _tell(on_progress, "comparing weights", done, total),
            )
        export_graphs(request, graphs, on_progress, offsets=offsets, to_cut=request.tensorrt is None)
        programs = {phase: program_from_graph(_load_graph(graphs, phase)) for phase in PHASES}
        if request.tensorrt is None:
            cut = _graph_to_cut(request)
            parts = save_onnxruntime_parts(
                request.checkpoint, _load_graph(graphs, cut), graphs, dtype=request.dtype, packed=packed
            )
            if cut != "decode":
                (graphs / f"{cut}.onnx").unlink()
        else:
            parts = Parts(plan=_compile(request, request.tensorrt, programs, folder, on_progress))
            shutil.rmtree(graphs)
        for name, path in request.checkpoint.tokenizer_files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(_content(path))
        for path in extra_files:
            shutil.copyfile(path, folder / path.name)
        if request.recipe is not None:
            request.recipe.save(folder / RECIPE_FILE)
        if request.drift is not None:
            request.drift.save(folder / DRIFT_FILE)
        write_repository(folder, f"{request.checkpoint.name}-{request.policy.name}", is_for_gpus=request.is_for_gpus)
        _tell(on_progress, "computing digests", 0, 1)
        manifest = _manifest(request, folder, programs, parts)
        manifest.save(folder)
        _tell(on_progress, "computing digests", 1, 1)
    return manifest


def _compile(
    request: EngineRequest, options: TensorRtOptions, programs: dict[str, Program], folder: Path, on_progress: OnProgress | None
) -> Plan:
    """Compile the prefill graph, which also serves decode: its inputs switch eviction and scores on and off."""
    from trt_kv.export.targets.tensorrt_engine import PLAN_FILE, PlanRequest, build_plan, library_version

    plan = PlanRequest(
        graph=folder / GRAPHS / "prefill.onnx",
        program=programs["prefill"],
        config=request.checkpoint.config,
        page_size=request.page_size,
        dtype=request.dtype,
        options=options,
    )
    build_plan(plan, folder, on_progress)
    return Plan(file=PLAN_FILE, built_by=library_version(), profiles=tuple(plan.ranges))


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not checkpoint.tokenizer_file.is_file():
        raise CheckpointError(
            f"{checkpoint.location} has no tokenizer.json",
            got=", ".join(checkpoint.tokenizer_files),
            expected="the tokenizer as one tokenizer.json",
            fix="save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )


def _content(path: Path) -> bytes:
    """A file of the checkpoint. That it cannot be read must not be told as a destination that cannot be written."""
    try:
        return path.read_bytes()
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}", got=cause.strerror, expected="a readable file") from cause


def _load_graph(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(os.fspath(folder / f"{name}.onnx"), load_external_data=False)


def _manifest(request: EngineRequest, folder: Path, programs: dict[str, Program], parts: Parts) -> Manifest:
    checkpoint = request.checkpoint
    ops = {node.op for program in programs.values() for nodes in program for node in nodes}
    return Manifest(
        model_name=checkpoint.name,
        model_digest=checkpoint.digest,
        model_source=request.model_source,
        config=dataclasses.replace(
            checkpoint.config,
            eos_token_ids=text_end_ids(
                checkpoint.eos_token_ids, checkpoint.tokenizer_files, vocab_size=checkpoint.config.vocab_size
            ),
        ),
        policy=request.policy,
        target=request.target,
        dtype=request.dtype,
        quantization=request.quantization,
        kv_dtype=request.kv_dtype or request.dtype,
        page_size=request.page_size,
        op_versions=dict.fromkeys(sorted(ops), OP_VERSION),
        programs=programs,
        segments=parts.segments,
        attention_ports=parts.ports,
        plan=parts.plan,
        files=file_records(folder),
        reproduce=request.reproduce,
        created_by=CREATED_BY,
    )


def _tell(on_progress: OnProgress | None, stage: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(stage, done, total)
