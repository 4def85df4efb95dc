"""PrefixKV as published (arXiv 2412.03409): calibrated per-layer budgets, importance summed over all prompt queries."""

from trt_kv.policy import Policy

POLICY = Policy(
    name="prefixkv",
    summary="calibrated per-layer budgets; tokens ranked by attention mass, evicted once after prefill",
    score="mass",
    budget="recipe",
    kept=0.5,
)
