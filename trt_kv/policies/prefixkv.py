"""PrefixKV's calibrated layer budgets (arXiv 2412.03409) with SnapKV's ranking, which follows the question, unlike the
published one (``prefixkv_paper``); its window is shorter and its pool wider.

For questions whose answer is in the prompt. docs/decisions/0015-reach.md has what was tried.
"""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="prefixkv",
    summary="calibrated per-layer budgets; tokens that the last 32 queries attend to, pooled over 15 neighbours, per KV head",
    score="window",
    budget="recipe",
    kept=0.2,
    floor=DEFAULT_FLOOR,
    heads="each",
    window=32,
    pooling=15,
    sinks=4,
    recent_share=0.1,
)
