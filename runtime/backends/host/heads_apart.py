"""KV heads that are layers of the cache: what the dense layers hand over for all heads is split, and joined again."""

import numpy as np

from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend


def attend_by_head(attend: Attend, n_pool_heads: int) -> Attend:
    """``Attend`` of layers of the model from that of layers of the cache, which have ``n_pool_heads`` of its KV heads.

    See ``trt_kv/cache_layers.py``. With as many heads in the pool as in the model this is ``attend``.
    """

    def attend_to_all(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        n_apart = k.shape[1] // n_pool_heads
        if n_apart == 1:
            return attend(layer, q, k, v)
        outs = [
            attend(layer * n_apart + head, *(np.ascontiguousarray(part) for part in parts))
            for head, parts in enumerate(zip(*(np.split(whole, n_apart, axis=1) for whole in (q, k, v)), strict=True))
        ]
        return np.concatenate(outs, axis=1)

    return attend_to_all
