"""Published PrefixKV without its layer budgets: the same ranking, the same share for every layer."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="uniform",
    summary="the same share for every layer; tokens ranked by attention mass",
    score="mass",
    budget="uniform",
    kept=0.5,
    floor=DEFAULT_FLOOR,
)
