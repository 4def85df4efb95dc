"""No ranking, because nothing is evicted."""

from trt_kv.score import Score

SCORE = Score(name="none", summary="no ranking: every token is kept", ranks="nothing")
