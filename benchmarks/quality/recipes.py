"""The recipes of a report: trt-kv's calibration on the calibration split, every score from one pass over the prompts.

Policies whose KV heads have budgets of their own get recipes of LU-KV's kind (``calibration/lukv.py``).

L layers, K KV heads, N tokens of a prompt.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.quality.cases import Encode
from benchmarks.quality.harness import Harness
from benchmarks.quality.results import RecipeFacts
from benchmarks.quality.settings import Settings
from benchmarks.quality.store import Store
from trt_kv.calibration.kvzap import TokensOf, calibrate_kvzap
from trt_kv.calibration.lukv import UsefulnessOf, calibrate_lukv
from trt_kv.calibration.prefixkv import calibrate_prefixkv_budgets
from trt_kv.calibration.tasks import calibration_prompts
from trt_kv.errors import ReportError
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.predicted_scores.frequencies import key_frequencies
from trt_kv.policy import Policy
from trt_kv.recipe import Protected, Recipe, RecipeModel, RecipeScore, recipe_score
from trt_kv.surrogate import Predictor

SOURCE = "bundled synthetic English, calibration split"


@dataclass(frozen=True, kw_only=True)
class RecipeKind:
    """Key of a recipe without its budget: a ranking, and the tokens that are never evicted."""

    score: RecipeScore
    protected: Protected

    @property
    def name(self) -> str:
        """E.g. "score window (32 queries), 1 first and 32 last tokens protected"; PrefixKV's own protection is left out."""
        parts = [self.score.described]
        if self.protected != Protected():
            parts.append(f"{self.protected.sinks} first and {self.protected.recent} last tokens protected")
        if self.score.heads == "own":
            parts.append("a share for each KV head")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """With what each layer of the cache predicts scores at a budget."""

    budget: float
    predictors: tuple[Predictor, ...]


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """All recipes of a report, and what predicts scores at each budget, if a policy needs that."""

    facts: tuple[RecipeFacts, ...]
    predicted: tuple[Predicted, ...] = ()

    def predictors(self, budget: float) -> tuple[Predictor, ...]:
        """With what the layers of the cache predict scores at a budget."""
        return next(of.predictors for of in self.predicted if of.budget == budget)

    def have(self, kinds: Collection[RecipeKind], budgets: Collection[float]) -> bool:
        """Whether there is a recipe of each of ``kinds`` at each of ``budgets``."""
        held = {(recipe.score, recipe.budget) for recipe in self.facts}
        return all((kind.name, budget) in held for kind in kinds for budget in budgets)

    def kept(self, kind: RecipeKind, budget: float) -> tuple[float, ...]:
        """The kept shares of the layers of the cache (``trt_kv/cache_layers.py``) at a mean kept share."""
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
    """Recipes for ``policies``, which all need one of layers, at every budget, from ``prompts`` of the calibration split."""
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
            source=SOURCE,
            seed=seed,
            protected=kind.protected,
        )
    ]
    return Recipes(facts=tuple(_facts(kind, recipe) for kind, recipe in recipes))


def calibrated_head_recipes(
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[float],
    policies: Sequence[Policy],
    usefulness_for: Callable[[Policy], UsefulnessOf],
    model: RecipeModel,
    *,
    seed: int,
) -> Recipes:
    """The same for ``policies`` whose KV heads have shares of their own. ``usefulness_for``: what ``calibrate_lukv`` takes."""
    facts = []
    for kind, policy in {recipe_kind(policy): policy for policy in policies}.items():
        usefulness_of = usefulness_for(policy)
        found = {tuple(ids): usefulness_of(ids) for ids in prompts}
        for budget in budgets:
            recipe = calibrate_lukv(
                prompts,
                lambda ids, found=found: found[tuple(ids)],  # type: ignore[misc]
                budget=budget,
                score=kind.score,
                model=model,
                source=SOURCE,
                seed=seed,
                protected=kind.protected,
            )
            assert recipe.heads is not None
            facts.append(_facts(kind, recipe, heads_apart=recipe.heads.n_kv_heads))
    return Recipes(facts=tuple(facts))


def surrogate_recipes(
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[float],
    kind: RecipeKind,
    tokens_of: TokensOf,
    model: RecipeModel,
    config: ModelConfig,
    *,
    seed: int,
) -> Recipes:
    """The same for policies whose scores are predicted, for each KV head, from one calibration. ``tokens_of``: what
    ``calibrate_kvzap`` takes.
    """
    how = {"score": kind.score, "model": model, "source": SOURCE, "seed": seed, "protected": kind.protected}
    recipe = calibrate_kvzap(prompts, tokens_of, budget=budgets[0], **how)  # type: ignore[arg-type]
    facts = [_facts(kind, recipe.with_budget(budget)) for budget in budgets]
    assert recipe.surrogate is not None
    frequencies, heads_apart = key_frequencies(config), config.n_kv_heads
    predicted = [
        Predicted(
            budget=budget,
            predictors=tuple(recipe.surrogate.predictors(config, budget, frequencies, heads_apart=heads_apart)),
        )
        for budget in budgets
    ]
    return Recipes(facts=tuple(facts), predicted=tuple(predicted))


def _facts(kind: RecipeKind, recipe: Recipe, *, heads_apart: int = 1) -> RecipeFacts:
    kept = tuple(recipe.shares_of_cache(heads_apart=heads_apart))
    return RecipeFacts(score=kind.name, budget=recipe.budget, kept=kept, mass=recipe.mass or 0.0)
