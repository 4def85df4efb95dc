"""Checks that this runtime can run an engine, and that the engine's graphs apply its policy."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from trt_kv.drift import Drift
from trt_kv.errors import EngineError, RecipeError
from trt_kv.manifest import DRIFT_FILE, DTYPES, GRAPHS, RECIPE_FILE, Manifest
from trt_kv.opspec import OP_VERSION, AttributeValue
from trt_kv.plugins.predicted_scores.frequencies import key_frequencies
from trt_kv.plugins.registry import op_specs
from trt_kv.program import OpNode, Program, program_of_model
from trt_kv.rebuild import how_to_rebuild
from trt_kv.recipe import Recipe
from trt_kv.safe_path import safe_join
from trt_kv.surrogate import Predictor
from trt_kv.weight_index import FILE_NAME as WEIGHT_INDEX
from trt_kv.weight_index import load_weight_index

FLOAT32_ROUNDING = 1e-6
"""Tolerance of comparisons: ONNX attributes are fp32, recipes and policies are written in decimal."""


def check_compatible(folder: Path, manifest: Manifest) -> None:
    """``EngineError`` for a target, type or op that this version does not run, or KV ops that are not the policy's."""
    known = dict.fromkeys(op_specs(), OP_VERSION)
    unknown = {op: version for op, version in manifest.op_versions.items() if known.get(op) != version}
    runs = manifest.target in ("onnxruntime", "tensorrt") and manifest.dtype in DTYPES
    if unknown or not runs or (manifest.target == "tensorrt") != (manifest.plan is not None):
        raise EngineError(
            f"this version of trt-kv does not run {folder}",
            got=f"target {manifest.target!r}, {manifest.dtype}, ops {dict(manifest.op_versions)}",
            expected=f"target 'onnxruntime', or 'tensorrt' with a plan, in {' or '.join(DTYPES)}; ops among {known}",
            fix=how_to_rebuild(folder, manifest.reproduce),
        )
    policy = manifest.applied_policy
    shares = manifest.kept_shares if policy.needs_recipe and not policy.scoring.predicts else None
    taus = [policy.tau if tau is None else tau for tau in manifest.taus] if policy.needs_drift else None
    for phase, program in manifest.programs.items():
        expected = program_of_model(
            manifest.config,
            policy,
            phase=phase,
            page_size=manifest.page_size,
            kept_shares=shares,
            taus=taus,
            predictors=[found or Predictor() for found in manifest.predictors],
        )
        differing = [
            layer
            for layer, (nodes, others) in enumerate(zip(program, expected, strict=False))
            if not _same_nodes(nodes, others)
        ]
        if differing or len(program) != len(expected):
            layer = differing[0] if differing else min(len(program), len(expected))
            raise EngineError(
                f"layer {layer} of the {phase} graph of {folder} does not apply the policy {policy.name!r}",
                got=_shown(program, layer),
                expected=_shown(expected, layer),
                fix=how_to_rebuild(folder, manifest.reproduce),
            )


def check_weights(folder: Path, manifest: Manifest) -> None:
    """``EngineError`` unless the index of weights, which engines of earlier versions lack, is of this model."""
    if f"{GRAPHS}/{WEIGHT_INDEX}" in manifest.files:
        load_weight_index(folder / GRAPHS, manifest.config.tensor_shapes())


def check_recipe(folder: Path, manifest: Manifest) -> None:
    """``TrtKvError`` unless the recipe and drift files beside the graphs are for this model and hold the graphs' numbers."""
    if manifest.applied_policy.needs_recipe:
        _check_shares(folder, manifest)
    if manifest.applied_policy.needs_drift:
        _check_taus(folder, manifest)


def _check_shares(folder: Path, manifest: Manifest) -> None:
    policy = manifest.applied_policy
    path = safe_join(folder, RECIPE_FILE, error=EngineError)
    recipe = Recipe.load(path)
    with _named(path):
        recipe.check_model(digest=manifest.model_digest, n_layers=manifest.config.n_layers)
        shares = recipe.shares_of_cache(heads_apart=manifest.heads_apart)
    if recipe.surrogate is not None or policy.scoring.predicts:
        _check_predictors(path, recipe, manifest)
        return
    exempt = manifest.cache_policy.exempt_layers
    wanted = [1.0 if layer in exempt else share for layer, share in enumerate(shares)]
    if not _same_numbers(wanted, manifest.kept_shares) or not _same_numbers([recipe.budget], [policy.kept]):
        raise EngineError(
            f"{folder} does not apply its {RECIPE_FILE}",
            got=f"graphs: budget {policy.kept}, {manifest.kept_shares}",
            expected=f"recipe: budget {recipe.budget}, {wanted}",
            fix=how_to_rebuild(folder, manifest.reproduce),
        )


