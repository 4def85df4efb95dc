"""CachedAttention on the GPU."""

import torch
from torch import Tensor

from trt_kv.plugins.attention_triton import append_tokens, attend_chunks, attend_one


def run(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cu_tokens: Tensor,
    slots: Tensor,
    page_table: Tensor,
    kv_len: Tensor,
    kv: Tensor,
    token_positions: Tensor,
    layer: int,
    scale: float,
    page_size: int,  # noqa: ARG001  kv has that shape
) -> tuple[Tensor, Tensor]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H]); updates kv and token_positions in place.

    Launches on the current stream and does not wait. Rows behind the last sequence's are left as they were allocated.
    """
    append_tokens(kv, token_positions, slots[layer], k, v, positions)

    q = q.contiguous()
    table_BT, len_B = page_table[layer], kv_len[layer]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    attend_one(q, cu_tokens, table_BT[:, None].expand(-1, kv.shape[2], -1), len_B, kv, scale, out, lse)
    if len(q) > 1:
        attend_chunks(q, positions, cu_tokens, table_BT, len_B, kv, token_positions, scale, out, lse, min_new=2)
    return out, lse
