"""Newer is better (StreamingLLM, arXiv 2309.17453; ReFreeKV, arXiv 2502.16886)."""

from trt_kv.score import Score

SCORE = Score(name="position", summary="the newest tokens first (StreamingLLM, ReFreeKV)", ranking=1)
