"""Calibrated budgets for each KV head (LU-KV, arXiv 2602.08585), with our ranking of tokens (``prefixkv``).

The published ranking is ExpectedAttention, which no score computes. A head may hold as few as 64 tokens: with the floor of
other presets few heads of a short prompt would keep less than the others. docs/decisions/0077-budgets-per-kv-head.md.
"""

import dataclasses

from trt_kv.policies.prefixkv import POLICY as PREFIXKV

POLICY = dataclasses.replace(
    PREFIXKV,
    name="lukv",
    summary="calibrated budgets for each KV head, by what answers attend to; tokens ranked as by prefixkv",
    heads="own",
    floor=64,
)
