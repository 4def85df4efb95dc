"""Attention mass without its preference for early tokens, which more queries could see (kvpress, ObservedAttentionPress)."""

from trt_kv.errors import UsageError
from trt_kv.policy import Policy
from trt_kv.score import Score


def check(policy: Policy) -> None:
    """``UsageError`` if decoding would add to a mean as if it were a sum."""
    if policy.decode == "rank":
        raise UsageError(
            "decode 'rank' adds each new query's attention to the scores, and a mean over queries is not a sum",
            got=f"score {policy.score!r}",
            expected="a score that is a sum, such as mass or window, with decode 'rank'",
            fix="--set score=mass, or --set decode=keep",
        )


SCORE = Score(
    name="mean_mass",
    summary="attention received, averaged over the prompt queries that could see the token",
    token_scores=lambda _: {"average": 1},
    check=check,
)
