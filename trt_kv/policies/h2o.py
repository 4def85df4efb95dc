"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention per head, and an equal number of the newest tokens."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="h2o",
    summary="half heavy hitters by accumulated attention per KV head, half newest tokens; updated while decoding",
    score="mass",
    budget="uniform",
    kept=0.5,
    heads="each",
    sinks=0,
    recent=0,
    recent_share=0.5,
    decode="rank",
    floor=DEFAULT_FLOOR,
)
