"""Pages instead of tokens, for recall (Quest, arXiv 2406.10774; FreeKV, arXiv 2505.13109)."""

from trt_kv.score import Score

SCORE = Score(
    name="pages",
    summary="an upper bound of what a page may get from this query, read off a summary of its keys (Quest, FreeKV)",
    ranks="pages",
)
