"""Attention from an observation window at the prompt's end (SnapKV, arXiv 2404.14469)."""

from trt_kv.score import Score

SCORE = Score(
    name="window",
    summary="attention received, summed over the last `window` prompt queries (observation window, SnapKV)",
    token_scores=lambda policy: {"window": policy.window},
    settings=("window",),
)
