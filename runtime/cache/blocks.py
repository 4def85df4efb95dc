"""Copies of what a sequence has cached of a range of prompt tokens, to continue other sequences from (runtime/prefix).

A block is whole pages of every layer, read between two chunks of a prompt, before anything has been evicted. It holds, by name
and layer, L layers, K KV heads, P page size, W length of a stored row, n pages:

    kv.L           [n, 2, K, P, W]      keys and values as stored; of a layer with a window, the pages that it still held
    summaries.L    [n, K, R, W]         of layers that recall
    scores.L       [all, K, P] fp32     of layers whose score is a sum over all queries: the sums so far, of the whole prefix

Positions are not stored, because an unevicted prompt has all of them. Neither are scores of the last W queries, which are zero
until these queries come.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_kv.plugins.recall_attention.page_counts import PageLimits, rows_of_layers
from trt_kv.program import Program, recall_nodes, windows_of
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache, SharedPages, pages_of_prompt
from trt_kv.runtime.cache.tiered_sequence import CopyableTiers

Block = Mapping[str, np.ndarray]


class CacheBlocks:
    """Reads and writes blocks of sequences of one ``ModelRunner``."""

    def __init__(self, pool: KvPool[Any], tiers: CopyableTiers | None, program: Program) -> None:
        """``program``: of phase "prefill"."""
        self._pool = pool
        self._tiers = tiers
        self._limits = page_limits(program, pool.page_size)
        self._summary_rows = rows_of_layers(program, pool.page_size, pool.kv_dtype)
        self._windows = [_score_window(nodes) for nodes in program]
        """Of each layer: how many of the last prompt queries its scores are of; 0: all; None: it has no scores."""
        self._attention_windows = windows_of(program)
        self._changes_pages = any(node.op in ("TokenScores", "EvictTokens") for nodes in program for node in nodes)

    @property
    def n_last_queries(self) -> int:
        """Prompt tokens at the end that must be read, whatever has been cached: scores need their queries, and the request the
        logits of the last one.
        """
        return max(1, *(window or 0 for window in self._windows))

    def read(self, sequence: SequenceCache, n_tokens: int) -> dict[str, np.ndarray]:
        """The block of the last ``n_tokens``, whole pages, that a sequence has read of its prompt, which goes on."""
        block: dict[str, np.ndarray] = {}
        for layer in range(sequence.n_layers):
            held = _pages_of(sequence, layer)
            new = held[-(n_tokens // self._pool.page_size) :]
            for name, values in self._read_layer(layer, held, new).items():
                block[f"{name}.{layer}"] = values
            if self._windows[layer] == 0:
                block[f"scores.{layer}"] = self._pool.read_pages("scores", held)
        return block

    @property
    def are_final(self) -> bool:
        """Whether no page is changed once it is full, and all are in memory, so that sequences can share them."""
        in_memory = self._pool.on_host and (self._tiers is None or self._tiers.in_memory)
        return in_memory and not self._changes_pages and not any(self._attention_windows)

    def read_first(self, sequence: SequenceCache) -> dict[str, np.ndarray]:
        """Copies of the first page of each layer, which must be full, as a block."""
        block: dict[str, np.ndarray] = {}
        for layer in range(sequence.n_layers):
            first = sequence.page_table[layer, :1]
            block |= {f"{name}.{layer}": values for name, values in self._read_layer(layer, first, first).items()}
        return block

    def place(self, sequence: SequenceCache, blocks: Sequence[Block], n_tokens: int, shared: SharedPages | None = None) -> None:
        """Give an empty sequence the first ``n_tokens`` of a prompt, which ``blocks`` hold one after another, behind those that
        are ``shared``.

        ``CapacityError`` if too few pages are free, ``RecallError`` if the host tier cannot be written.
        """
        sequence.begin_at(n_tokens, shared)
        if shared is not None:
            blocks = [shared.first, *blocks]
        for layer in range(sequence.n_layers):
            held = _pages_of(sequence, layer)
            self._place_layer(sequence, layer, held, blocks)
            if self._windows[layer] == 0:
                self._pool.write_pages("scores", held, blocks[-1][f"scores.{layer}"])
            elif self._windows[layer] is not None:
                self._pool.write_pages("scores", held, np.zeros(1, np.float32))

    def accepts(self, block: Block, *, end: int, n_tokens: int) -> bool:
        """Whether a block from elsewhere has the arrays that ``place`` reads of one of ``n_tokens``, the last of them the
        ``end``-th of a prompt.
        """
        kv, scores = self._pool.read_pages("kv", np.arange(1)), self._pool.read_pages("scores", np.arange(1))
        for layer, limits in enumerate(self._limits):
            n_held = pages_of_prompt(end, window=self._attention_windows[layer], page_size=self._pool.page_size)
            n_new = min(n_held, n_tokens // self._pool.page_size)
            wanted = {"kv": (kv.dtype, (n_new, *kv.shape[1:]))}
            if limits is not None:
                wanted["summaries"] = (kv.dtype, (n_new, kv.shape[2], self._summary_rows[layer], kv.shape[4]))
            if self._windows[layer] == 0:
                wanted["scores"] = (scores.dtype, (n_held, *scores.shape[1:]))
            for name, (dtype, shape) in wanted.items():
                values = block.get(f"{name}.{layer}")
                if values is None or values.dtype != dtype or values.shape != shape:
                    return False
        return True

    def _read_layer(self, layer: int, held_M: Ints, new_M: Ints) -> Mapping[str, np.ndarray]:
        if self._limits[layer] is None:
            return {"kv": self._pool.read_pages("kv", new_M)}
        if self._tiers is not None:
            return self._tiers.read_pages(int(held_M[0]), new_M)
        return {name: self._pool.read_pages(name, new_M) for name in ("kv", "summaries")}

    def _place_layer(self, sequence: SequenceCache, layer: int, held_M: Ints, blocks: Sequence[Block]) -> None:
        """Write the layer's own pages, from the last one back to the first one that the layer holds."""
        size, limits = self._pool.page_size, self._limits[layer]
        positions_MP = np.arange(sequence.num_computed_tokens - len(held_M) * size, sequence.num_computed_tokens)
        positions_MP = np.delete(positions_MP.reshape(-1, size), slice(1, 1 + sequence.n_shared_pages), axis=0)
        held_M = sequence.own_pages(layer)
        end = len(held_M)
        for block in reversed(blocks):
            n_pages = min(end, len(block[f"kv.{layer}"]))
            part_M, end = held_M[end - n_pages : end], end - n_pages
            values = {name: block[f"{name}.{layer}"][-n_pages:] for name in ("kv", "summaries") if f"{name}.{layer}" in block}
            if n_pages and limits is not None and self._tiers is not None:
                self._tiers.write_pages(part_M, values)
            elif n_pages:
                for name, pages in values.items():
                    self._pool.write_pages(name, part_M, pages)
        assert end == 0, "the blocks lack pages that the layer holds"
        if limits is not None and self._tiers is not None:
            self._tiers.begin_at(held_M, positions_MP, limits, n_tokens=len(held_M) * size)
        else:
            n_kv_heads = self._pool.token_positions.shape[1]
            positions_MKP = np.repeat(positions_MP[:, None], n_kv_heads, axis=1)
            self._pool.write_pages("token_positions", held_M, positions_MKP)


def page_limits(program: Program, page_size: int) -> list[PageLimits | None]:
    """Of each layer: the sinks and newest pages of its RecallAttention; None if it does not recall."""
    return [
        None
        if node is None
        else PageLimits(page_size=page_size, sinks=int(node.attributes["sinks"]), recent=int(node.attributes["recent"]))
        for node in recall_nodes(program)
    ]


def _pages_of(sequence: SequenceCache, layer: int) -> Ints:
    """The pages of one layer of a sequence that ends with a full page."""
    n_pages, rest = divmod(int(sequence.kv_len[layer]), sequence.pool.page_size)
    assert rest == 0, "a block ends with a full page"
    pages: Ints = sequence.page_table[layer, :n_pages]
    return pages


def _score_window(nodes: Sequence[Any]) -> int | None:
    found = next((node for node in nodes if node.op == "TokenScores"), None)
    return None if found is None else int(found.attributes["window"])
