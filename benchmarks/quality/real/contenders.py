"""The policies that are compared on a real model: every preset, without floor as in the papers, at several kept shares."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.quality.harness import Plan
from benchmarks.quality.recall.policies import small
from benchmarks.quality.recipes import Recipes, recipe_kind
from trt_kv.policies import policy_from_name, policy_names, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import SHARED_BUDGETS

Group = Literal["reference", "published", "host", "ours"]
PUBLISHED = (
    *("prefixkv_paper", "uniform", "streamingllm", "h2o", "snapkv", "pyramidkv", "refreekv", "random"),
    *("defensivekv_v", "randomdecode"),
)
HOST = ("freekv", "quest", "arkvale", "bestkey")


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """A policy of the report. ``group``: "reference" (the full cache), "published", "host" (published, its cache on the host)
    or "ours". ``adaptive``: it finds its budget from the input."""

    name: str
    group: str
    adaptive: bool


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A policy; its ``kept`` is replaced by each share in turn."""

    facts: PolicyRow
    policy: Policy

    def plan(self, recipes: Recipes, budget: float | None, *, lots: int) -> Plan:
        """The policy as in an engine; ``budget`` None if it finds its own. ``lots``: the seed of random scores."""
        policy = self.policy
        if "seed" in policy.scoring.settings:
            policy = dataclasses.replace(policy, seed=lots)
        if budget is None:
            return Plan(policy=policy)
        policy = dataclasses.replace(policy, kept=budget)
        if policy.scoring.predicts:
            return Plan(policy=policy, predictors=recipes.predictors(budget))
        return Plan(policy=policy, kept_shares=recipes.kept(recipe_kind(policy), budget) if policy.needs_recipe else None)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the report: a policy at a share, None if it finds its own."""

    contender: Contender
    budget: float | None

    @property
    def key(self) -> tuple[str, float | None]:
        return self.contender.facts.name, self.budget


def contenders() -> list[Contender]:
    """The full cache first. A new preset is included by itself, in the group "ours"."""
    ours = [name for name in policy_names() if name not in ("full", *PUBLISHED, *HOST)]
    groups: list[tuple[Group, Sequence[str]]] = [
        ("reference", ["full"]),
        ("published", PUBLISHED),
        ("ours", sorted(ours, key=lambda name: name != "prefixkv")),
        ("host", HOST),
    ]
    return [_contender(name, group) for group, names in groups for name in names]


def _contender(name: str, group: Group) -> Contender:
    policy = policy_from_name(name)
    policy = small(policy) if policy.recalls else policy_without_floor(name)
    adaptive = policy.budget not in SHARED_BUDGETS
    return Contender(facts=PolicyRow(name=name, group=group, adaptive=adaptive), policy=policy)


def entries_of(known: Sequence[Contender], budgets: Sequence[float], recall_budgets: Sequence[float]) -> list[Entry]:
    """Every row, the full cache first."""
    found: list[Entry] = []
    for contender in known:
        shares: Sequence[float | None] = recall_budgets if contender.policy.recalls else budgets
        shares = [None] if contender.facts.adaptive else shares
        found += [Entry(contender=contender, budget=share) for share in shares]
    return found
