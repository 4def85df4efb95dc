"""Arguments of the implementations of RecallAttention; ``spec.py`` defines the op."""

from dataclasses import dataclass
from typing import Generic

from trt_kv.plugins.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[Array]):
    """The spec's inputs and attributes: numpy arrays on the host, torch tensors on a device. States are updated in place."""

    q: Array
    k: Array
    v: Array
    positions: Array
    cu_tokens: Array
    prompt_remaining: Array
    slots: Array
    page_table: Array
    kv_len: Array
    prompt_len: Array
    adaptive_budget: Array
    query_rows: Array
    kv: Array
    token_positions: Array
    summaries: Array
    last_query: Array
    layer: int
    scale: float
    page_size: int
    kept_share: float = 1.0
    kept_tokens: int = 0
    sinks: int = 0
    recent: int = 1
    tau: float = 0.8
    summary: int = 0
    pooling: int = 0
    softmax_scale: float = 1.0
    soft_cap: float = 0.0
