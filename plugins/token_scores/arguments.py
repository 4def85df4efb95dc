"""Arguments of the implementations of TokenScores; ``spec.py`` defines the op."""

from dataclasses import dataclass
from typing import Generic

from trt_kv.plugins.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[Array]):
    """The spec's inputs and attributes: numpy arrays on the host, torch tensors on a device. States are updated in place."""

    q: Array
    lse: Array
    positions: Array
    cu_tokens: Array
    prompt_remaining: Array
    slots: Array
    page_table: Array
    kv_len: Array
    kv: Array
    token_positions: Array
    scores: Array
    layer: int
    scale: float
    page_size: int
    window: int = 0
    per_head: int = 0
    pooling: int = 1
    average: int = 0
    generated: int = 0
    soft_cap: float = 0.0
    maximum: int = 0
    value_norm: int = 0
