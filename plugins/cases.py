"""Random inputs for a spec's cases: pages scattered over the pool, and poison wherever a kernel must not read."""

import math
from typing import Any

import numpy as np

from trt_kv.opspec import Case, OpSpec
from trt_kv.plugins.kv_rows import KvDtype, store

POISON = -(2**40)
"""Poison in integer tensors where nothing may be read; floats are poisoned with NaN."""


def case_inputs(spec: OpSpec, case: Case, *, seed: int = 0, kv_dtype: str = "float32") -> dict[str, Any]:
    """The spec's inputs (numpy arrays by name) and attributes of ``case``, states as they are before the op.

    Keys, values and summaries are stored as ``kv_dtype``.
    """
    appends = any(t.name == "k" for t in spec.inputs)
    drawn = _PagedCase(case, np.random.default_rng([seed, len(case.name), sum(case.cached)]), new_written=not appends)
    inputs = {t.name: drawn.tensor(t.name) for t in spec.inputs if not t.optional or t.name in case.values}
    inputs |= {name: store(inputs[name], KvDtype(kv_dtype)) for name in ("kv", "summaries") if name in inputs}
    attributes = {a.name: case.attributes.get(a.name, a.default) for a in spec.attributes}
    attributes |= {"layer": case.dims["L"] - 1, "page_size": case.dims["P"]}
    attributes |= {"scale": case.dims["D"] ** -0.5} if "scale" in attributes else {}
    return inputs | attributes


class _PagedCase:
    """A paged KV state in which the case's sequences have ``cached`` tokens and receive ``new`` ones, written yet or not."""

    def __init__(self, case: Case, rng: np.random.Generator, *, new_written: bool) -> None:
        self.case, self.rng = case, rng
        self.n_heads, self.n_kv_heads, self.head_size, self.page_size, self.n_layers = (case.dims[d] for d in "HKDPL")
        self.kv_len = np.array([c + n for c, n in zip(case.cached, case.new, strict=True)])
        n_pages_B = -(-self.kv_len // self.page_size)
        n_pool = self.n_layers * int(n_pages_B.sum()) + 3
        free = list(rng.permutation(n_pool))
        self.page_table = np.full((self.n_layers, len(n_pages_B), n_pages_B.max() + 2), -1)
        for layer in range(self.n_layers):
            for b, n_pages in enumerate(n_pages_B):
                self.page_table[layer, b, :n_pages] = [free.pop() for _ in range(n_pages)]
        self.kv = np.full((n_pool, 2, self.n_kv_heads, self.page_size, self.head_size), np.nan, np.float32)
        self.token_positions = np.full((n_pool, self.n_kv_heads, self.page_size), POISON)
        self.scores = np.full(self.token_positions.shape, np.nan, np.float32)
        self.slots = np.zeros((self.n_layers, sum(case.new)), np.int64)
        self.positions = np.zeros(sum(case.new), np.int64)
        self.cu_tokens = np.concatenate([[0], np.cumsum(case.new)])
        self.n_query_rows = self.n_layers * len(case.new)
        for b in range(len(case.new)):
            self._fill_sequence(b, new_written)

    def _fill_sequence(self, b: int, new_written: bool) -> None:
        """Cached tokens at positions with gaps (earlier evictions), in slots of arbitrary order, followed by the new ones."""
        n_cached, n_new = self.case.cached[b], self.case.new[b]
        n_tokens = n_cached + n_new
        positions = np.arange(n_tokens)
        if not self.case.in_order:
            positions = np.sort(self.rng.choice(3 * n_tokens + 1, n_tokens, replace=False))
        rows = slice(self.cu_tokens[b], self.cu_tokens[b + 1])
        self.positions[rows] = positions[n_cached:]
        for layer in range(self.n_layers):
            order = np.arange(n_tokens) if self.case.in_order else self.rng.permutation(n_tokens)
            slots = self.page_table[layer, b, order // self.page_size] * self.page_size + order % self.page_size
            n_written = n_cached + n_new * new_written
            pages, offsets = np.divmod(slots[:n_written], self.page_size)
            self.kv[pages, :, :, offsets] = self._normal(n_written, 2, self.n_kv_heads, self.head_size)
            self.token_positions[pages, :, offsets] = positions[:n_written, None]
            if self.case.own_tokens:
                self.token_positions[pages[:n_cached], :, offsets[:n_cached]] = self._own_positions(positions, n_cached).T
            self.scores[pages[:n_cached], :, offsets[:n_cached]] = self.rng.random((n_cached, self.n_kv_heads), np.float32)
            self.slots[layer, rows] = slots[n_cached:]

    def _own_positions(self, positions: np.ndarray, n_cached: int) -> np.ndarray:
        """For each KV head, its own positions, all before those of the new tokens and in random order: [K, S]."""
        end = positions[n_cached] if n_cached < len(positions) else 3 * n_cached + 1
        return np.stack([self.rng.choice(end, n_cached, replace=False) for _ in range(self.n_kv_heads)])

    def tensor(self, name: str) -> np.ndarray:
        if name in self.case.values:
            return self._given(name)
        n_new = len(self.positions)
        match name:
            case "q":
                return self._normal(n_new, self.n_heads, self.head_size)
            case "k" | "v":
                return self._normal(n_new, self.n_kv_heads, self.head_size)
            case "lse":
                return self._normal(n_new, self.n_heads) + np.float32(math.log(self.kv_len.max()))
            case "prompt_remaining":
                return self.rng.integers(-1, 8, n_new)
            case "evict":
                return np.ones(len(self.kv_len), np.int64)
            case "prompt_len":
                half_read: np.ndarray = np.maximum(1, self.kv_len // 2)
                return half_read
            case "adaptive_budget":
                return np.full((self.n_layers, len(self.kv_len)), -1)
            case "query_rows":
                return self.rng.permutation(self.n_query_rows).reshape(self.n_layers, -1)
            case "summaries":
                return np.sort(self._normal(len(self.kv), self.n_kv_heads, 2, self.head_size), axis=2)
            case "last_query":
                return self._normal(self.n_query_rows + 2, self.n_heads, self.head_size)
            case "kv_len":
                return np.tile(self.kv_len, (self.n_layers, 1))
            case _:
                array: np.ndarray = getattr(self, name)
                return array

    def _given(self, name: str) -> np.ndarray:
        """A state named in ``values`` is filled with that constant; any other named tensor is given in full, row by row.

        Optional scores are passed only if they are named in ``values``, and are random if no constant is given.
        """
        values = np.array(self.case.values[name])
        match name:
            case "scores":
                return np.full_like(self.scores, values[0]) if len(values) else self.scores
            case "last_query":
                return np.full((self.n_query_rows, self.n_heads, self.head_size), values[0], np.float32)
            case "summaries":
                return np.full((len(self.kv), self.n_kv_heads, 2, self.head_size), values[0], np.float32)
            case "adaptive_budget":
                return values.reshape(self.n_layers, -1)
            case _:
                return values

    def _normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32)
