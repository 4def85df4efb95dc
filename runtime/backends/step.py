"""One step of the token-flat graph: all sequences' tokens concatenated along N."""

from dataclasses import dataclass
from typing import Any

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
    prompt_len: Ints
    found_budget: Ints
    query_rows: Ints


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step made beside the KV state: logits [R, V] fp32 and the tokens [L, B] that are cached afterwards.

    ``found_budget`` [L, B]: what AdaptiveBudget found where its number is not used up by an eviction, -1 elsewhere.
    ``corrected`` [L, B, K]: 1 where a KV head recalled pages for its own query before it attended.
    """

    logits: NDArray[np.floating[Any]]
    kept: Ints
    found_budget: Ints | None = None
    corrected: Ints | None = None
