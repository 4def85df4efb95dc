"""Checks that recipes and drift thresholds from files match the request."""

import dataclasses
from pathlib import Path

from trt_kv.drift import Drift, drift_settings
from trt_kv.errors import UsageError
from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import DriftPlan
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy
from trt_kv.policy_settings import DEFAULT_KEPT, SHARED_BUDGETS
from trt_kv.recipe import Recipe, recipe_score


def drift_of_plan(policy: Policy, plan: DriftPlan, on_note: OnNote) -> Drift | None:
    """The thresholds in the file of ``plan``, if it names one. Raises ``UsageError`` if the request has another rate."""
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
        on_note(f"the thresholds were measured with {told}: correction rates may differ here")
    return loaded


def recipe_for_policy(path: Path, policy: Policy) -> Recipe:
    """The recipe in a file, for the budget of ``policy`` if the user chose one and the recipe tells it for every budget."""
    recipe = Recipe.load(path)
    another = policy.needs_recipe and budget_is_chosen(policy) and policy.kept != recipe.budget
    return recipe.with_budget(policy.kept) if recipe.has_all_budgets and another else recipe


def budget_is_chosen(policy: Policy) -> bool:
    """Whether ``policy`` has another budget than it would have without options."""
    preset = policy_from_name(policy.name) if policy.name in policy_names() else None
    default = preset.kept if preset is not None and preset.budget in SHARED_BUDGETS else DEFAULT_KEPT
    return preset is None or policy.kept != default


def policy_of_recipe(policy: Policy, recipe: Recipe, on_note: OnNote) -> Policy:
    """``policy`` with the recipe's budget. Raises ``UsageError`` if ``policy`` has another one."""
    if budget_is_chosen(policy) and abs(policy.kept - recipe.budget) > 1e-6:
        raise UsageError(
            "the recipe was made for another budget",
            got=f"--budget {policy.kept}",
            expected=recipe.budget,
            fix="leave --budget out",
        )
    ranks_otherwise = recipe_score(policy) != recipe.score and not policy.recalls
    if ranks_otherwise and recipe.surrogate is None and not policy.scoring.predicts:  # those recipes are of no other policy
        score = recipe.score
        settings = [f"score={score.name}", *([f"window={score.window}"] if score.window else [])]
        settings += [f"heads={score.heads}", f"pooling={score.pooling}"]
        on_note(
            f"the recipe's shares were found with {score.described}, this policy ranks by {policy.score}; "
            f"to rank as the recipe does, add --set {' '.join(settings)}"
        )
    return dataclasses.replace(policy, kept=recipe.budget)
