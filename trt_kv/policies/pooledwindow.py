"""Our own: SnapKV's ranking with a shorter window and a wider pool, and PrefixKV's layer budgets calibrated on the same score.

For questions whose answer is in the prompt. docs/decisions/0015-reach.md has what was tried.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="pooledwindow",
    summary="tokens that the last 32 queries attend to, pooled over 15 neighbours, per KV head; calibrated per-layer budgets",
    score="window",
    budget="recipe",
    kept=0.2,
    heads="each",
    window=32,
    pooling=15,
    sinks=4,
    recent_share=0.1,
)
