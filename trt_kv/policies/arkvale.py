"""ArkVale (NeurIPS 2024), as the FreeKV paper compares with it: like ``quest``, with its own summaries and pooling."""

from trt_kv.policy import Policy

POLICY = Policy(
    name="arkvale",
    summary="as quest, with pages summed up by their middle and mean deviation, and the mean bound of a KV head's queries",
    score="pages",
    residency="host",
    budget="constant",
    tokens=2048,
    sinks=128,
    recent=128,
    decode="keep",
    tau=1.01,
    page_summary="deviation",
    group_pooling="mean_raw",
    exempt_layers=(0,),
    metric_order="position",
)
