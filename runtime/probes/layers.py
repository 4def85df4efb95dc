"""Times of the KV ops of one layer, without a model: the runtime's own runner, with dense layers that compute nothing.

A layer's ops cost the same whatever the weights are, so a policy can be timed before an engine with it is built.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_kv.plugins.kv_rows import KvDtype, store
from trt_kv.plugins.paging import Floats, Rows
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.program import OpNode, Program
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.recall.in_place import MemoryTier, RecallInPlace
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.surrogate import n_weights

DECODE_STEPS = 5
MOST_BYTES = 2**28
"""Of a pool: a decode step of all layers is timed, so that memory delivers what it reads, but within this."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """``n_layers`` of a model with H query and K KV heads of size D; how keys and values are stored; tokens per page; prompt
    tokens per step; threads that compute.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kv_dtype: str
    page_size: int
    chunk: int
    n_threads: int


class NoDenseLayers:
    """A ``DenseExecutor`` whose layers have the same random queries, keys and values for every token, and no logits."""

    description = "no dense layers"

    def __init__(self, shape: LayerShape, n_layers: int) -> None:
        rng = np.random.default_rng(0)
        self._n_layers = n_layers
        self._q, self._k, self._v = (
            rng.standard_normal((shape.chunk, n_heads, shape.head_dim), np.float32)
            for n_heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        )

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``; the logits are zeros, [R, 1]."""
        n = len(input_ids)
        for layer in range(self._n_layers):
            attend(layer, self._q[:n], self._k[:n], self._v[:n])
        return np.zeros((len(logit_rows), 1), np.float32)


class LayerProbe:
    """Times one kind of layer: its ``prefill`` and ``decode`` nodes."""

    def __init__(self, shape: LayerShape, nodes: Mapping[str, tuple[OpNode, ...]]) -> None:
        self._shape = shape
        self._nodes = nodes
        self._recalls = any(node.op == "RecallAttention" for node in nodes["decode"])
        self._ranks = any(node.op == "EvictTokens" for node in nodes["decode"])

    def prompt_ms(self, n_tokens: int) -> float:
        """Of one layer while a prompt of ``n_tokens`` is read, in chunks."""
        runner, _ = self._runner(1, n_tokens)
        sequence = runner.new_sequence()
        started = time.perf_counter()
        runner.prefill(sequence, np.zeros(n_tokens, np.int64).tolist())
        elapsed = time.perf_counter() - started
        sequence.release()
        return elapsed * 1e3

    def token_ms(self, n_cached: int) -> float:
        """Of one layer in a decode step of a sequence that has ``n_cached`` tokens: the median of some steps of many layers."""
        shape, n_tokens = self._shape, n_cached + DECODE_STEPS + 2
        of_layer = n_tokens * shape.n_kv_heads * shape.head_dim * 8
        n_layers = max(1, min(shape.n_layers, MOST_BYTES // of_layer))
        runner, stores = self._runner(n_layers, n_tokens)
        for one in stores:
            _fill(one, shape)
        sequence = runner.new_sequence()
        self._begin(sequence, runner, n_layers, n_cached)
        elapsed = []
        for _ in range(DECODE_STEPS + 1):
            started = time.perf_counter()
            runner.decode([sequence], [0])
            elapsed.append(time.perf_counter() - started)
        sequence.release()
        return float(np.median(elapsed[1:])) * 1e3 / n_layers

    def ms(self, what: str, n_tokens: int) -> float:
        """``token_ms`` or ``prompt_ms``, by ``what``: "token" or "prompt"."""
        return self.token_ms(n_tokens) if what == "token" else self.prompt_ms(n_tokens)

    def warm_up(self, what: str) -> None:
        """Compile, or load, what the ops run."""
        self.ms(what, 2 * self._shape.page_size)

    def _runner(self, n_layers: int, n_tokens: int) -> tuple[ModelRunner, list[HostKvPool]]:
        """A runner for a sequence of ``n_tokens`` in ``n_layers`` layers, and the pools that hold its cache."""
        shape = self._shape
        programs = {phase: _layers(nodes, n_layers, shape) for phase, nodes in self._nodes.items()}
        sizes: dict[str, Any] = {
            "page_size": shape.page_size,
            "n_kv_heads": shape.n_kv_heads,
            "head_size": shape.head_dim,
            "dtype": shape.kv_dtype,
        }
        n_pages = n_layers * -(-n_tokens // shape.page_size)
        pool = HostKvPool(n_pages=1 if self._recalls else n_pages, **sizes)
        recall = None
        if self._recalls:
            tier = MemoryTier(n_pages=n_pages, **sizes)
            rows = most_rows(programs["decode"], shape.page_size, shape.kv_dtype)
            recall = RecallInPlace(tier, pool, n_layers=n_layers, n_query_heads=shape.n_heads, summary_rows=rows)
        runner = host_runner(
            NoDenseLayers(shape, n_layers),
            pool,
            programs,
            n_threads=shape.n_threads,
            recall=recall,
            chunk=shape.chunk,
            decode="rank" if self._ranks else "keep",
        )
        return runner, [pool if recall is None else recall.host]

    def _begin(self, sequence: SequenceCache, runner: ModelRunner, n_layers: int, n_cached: int) -> None:
        """Give a sequence ``n_cached`` tokens, as if it had read and kept them."""
        sequence.begin_with([n_cached] * n_layers, n_cached)
        sequence.is_evicted = self._ranks
        store_of = runner.pool if runner.tiers is None else runner.tiers.host
        assert isinstance(store_of, HostKvPool)
        summaries: Rows | None = getattr(runner.tiers, "summaries", None)
        size = self._shape.page_size
        for layer in range(n_layers):
            pages = sequence.page_table[layer, : -(-n_cached // size)]
            store_of.token_positions[pages] = np.arange(len(pages) * size).reshape(-1, 1, size)
            if summaries is not None:
                summaries[pages] = store_of.kv[pages][:, 0, :, :1]
        last_query: Floats | None = getattr(runner.tiers, "last_query", None)
        if last_query is not None:
            last_query[:] = 1.0


def _layers(nodes: tuple[OpNode, ...], n_layers: int, shape: LayerShape) -> Program:
    """``n_layers`` layers with the same nodes, for all KV heads of ``shape``."""
    return tuple(
        tuple(OpNode(op=node.op, attributes={**_for_heads(node, shape), "layer": layer}) for node in nodes)
        for layer in range(n_layers)
    )


def _for_heads(node: OpNode, shape: LayerShape) -> Mapping[str, Any]:
    """The attributes of a node, whose weights may be of one KV head that is a layer of the cache."""
    if not (weights := node.attributes.get("weights", ())):
        return node.attributes
    return {**node.attributes, "weights": weights * (shape.n_kv_heads * n_weights(shape.head_dim) // len(weights))}


def _fill(pool: HostKvPool, shape: LayerShape) -> None:
    """Keys and values like those of a model, so that no number is denormal; the same in each page."""
    rng = np.random.default_rng(1)
    page = rng.standard_normal((1, 2, shape.n_kv_heads, shape.page_size, shape.head_dim), np.float32)
    pool.kv[:] = store(page, KvDtype(shape.kv_dtype))
    pool.scores[:] = rng.random(pool.scores.shape[1:], np.float32)
