"""Our own: no budget is asked for. The window's attention, followed back from the newest token, says how many tokens a layer
keeps (ReFreeKV's Uni-Metric on the rows of an observation window); the same attention, pooled, says which.

ReFreeKV reads both off the last query's row and keeps the newest tokens. docs/decisions/0015-reach.md has what was tried.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="reach",
    summary="as many tokens as the window's attention reaches back, chosen by that attention; no budget, no calibration",
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
)