def _check_predictors(path: Path, recipe: Recipe, manifest: Manifest) -> None:
    """As ``check_recipe``, for a policy whose scores are predicted."""
    wanted: list[Predictor] = []
    if recipe.surrogate is not None and manifest.applied_policy.scoring.predicts:
        with _named(path):
            wanted = recipe.surrogate.predictors(
                manifest.config, recipe.budget, key_frequencies(manifest.config), heads_apart=manifest.heads_apart
            )
    found = manifest.predictors
    exempt = manifest.cache_policy.exempt_layers
    differing = [
        layer
        for layer, (one, other) in enumerate(zip(found, wanted, strict=False))
        if not _same_predictor(one, other, layer in exempt)
    ]
    if differing or len(found) != len(wanted) or not _same_numbers([recipe.budget], [manifest.applied_policy.kept]):
        raise EngineError(
            f"{path.parent} does not apply its {RECIPE_FILE}",
            got=f"graphs: budget {manifest.applied_policy.kept}",
            expected=f"recipe: budget {recipe.budget}, and the weights of its surrogate; they differ in layers {differing[:5]}",
            fix=how_to_rebuild(path.parent, manifest.reproduce),
        )


def _same_predictor(found: Predictor | None, expected: Predictor, is_exempt: bool) -> bool:
    if found is None or is_exempt:
        return found is None and is_exempt
    return all(
        _same_numbers(ours, theirs)
        for ours, theirs in (
            (found.weights, expected.weights),
            (found.frequencies, expected.frequencies),
            ([found.threshold], [expected.threshold]),
        )
    )


def _check_taus(folder: Path, manifest: Manifest) -> None:
    path = safe_join(folder, DRIFT_FILE, error=EngineError)
    drift = Drift.load(path)
    with _named(path):
        drift.check_model(digest=manifest.model_digest, n_layers=manifest.config.n_layers)
    same = len(drift.taus) == len(manifest.taus) and all(map(_same_value, manifest.taus, drift.taus))
    if not same:
        raise EngineError(
            f"{folder} does not apply its drift thresholds, {DRIFT_FILE}",
            got=f"graphs: tau {manifest.taus}",
            expected=f"drift.json: tau {drift.taus}",
            fix=how_to_rebuild(folder, manifest.reproduce),
        )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors about what a file holds name the file."""
    try:
        yield
    except RecipeError as cause:
        raise RecipeError(f"{path}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause


def _same_nodes(nodes: Sequence[OpNode], others: Sequence[OpNode]) -> bool:
    if [node.op for node in nodes] != [other.op for other in others]:
        return False
    pairs = zip(map(_all_attributes, nodes), map(_all_attributes, others), strict=True)
    return all(
        found.keys() == expected.keys() and all(_same_value(found[name], expected[name]) for name in found)
        for found, expected in pairs
    )


def _all_attributes(node: OpNode) -> dict[str, AttributeValue]:
    """The node's attributes, and the defaults of those that older versions did not write."""
    defaults = {a.name: a.default for a in op_specs()[node.op].attributes if a.default is not None}
    return {**defaults, **node.attributes}


def _same_value(value: AttributeValue | None, expected: AttributeValue | None) -> bool:
    if isinstance(value, tuple) and isinstance(expected, tuple):
        return _same_numbers(value, expected)
    if isinstance(value, float) and isinstance(expected, float | int):
        return abs(value - expected) <= FLOAT32_ROUNDING * max(1.0, abs(expected))
    return value == expected


def _same_numbers(numbers: Sequence[float], others: Sequence[float]) -> bool:
    return len(numbers) == len(others) and all(map(_same_value, map(float, numbers), others))


def _shown(program: Program, layer: int) -> str:
    nodes = program[layer] if layer < len(program) else ()
    return ", ".join(f"{node.op}({dict(node.attributes)})" for node in nodes) or "no KV op"
