"""PrefixKV as published (arXiv 2412.03409): calibrated per-layer budgets, importance summed over all prompt queries, no floor.

A sum over all queries favours early tokens and forgets the question: it loses facts that ``prefixkv`` keeps.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="prefixkv_paper",
    summary="PrefixKV as published: calibrated per-layer budgets; tokens ranked by attention mass, evicted once after prefill",
    score="mass",
    budget="recipe",
    kept=0.5,
)
