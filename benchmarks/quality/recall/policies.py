"""The host-resident policies that the report compares: the presets, variants with one part replaced, and combinations.

All of them attend to the same sinks and newest tokens, and no layer is exempt unless stated, so that at one share a step
attends to the same number of tokens under every policy.
"""

import dataclasses
from dataclasses import dataclass

from benchmarks.quality.policies import Contender
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy

PUBLISHED_HOST = ("freekv", "quest", "arkvale")
SINKS, RECENT = 4, 16
SYNCHRONOUS, NEVER_CORRECTED = 1.01, -1.01
"""Values of tau at which every step, or no step, chooses by its own query."""
TAUS = (0.5, 0.7, 0.9, 0.95)
"""Further values of tau, besides FreeKV's own 0.8 and the two above."""


@dataclass(frozen=True, kw_only=True)
class HostContender(Contender):
    """A contender whose cache stays on the host. ``recipe_of``: the policy whose recipe sets its layers' shares, if any."""

    recipe_of: Policy | None = None

    @property
    def recipe_policy(self) -> Policy:
        return self.recipe_of or self.policy


def host_contenders() -> list[HostContender]:
    """Every host-resident policy of the report.

    Groups: "host", "mixture" (FreeKV with another policy's budgets), "combined" (with another one's ranking, too), "tau",
    "choosing" (how pages are ranked), "exempt".
    """
    freekv, quest, arkvale = (small(policy_from_name(name)) for name in PUBLISHED_HOST)
    recipe = dataclasses.replace(freekv, budget="recipe")
    adaptive = dataclasses.replace(freekv, budget="unimetric")
    host = [
        _contender("freekv", "freekv", freekv),
        _contender(
            "freekv-uncorrected", "freekv, never corrected (tau -1.01)", dataclasses.replace(freekv, tau=NEVER_CORRECTED)
        ),
        _contender("freekv-synchronous", "freekv, no speculation (tau 1.01)", dataclasses.replace(freekv, tau=SYNCHRONOUS)),
        _contender("quest", "quest", quest),
        _contender("arkvale", "arkvale", arkvale),
        HostContender(name="freekv-recipe", label="freekv, prefixkv_paper's recipe", group="mixture", policy=recipe),
        HostContender(
            name="freekv-windowrecipe",
            label="freekv, prefixkv's recipe",
            group="mixture",
            policy=recipe,
            recipe_of=policy_from_name("prefixkv"),
        ),
        _contender("freekv-unimetric", "freekv, unimetric", adaptive, group="mixture"),
    ]
    raw = dataclasses.replace(freekv, group_pooling="mean_raw", page_summary="deviation")
    combined = [
        _contender("freekv-arkvale", "freekv, arkvale's ranking", raw, group="combined"),
        HostContender(
            name="freekv-arkvale-windowrecipe",
            label="freekv, arkvale's ranking, prefixkv's recipe",
            group="combined",
            policy=dataclasses.replace(raw, budget="recipe"),
            recipe_of=policy_from_name("prefixkv"),
        ),
    ]
    choosing = {
        "freekv-max-softmax": ("largest softmax of a group (MaxS)", {"group_pooling": "max_softmax"}),
        "freekv-mean-raw": ("mean bound of a group (MeanQK)", {"group_pooling": "mean_raw"}),
        "freekv-max-raw": ("largest bound of a group (MaxQK)", {"group_pooling": "max_raw"}),
        "freekv-deviation": ("pages summed up by their mean deviation", {"page_summary": "deviation"}),
        "freekv-scaled": ("softmax over bounds / sqrt(head size)", {"softmax_scale": 32**-0.5}),
    }
    return [
        *host,
        *_other_presets(),
        *combined,
        *(
            _contender(f"freekv-tau-{tau}", f"freekv, tau {tau}", dataclasses.replace(freekv, tau=tau), group="tau")
            for tau in TAUS
        ),
        *(
            _contender(name, label, dataclasses.replace(freekv, **changes), group="choosing")
            for name, (label, changes) in choosing.items()
        ),
        *(
            _contender(
                f"{name}-exempt", f"{name}, layer 0 exempt", dataclasses.replace(policy, exempt_layers=(0,)), group="exempt"
            )
            for name, policy in (("freekv", freekv), ("quest", quest), ("arkvale", arkvale))
        ),
    ]


def _other_presets() -> list[HostContender]:
    """All presets; new ones are included automatically."""
    presets = [policy_from_name(name) for name in policy_names() if name not in PUBLISHED_HOST]
    return [_contender(policy.name, policy.name, small(policy)) for policy in presets if policy.recalls]


def small(policy: Policy) -> Policy:
    """A preset with sinks and window for contexts of a few thousand tokens, and a budget that is a share of the prompt."""
    return dataclasses.replace(policy, budget="uniform", tokens=0, sinks=SINKS, recent=RECENT, exempt_layers=())


def _contender(name: str, label: str, policy: Policy, *, group: str = "host") -> HostContender:
    return HostContender(name=name, label=label, group=group, policy=policy)
