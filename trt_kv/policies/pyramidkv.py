"""PyramidKV (arXiv 2406.02069): SnapKV's ranking; early layers keep more than late ones."""

import dataclasses

from trt_kv.policies.snapkv import POLICY as SNAPKV

POLICY = dataclasses.replace(
    SNAPKV,
    name="pyramidkv",
    summary="snapkv's ranking; budgets fall linearly from the first layer to the last",
    budget="pyramid",
)
