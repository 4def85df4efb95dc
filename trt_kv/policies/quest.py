"""Quest (arXiv 2406.10774), as the FreeKV paper compares with it: every step chooses its pages by its own query, before it
attends. The original leaves the first two layers out, takes pages of 16 tokens, keeps no sinks or window apart and moves
nothing.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="quest",
    summary="the cache on the host; every step recalls the pages that its own query asks for, and waits for them",
    score="pages",
    residency="host",
    budget="constant",
    tokens=2048,
    sinks=128,
    recent=128,
    decode="keep",
    tau=1.01,
    group_pooling="max_raw",
    exempt_layers=(0,),
    metric_order="position",
)
