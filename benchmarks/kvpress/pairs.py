"""Presses of kvpress paired with our policies for the same methods."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.kvpress.set_up import press_class
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``press`` of ``kvpress.presses.<module>``, with ``options``, paired with ``policy``, which is ``named`` in tables.

    ``same``: whether both should keep the same tokens if they keep the same number, at least ``at_least``.
    """

    press: str
    module: str
    policy: Policy
    named: str
    same: bool
    at_least: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def press_at(self, share: float) -> Any:
        """The press configured to keep ``share`` in (0, 1]."""
        return press_class(self.module, self.press)(compression_ratio=1.0 - share, **self.options)

    def policy_at(self, share: float) -> Policy:
        """Our policy with the kept ``share`` in (0, 1]."""
        return dataclasses.replace(self.policy, kept=share)


SNAPKV = policy_without_floor("snapkv")
OBSERVED = dataclasses.replace(policy_without_floor("h2o"), score="mean_mass", recent_share=0.0, decode="keep")
"""H2O as in kvpress: means instead of sums, and no protected tokens."""
LOTS = dataclasses.replace(policy_without_floor("random"), sinks=0, recent=0)
"""Random tokens, none protected."""

STREAMING_PAIR = Pair(
    press="StreamingLLMPress",
    module="streaming_llm_press",
    policy=policy_without_floor("streamingllm"),
    named="streamingllm",
    same=True,
)
SNAPKV_PAIR = Pair(
    press="SnapKVPress",
    module="snapkv_press",
    policy=SNAPKV,
    named="snapkv",
    same=True,
    at_least=SNAPKV.window,
)
OBSERVED_PAIR = Pair(
    press="ObservedAttentionPress",
    module="observed_attention_press",
    policy=OBSERVED,
    named="h2o with mean_mass, nothing protected",
    same=True,
)
H2O_PAIR = dataclasses.replace(OBSERVED_PAIR, policy=policy_without_floor("h2o"), named="h2o", same=False)
PYRAMID_PAIR = Pair(
    press="PyramidKVPress",
    module="pyramidkv_press",
    policy=policy_without_floor("pyramidkv"),
    named="pyramidkv",
    same=False,
)
RANDOM_PAIR = Pair(
    press="RandomPress", module="random_press", policy=LOTS, named="random, nothing protected", same=False, options={"seed": 0}
)
PAIRS = (STREAMING_PAIR, SNAPKV_PAIR, OBSERVED_PAIR, H2O_PAIR, PYRAMID_PAIR, RANDOM_PAIR)
