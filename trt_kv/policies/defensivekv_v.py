"""DefensiveKV's ranking (arXiv 2510.13334) with the norm of the value before the output projection, and the same share for
every layer: score ``defensive_v``. The published method lets heads and layers share one budget, and pools over 5 neighbours:
with so few it lost the facts of our prompts, like SnapKV (docs/decisions/0072-defensive-scores.md).
"""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="defensivekv_v",
    summary="the largest attention from the last 32 queries, times the norm of the value, per KV head; evicted once",
    score="defensive_v",
    budget="uniform",
    kept=0.2,
    heads="each",
    window=32,
    pooling=15,
    sinks=0,
    recent=32,
    decode="keep",
    floor=DEFAULT_FLOOR,
)
