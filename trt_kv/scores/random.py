"""Lots that hang on the policy's seed, layer, KV head and position alone: the baseline."""

from trt_kv.errors import UsageError
from trt_kv.policy import Policy
from trt_kv.score import Score


def check(policy: Policy) -> None:
    """``UsageError`` where a budget would be found along the lots."""
    if policy.budget == "unimetric" and policy.metric_order == "ranking":
        raise UsageError(
            "budget 'unimetric' sums up attention along the ranking, and a ranking by lot sums up nothing",
            got=f"score {policy.score!r}",
            expected="a score that is no lot, such as position or window, or metric_order position",
            fix="--set metric_order=position",
        )


SCORE = Score(name="random", summary="by lot: what any ranking has to beat", ranking=2, settings=("seed",), check=check)
