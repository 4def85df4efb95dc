"""Pages instead of tokens, for recall (Quest, arXiv 2406.10774; FreeKV, arXiv 2505.13109)."""

from trt_kv.score import Score

SCORE = Score(
    name="pages",
    summary="pages, by an upper bound of q.k computed from a summary of the page's keys (Quest, FreeKV)",
    ranks="pages",
)
