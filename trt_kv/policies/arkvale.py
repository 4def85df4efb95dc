"""ArkVale (NeurIPS 2024), as the FreeKV paper compares with it: like ``quest``, with its own summaries and pooling."""

import dataclasses

from trt_kv.policies.quest import POLICY as QUEST

POLICY = dataclasses.replace(
    QUEST,
    name="arkvale",
    summary="as quest, with pages summed up by their middle and mean deviation, and the mean bound of a KV head's queries",
    page_summary="deviation",
    group_pooling="mean_raw",
)
