"""FreeKV as published (arXiv 2505.13109), with its settings for long inputs: the whole cache on the host, pages recalled ahead
of time for the query before, and again for heads whose query drifted. No layer is exempt, as in the released system; the
released accuracy harness leaves layer 0 out (``--set exempt_layers=0``). For long generation the paper takes sinks and window
of 512 and tau 0.9.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="freekv",
    summary="the cache on the host; pages for a step are recalled during the one before, and corrected where the query drifted",
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
