"""Decode steps whose layers only attend to what is cached, which kernels of our own run in one call."""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.program import Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.step import Step
from trt_kv.runtime.cache.kv_pool import KvPool

OP = "CachedAttention"


class AttentionLayers(NamedTuple):
    """Attributes of CachedAttention by layer: ``scale_L`` and ``soft_cap_L`` in fp32."""

    scale_L: Floats
    soft_cap_L: Floats
    window_L: Ints

    @classmethod
    def of(cls, program: Program) -> Self | None:
        """The attributes of ``program``; None if one of its layers has another op, or more of them."""
        nodes = [node for nodes in program for node in nodes]
        if [(node.op, node.attributes["layer"]) for node in nodes] != [(OP, layer) for layer in range(len(program))]:
            return None
        return cls(
            scale_L=np.array([node.attributes["scale"] for node in nodes], np.float32),
            soft_cap_L=np.array([node.attributes.get("soft_cap", 0.0) for node in nodes], np.float32),
            window_L=np.array([node.attributes.get("window", 0) for node in nodes], np.int64),
        )


class CachedTokens(NamedTuple):
    """Where the tokens of a step are, as in ``plugins/tensors.py``, and the pool that they are in."""

    positions_N: Ints
    slots_LN: Ints
    page_table_LBT: Ints
    kv_len_LB: Ints
    kv: Rows
    token_positions: Ints

    @classmethod
    def of(cls, step: Step, pool: KvPool[Any]) -> Self:
        """Contiguous, which compiled code needs not to be compiled for each form."""
        return cls(
            positions_N=np.ascontiguousarray(step.positions),
            slots_LN=np.ascontiguousarray(step.slots),
            page_table_LBT=np.ascontiguousarray(step.page_table),
            kv_len_LB=np.ascontiguousarray(step.kv_len),
            kv=pool.kv,
            token_positions=pool.token_positions,
        )


@runtime_checkable
class WholeStepExecutor(DenseExecutor, Protocol):
    """Can also run CachedAttention between its layers."""

    def decode(self, input_ids: Ints, logit_rows: Ints, layers: AttentionLayers, tokens: CachedTokens) -> Floats:
        """As ``run``, of a step with one token per sequence, which is attended to as ``layers`` say. Updates the pool."""
        ...
