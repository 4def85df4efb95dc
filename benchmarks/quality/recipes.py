"""The recipes of a report: trt-kv's calibration on the calibration split, every score from one pass over the prompts.

L layers, K KV heads, N tokens of a prompt.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.quality.cases import Encode
from benchmarks.quality.harness import Harness
from benchmarks.quality.results import RecipeFacts
from benchmarks.quality.settings import Settings
from benchmarks.quality.store import Store
from trt_kv.calibration.prefixkv import calibrate_prefixkv_budgets
from trt_kv.calibration.tasks import calibration_prompts
from trt_kv.errors import ReportError
from trt_kv.policy import Policy
from trt_kv.recipe import Protected, RecipeModel, RecipeScore, recipe_score


@dataclass(frozen=True, kw_only=True)
class RecipeKind:
    """Key of a recipe without its budget: a ranking, and the tokens that are never evicted."""

    score: RecipeScore
    protected: Protected

    @property
    def name(self) -> str:
        """E.g. "score window (32 queries), 1 first and 32 last tokens protected"; PrefixKV's own protection is left out."""
        if self.protected == Protected():
            return self.score.described
        return f"{self.score.described}, {self.protected.sinks} first and {self.protected.recent} last tokens protected"


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """All recipes of a report."""

    facts: tuple[RecipeFacts, ...]

    def have(self, kinds: Collection[RecipeKind], budgets: Collection[float]) -> bool:
        """Whether there is a recipe of each of ``kinds`` at each of ``budgets``."""
        held = {(recipe.score, recipe.budget) for recipe in self.facts}
        return all((kind.name, budget) in held for kind in kinds for budget in budgets)

    def kept(self, kind: RecipeKind, budget: float) -> tuple[float, ...]:
        """The layers' kept shares at a mean kept share."""
        for recipe in self.facts:
            if (recipe.score, recipe.budget) == (kind.name, budget):
                return recipe.kept
        raise ReportError("the report has no such recipe", got=f"{kind.name} at {budget}", fix="measure again: make report")


def recipe_kind(policy: Policy) -> RecipeKind:
    """The kind of recipe that ``policy`` needs, as in ``trt-kv build``."""
    return RecipeKind(score=recipe_score(policy), protected=Protected(sinks=policy.sinks, recent=policy.recent))


def stored_recipes(
    store: Store,
    name: str,
    harness: Harness,
    encode: Encode,
    settings: Settings,
    policies: Sequence[Policy],
    model: RecipeModel,
) -> Recipes:
    """Recipes for all ``policies`` that need one, at every budget of the report: the part ``name`` of the store."""
    needing = [policy for policy in policies if policy.needs_recipe]
    budgets = sorted({budget for plan in settings.contexts for budget in plan.budgets})

    def calibrated() -> Recipes:
        tasks = calibration_prompts(
            settings.calibration_samples, context_length=settings.calibration_context, seed=settings.calibration_seed
        )
        prompts = [encode(task.prompt) for task in tasks]
        return calibrated_recipes(harness, prompts, budgets, needing, model, seed=settings.calibration_seed)

    return store.get_or_measure(
        name,
        Recipes,
        calibrated,
        budgets=budgets,
        calibration=[settings.calibration_samples, settings.calibration_context, settings.calibration_seed],
        policies=sorted(map(repr, needing)),
    )


def calibrated_recipes(
    harness: Harness,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[float],
    policies: Sequence[Policy],
    model: RecipeModel,
    *,
    seed: int,
) -> Recipes:
    """Recipes for ``policies``, all of which need one, at every budget, from ``prompts`` of the calibration split."""
    kinds = list({kind.name: kind for kind in map(recipe_kind, policies)}.values())
    found = {tuple(ids): harness.importance(ids, [kind.score for kind in kinds]) for ids in prompts}
    recipes = [
        (kind, recipe)
        for number, kind in enumerate(kinds)
        for recipe in calibrate_prefixkv_budgets(
            prompts,
            lambda ids, number=number: found[tuple(ids)][number],  # type: ignore[misc]
            budgets=budgets,
            score=kind.score,
            model=model,
            source="bundled synthetic English, calibration split",
            seed=seed,
            protected=kind.protected,
        )
    ]
    facts = [
        RecipeFacts(score=kind.name, budget=recipe.budget, kept=recipe.kept, mass=recipe.mass or 0.0)
        for kind, recipe in recipes
    ]
    return Recipes(facts=tuple(facts))
