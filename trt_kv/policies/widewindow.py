"""Our own: prefixkv with a pool of 63 neighbours. It keeps whole passages, for text that is copied or continued."""

import dataclasses

from trt_kv.policies.prefixkv import POLICY as PREFIXKV

POLICY = dataclasses.replace(
    PREFIXKV,
    name="widewindow",
    summary="passages that the last 16 queries attend to, pooled over 63 neighbours, per KV head; calibrated per-layer budgets",
    window=16,
    pooling=63,
)
