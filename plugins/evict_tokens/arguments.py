"""Arguments of the implementations of EvictTokens; ``spec.py`` defines the op."""

from dataclasses import dataclass
from typing import Generic

from trt_kv.plugins.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[Array]):
    """The spec's inputs and attributes: numpy arrays on the host, torch tensors on a device. States are updated in place."""

    evict: Array
    page_table: Array
    kv_len: Array
    kv: Array
    token_positions: Array
    scores: Array
    budget: Array | None = None
    layer: int
    page_size: int
    kept_share: float
    kept_tokens: int = 0
    floor: int = 0
    drop: int = 1
    sinks: int = 1
    recent: int = 1
    recent_share: float = 0.0
    ranking: int = 0
    seed: int = 0
