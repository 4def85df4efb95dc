"""A prediction of how much later text attends to a token, from its key and value (KVzap, arXiv 2601.07891).

It does not depend on what is asked. docs/decisions/0078-predicted-scores.md.
"""

from trt_kv.errors import UsageError
from trt_kv.policy import Policy
from trt_kv.score import Score


def check(policy: Policy) -> None:
    """``UsageError`` for settings that predictions do not have."""
    if policy.pooling != 1 or policy.heads == "shared" or policy.decode == "rank":
        raise UsageError(
            f"score {policy.score!r} is predicted for each token and KV head from its key and value",
            got=f"pooling {policy.pooling}, heads {policy.heads!r}, decode {policy.decode!r}",
            expected="pooling 1, heads 'own' or 'each', another decode than 'rank'",
            fix="--set pooling=1 heads=own decode=keep",
        )


SCORE = Score(
    name="surrogate",
    summary="attention that later text is expected to pay, predicted by a calibrated linear function of key and value",
    predicts=True,
    check=check,
)
