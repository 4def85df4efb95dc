"""Attention mass (PrefixKV, arXiv 2412.03409; H2O, arXiv 2306.14048)."""

from trt_kv.score import Score

SCORE = Score(
    name="mass",
    summary="attention received, summed over all prompt queries (published PrefixKV and H2O)",
    token_scores=lambda _: {},
)
