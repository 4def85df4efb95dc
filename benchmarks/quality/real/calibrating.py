"""The recipes of the report: those of layers, those of KV heads, and the surrogate of predicted scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from benchmarks.quality.real.answering import Answerer
from benchmarks.quality.real.settings import RealSettings
from benchmarks.quality.recipes import (
    Recipes,
    calibrated_head_recipes,
    calibrated_recipes,
    recipe_kind,
    surrogate_recipes,
)
from benchmarks.quality.store import Store
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.pipeline.calibration_heads import usefulness_of
from trt_kv.pipeline.calibration_prompts import calibration_prompts
from trt_kv.pipeline.calibration_surrogate import tokens_of
from trt_kv.pipeline.plans import CalibrationPlan
from trt_kv.policy import Policy
from trt_kv.recipe import RecipeModel


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What recipes are calibrated with, and the ``known`` ones, which need not be."""

    checkpoint: Checkpoint
    answerer: Answerer
    model: RecipeModel
    store: Store
    known: Recipes
    tell: Callable[[str], None]


def recipes_for(policies: Sequence[Policy], settings: RealSettings, calibration: Calibration) -> Recipes:
    """As ``trt-kv build`` calibrates them, on its prompts, at every budget."""
    needing = [policy for policy in policies if policy.needs_recipe]
    predicting = [policy for policy in needing if policy.scoring.predicts]
    of_heads = [policy for policy in needing if policy.heads == "own" and policy not in predicting]
    of_layers = [policy for policy in needing if policy.heads != "own" and policy not in predicting]
    run = _Calibrating(calibration, settings)
    layers = run.stored("recipes", run.of_layers, of_layers)
    heads = run.stored("recipes-heads", run.of_heads, of_heads)
    predicted = run.stored("recipes-surrogate", run.of_predictions, predicting, known=Recipes(facts=()))
    return Recipes(facts=(*layers.facts, *heads.facts, *predicted.facts), predicted=predicted.predicted)


class _Calibrating:
    def __init__(self, calibration: Calibration, settings: RealSettings) -> None:
        self._with = calibration
        self._settings = settings

    def of_layers(self, policies: Sequence[Policy]) -> Recipes:
        harness, seed = self._with.answerer.harness, self._settings.calibration_seed
        return calibrated_recipes(harness, self._prompts, self._settings.budgets, policies, self._with.model, seed=seed)

    def of_heads(self, policies: Sequence[Policy]) -> Recipes:
        use = partial(usefulness_of, self._with.checkpoint, max_tokens=max(map(len, self._prompts)))
        seed = self._settings.calibration_seed
        return calibrated_head_recipes(self._prompts, self._settings.budgets, policies, use, self._with.model, seed=seed)

    def of_predictions(self, policies: Sequence[Policy]) -> Recipes:
        tokens = tokens_of(self._with.checkpoint, max(map(len, self._prompts)), self._with.tell)
        kind, seed = recipe_kind(policies[0]), self._settings.calibration_seed
        config, budgets = self._with.checkpoint.config, self._settings.budgets
        return surrogate_recipes(self._prompts, budgets, kind, tokens, self._with.model, config, seed=seed)

    def stored(
        self,
        name: str,
        calibrated: Callable[[Sequence[Policy]], Recipes],
        policies: Sequence[Policy],
        known: Recipes | None = None,
    ) -> Recipes:
        """The recipes of ``policies``: of the known ones, read back, or calibrated and stored; none for no policies."""
        settings, known = self._settings, self._with.known if known is None else known
        if not policies:
            return Recipes(facts=())
        kinds = {recipe_kind(policy) for policy in policies}
        if known.have(kinds, settings.budgets):
            names = {kind.name for kind in kinds}
            return Recipes(facts=tuple(facts for facts in known.facts if facts.score in names))
        return self._with.store.get_or_measure(
            name,
            Recipes,
            lambda: calibrated(policies),
            budgets=list(settings.budgets),
            calibration=[settings.calibration_samples, settings.calibration_tokens, settings.calibration_seed],
            policies=sorted(map(repr, policies)),
        )

    @cached_property
    def _prompts(self) -> list[list[int]]:
        plan = CalibrationPlan(samples=self._settings.calibration_samples, seed=self._settings.calibration_seed)
        return calibration_prompts(self._with.checkpoint, plan, self._settings.calibration_tokens, on_note=self._with.tell)
