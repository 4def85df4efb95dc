"""Our own, without a budget to set. The window's attention, accumulated from the newest token back, determines how many tokens
a layer keeps (ReFreeKV's Uni-Metric on the rows of an observation window); the same attention, pooled, determines which.

ReFreeKV uses the last query's row for the number and keeps the newest tokens. docs/decisions/0015-reach.md has what was tried.
"""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="reach",
    summary="as many tokens as the window's attention reaches back, ranked by that attention; no budget to set, no calibration",
    score="window",
    budget="unimetric",
    heads="each",
    window=32,
    pooling=15,
    sinks=4,
    recent=0,
    recent_share=0.1,
    threshold=0.01,
    metric_row="scores",
    metric_order="position",
    decode="keep",
    floor=DEFAULT_FLOOR,
)
