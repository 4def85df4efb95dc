"""Quest (arXiv 2406.10774), as the FreeKV paper compares with it: every step selects its pages with its own query before it
attends. The original exempts the first two layers, has pages of 16 tokens and no separate sinks or window, and keeps the
cache on the GPU.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="quest",
    summary="the cache on the host; every step recalls the pages that its own query selects, and waits for them",
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
