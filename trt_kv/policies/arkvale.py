"""ArkVale (NeurIPS 2024), as the FreeKV paper compares with it: ``quest`` with other page summaries and pooling."""

import dataclasses

from trt_kv.policies.quest import POLICY as QUEST

POLICY = dataclasses.replace(
    QUEST,
    name="arkvale",
    summary="as quest, with pages summarised by midpoint and mean deviation, and bounds averaged over a KV head's queries",
    page_summary="deviation",
    group_pooling="mean_raw",
)
