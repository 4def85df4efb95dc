"""A random ranking that depends on the policy's seed, layer, KV head and position alone: the baseline."""

from trt_kv.errors import UsageError
from trt_kv.policy import Policy
from trt_kv.score import Score


def check(policy: Policy) -> None:
    """``UsageError`` if a budget would be computed along the random ranking."""
    if policy.budget == "unimetric" and policy.metric_order == "ranking":
        raise UsageError(
            "budget 'unimetric' accumulates attention along the ranking, which means nothing for a random one",
            got=f"score {policy.score!r}",
            expected="another score, such as position or window, or metric_order position",
            fix="--set metric_order=position",
        )


SCORE = Score(name="random", summary="random order: the baseline of every ranking", ranking=2, settings=("seed",), check=check)
