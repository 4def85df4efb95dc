"""One step of the token-flat graph: all sequences' tokens concatenated along N."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The graph's inputs other than the KV state; all int64. Axes: [N] or as the op specs say (``plugins/tensors.py``)."""

    input_ids: Ints
    positions: Ints
    logit_rows: Ints
    cu_tokens: Ints
    slots: Ints
    page_table: Ints
    kv_len: Ints
    prompt_remaining: Ints
    evict: Ints
