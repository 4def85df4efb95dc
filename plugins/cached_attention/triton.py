"""CachedAttention on the GPU."""

import torch
from torch import Tensor

from trt_kv.plugins.attention_triton import Window, append_tokens, attend_chunks, attend_one
from trt_kv.plugins.cached_attention.arguments import Arguments


def run(args: Arguments[Tensor]) -> tuple[Tensor, Tensor]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H]); updates kv and token_positions in place.

    Launches on the current stream and does not wait. Output rows after the last sequence's are left uninitialised.
    """
    append_tokens(args.kv, args.token_positions, args.slots[args.layer], args.k, args.v, args.positions)

    q = args.q.contiguous()
    table_BT, len_B = args.page_table[args.layer], args.kv_len[args.layer]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    table_BKT = table_BT[:, None].expand(-1, args.kv.shape[2], -1)
    window = Window(size=args.window, positions_N=args.positions, token_positions=args.token_positions) if args.window else None
    attend_one(q, args.cu_tokens, table_BKT, len_B, args.kv, args.scale, out, lse, soft_cap=args.soft_cap, window=window)
    if len(q) > 1:
        attend_chunks(
            *(q, args.positions, args.cu_tokens, table_BT, len_B, args.kv, args.token_positions, args.scale, out, lse),
            min_new=2,
            soft_cap=args.soft_cap,
            window=args.window,
        )
    return out, lse
