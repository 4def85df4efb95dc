"""The worst case over an observation window instead of its average (DefensiveKV, arXiv 2510.13334), with the norm of the value.

The paper weighs by the norm after the output projection, and pools before it takes the maximum:
docs/decisions/0072-defensive-scores.md.
"""

from trt_kv.errors import UsageError
from trt_kv.policy import Policy
from trt_kv.score import Score


def check(policy: Policy) -> None:
    """``UsageError`` if decoding would raise finished scores, which are products, by attention weights."""
    if policy.decode == "rank":
        raise UsageError(
            "decode 'rank' goes on with the scores of the prompt, and these have been multiplied by norms of values",
            got=f"score {policy.score!r}",
            expected="a score that is a sum, such as mass or window, with decode 'rank'",
            fix="--set score=window, or --set decode=keep",
        )


SCORE = Score(
    name="defensive_v",
    summary="largest attention from any of the last `window` prompt queries and any query head, at least the mean, times the "
    "norm of the value (DefensiveKV without the output projection)",
    token_scores=lambda policy: {"window": policy.window, "maximum": 1, "value_norm": 1},
    settings=("window",),
    check=check,
)
