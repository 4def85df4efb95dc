"""The policies that the report compares: every preset, and presets with one part replaced. None has a floor,
as in the papers.

A new preset in ``trt_kv/policies`` is included automatically, in the group "ours", unless its KV heads have budgets of their
own; those that keep the cache on the host are in ``recall.policies``.
"""

import dataclasses
from dataclasses import dataclass

from benchmarks.quality.results import PolicyFacts
from trt_kv.policies import policy_from_name, policy_names, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import SHARED_BUDGETS, differences, setting_as_text
from trt_kv.recipe import recipe_score

PUBLISHED = ("prefixkv_paper", "uniform", "streamingllm", "h2o", "snapkv", "pyramidkv", "random", "refreekv")
THRESHOLDS = (0.001, 0.003, 0.03, 0.1)
"""ReFreeKV's thresholds besides its own 1 %."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A policy of the report; fields as in ``PolicyFacts``. ``policy.kept`` is replaced by each kept share in turn."""

    name: str
    label: str
    group: str
    policy: Policy
    searches: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether there is no kept share to choose."""
        return self.policy.budget not in SHARED_BUDGETS

    @property
    def recipe_policy(self) -> Policy:
        """The policy whose recipe sets the layers' shares, if there is one."""
        return self.policy

    @property
    def facts(self) -> PolicyFacts:
        """Its description in the results."""
        policy = self.policy
        settings = {name: value for name, value in differences(policy, Policy(name="", summary="")).items() if name != "kept"}
        return PolicyFacts(
            name=self.name,
            label=self.label,
            group=self.group,
            settings=" ".join(setting_as_text(name, value) for name, value in settings.items()),
            recipe=recipe_score(self.recipe_policy).described if policy.needs_recipe else "",
            adaptive=self.adaptive,
            searches=self.searches,
            threshold=policy.threshold if policy.budget == "unimetric" else None,
            exempt_layers=policy.exempt_layers,
        )


def contenders() -> list[Contender]:
    """Every policy of the report, the full cache first."""
    presets = {name: policy_without_floor(name) for name in policy_names() if has_shared_pages(name)}
    ours = [name for name, policy in presets.items() if name not in (*PUBLISHED, "full") and not policy.recalls]
    return [
        Contender(name="full", label="full cache", group="reference", policy=policy_without_floor("full")),
        *(Contender(name=name, label=name, group="published", policy=policy_without_floor(name)) for name in PUBLISHED),
        *(Contender(name=name, label=name, group="ours", policy=policy_without_floor(name)) for name in ours),
        *_choices(),
        *_thresholds(),
        *_ablations(),
    ]


def has_shared_pages(name: str) -> bool:
    """Whether KV heads share pages, as in the report's caches: budgets of single heads cannot be measured there."""
    return policy_from_name(name).heads != "own"


def _choices() -> list[Contender]:
    """PrefixKV and its uniform variant with another score, another protection, a ranking per head, or shares per input."""
    prefixkv, uniform = policy_without_floor("prefixkv_paper"), policy_without_floor("uniform")
    window = dataclasses.replace(prefixkv, score="window", window=32)
    each = dataclasses.replace(window, heads="each")
    policies = {
        "window": ("window score, its recipe", window),
        "window-uniform": ("window score, uniform layers", dataclasses.replace(uniform, score="window", window=32)),
        "window-heads": ("window score per KV head, its recipe", each),
        "window-pooled": ("window score per KV head, pooled, its recipe", dataclasses.replace(each, pooling=15)),
        "mean-uniform": ("mean mass score, uniform layers", dataclasses.replace(uniform, score="mean_mass")),
        "mass-recent": ("prefixkv_paper, last 32 tokens protected", dataclasses.replace(prefixkv, recent=32)),
        "random-recipe": ("random tokens, prefixkv_paper's recipe", dataclasses.replace(prefixkv, score="random")),
    }
    searched = {
        "mass-online": ("prefixkv_paper, searched per input", prefixkv),
        "window-online": ("window, searched per input", window),
    }
    return [
        *(Contender(name=name, label=label, group="choice", policy=policy) for name, (label, policy) in policies.items()),
        *(
            Contender(name=name, label=label, group="choice", policy=policy, searches=True)
            for name, (label, policy) in searched.items()
        ),
    ]


def _thresholds() -> list[Contender]:
    refreekv = policy_without_floor("refreekv")
    return [
        Contender(
            name=f"refreekv-{threshold}",
            label=f"refreekv, T = {100 * threshold:g} %",
            group="threshold",
            policy=dataclasses.replace(refreekv, threshold=threshold),
        )
        for threshold in THRESHOLDS
    ]


def _ablations() -> list[Contender]:
    """Ablations of ReFreeKV, each with one part replaced."""
    refreekv = policy_without_floor("refreekv")
    parts: dict[str, tuple[str, dict[str, object]]] = {
        "refreekv-attention": (
            "ranked by the last query's attention instead of position",
            {"score": "window", "window": 1, "heads": "each"},
        ),
        "refreekv-no-exempt": ("no layer exempt", {"exempt_layers": ()}),
        "refreekv-sinks-in": ("sinks in the norm", {"norm": "sinks_in"}),
        "refreekv-no-exempt-sinks-in": ("no layer exempt, sinks in the norm", {"exempt_layers": (), "norm": "sinks_in"}),
    }
    return [
        Contender(name=name, label=label, group="ablation", policy=dataclasses.replace(refreekv, **changes))  # type: ignore[arg-type]
        for name, (label, changes) in parts.items()
    ]
