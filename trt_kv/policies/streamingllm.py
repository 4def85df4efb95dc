"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window. Keys keep their true positions."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="streamingllm",
    summary="4 sinks and the newest tokens, a window that slides while decoding",
    score="position",
    budget="uniform",
    kept=0.5,
    sinks=4,
    recent=0,
    decode="rank",
    floor=DEFAULT_FLOOR,
)
