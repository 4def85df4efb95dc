"""SnapKV (arXiv 2404.14469): what the last 64 queries attend to, smoothed, per KV head; the window itself is kept."""

from trt_kv.policy import DEFAULT_FLOOR, Policy

POLICY = Policy(
    name="snapkv",
    summary="tokens that the last 64 queries attend to, smoothed over 5 neighbours, per KV head; evicted once after prefill",
    score="window",
    budget="uniform",
    kept=0.5,
    heads="each",
    window=64,
    pooling=5,
    sinks=0,
    recent=64,
    decode="keep",
    floor=DEFAULT_FLOOR,
)
