"""ReFreeKV as released (arXiv 2502.16886): no budget to set, each layer's is computed from the input."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="refreekv",
    summary="sinks and the newest tokens, as many per layer as hold 99 % of the last query's attention norm",
    score="position",
    budget="unimetric",
    threshold=0.01,
    sinks=4,
    recent=0,
    decode="keep",
    exempt_layers=(0, 1),
    floor=DEFAULT_FLOOR,
)
