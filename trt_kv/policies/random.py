"""Tokens by lot, each KV head its own: what any ranking has to beat."""

from trt_kv.policy import Policy

POLICY = Policy(
    name="random",
    summary="tokens by lot, the same share for every layer",
    score="random",
    budget="uniform",
    kept=0.5,
    decode="rank",
)
