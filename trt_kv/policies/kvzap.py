"""KVzap (arXiv 2601.07891) with what a cache has: a linear surrogate of how much a repetition of the text attends to a token,
from its key and value instead of the input of attention, calibrated on prompts; each KV head keeps what exceeds one threshold.

Published with 128 newest tokens, and while text is generated too. docs/decisions/0078-predicted-scores.md.
"""

from trt_kv.policy import Policy

POLICY = Policy(
    name="kvzap",
    summary="each KV head keeps the tokens whose predicted importance exceeds a calibrated threshold, whatever is asked",
    score="surrogate",
    budget="above",
    kept=0.2,
    heads="own",
    sinks=4,
    recent=64,
    decode="keep",
    floor=64,
)
