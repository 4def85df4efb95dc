"""Ours: ``freekv`` with pages ranked by their best key instead of bounds. Two bits per channel of each key estimate its product
with a query, of which the quarter is read where the queries are large; the largest with any query of a KV head counts. After
KIVI (arXiv 2402.02750) and SparQ (arXiv 2312.04985). Measured with pages of 8 tokens (``--page-size 8``).
"""

import dataclasses

from trt_kv.policies.freekv import POLICY as FREEKV

POLICY = dataclasses.replace(
    FREEKV,
    name="bestkey",
    summary="as freekv, with pages ranked by their best key, from two bits per channel; best with pages of 8 tokens",
    page_summary="codes",
    group_pooling="max_raw",
)
