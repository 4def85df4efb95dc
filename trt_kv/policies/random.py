"""Random tokens, drawn for each KV head: the baseline of every ranking."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="random",
    summary="random tokens, the same share for every layer",
    score="random",
    budget="uniform",
    kept=0.5,
    decode="rank",
    floor=DEFAULT_FLOOR,
)
