"""Arguments of the implementations of AdaptiveBudget; ``spec.py`` defines the op."""

from dataclasses import dataclass
from typing import Generic

from trt_kv.plugins.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[Array]):
    """The spec's inputs and attributes: numpy arrays on the host, torch tensors on a device. States are updated in place."""

    q: Array
    lse: Array
    cu_tokens: Array
    evict: Array
    page_table: Array
    kv_len: Array
    kv: Array
    token_positions: Array
    scores: Array | None = None
    layer: int
    scale: float
    page_size: int
    threshold: float
    sinks: int = 4
    recent: int = 0
    ranking: int = 1
    row: int = 0
    protected_in_norm: int = 0
    soft_cap: float = 0.0
