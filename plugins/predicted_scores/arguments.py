"""Arguments of the implementations of PredictedScores; ``spec.py`` defines the op."""

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
    layer: int
    page_size: int
    weights: tuple[float, ...]
    frequencies: tuple[float, ...]
    threshold: float
    sinks: int = 4
    recent: int = 0
