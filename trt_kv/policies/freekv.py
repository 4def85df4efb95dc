"""FreeKV as published (arXiv 2505.13109), with its settings for long inputs: the whole cache on the host, pages recalled ahead
of time with the previous step's query, and again for heads whose query drifted. No layer is exempt, as in the released system;
the released accuracy harness exempts layer 0 (``--set exempt_layers=0``). For long generation the paper takes sinks and window
of 512 and tau 0.9.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="freekv",
    summary="the cache on the host; pages are recalled one step ahead, and corrected for KV heads whose query drifted",
    score="pages",
    residency="host",
    budget="constant",
    tokens=2048,
    sinks=128,
    recent=128,
    decode="keep",
    tau=0.8,
    metric_order="position",
)
