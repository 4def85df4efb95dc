"""RecallAttention over a cache in memory: attention reads the chosen pages where they are, and nothing is ever moved.

On a CPU the memory of a host tier is that of the device, so a working set would only be a second copy
(docs/decisions/0050-recall-in-place.md). The ops' own kernels run on the tier's pages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_kv.errors import load_option
from trt_kv.plugins.kv_rows import head_size_of
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.registry import Kernel, kernel
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.tiered_sequence import Held
from trt_kv.runtime.statistics import RecallStatistics
from trt_kv.runtime.trace import NO_TRACE, Trace


class MemoryTier(HostKvPool):
    """Pages of the layers that recall, in memory: reserved when created and committed as they are written."""

    name = "the host tier"
    how_to_enlarge = f"raise {load_option('host_tokens')}, or send shorter or fewer prompts at once"


class RecallInPlace:
    """Kernels of RecallAttention and AdaptiveBudget over ``host``. See ``Tiers``."""

    in_memory = True

    def __init__(
        self,
        host: MemoryTier,
        device: HostKvPool,
        *,
        n_layers: int,
        n_query_heads: int,
        summary_rows: int = 2,
        trace: Trace = NO_TRACE,
    ) -> None:
        """``device`` holds the layers that do not recall. ``summary_rows``: as ``page_counts.summary_rows`` counts them."""
        n_pages, _, n_kv_heads, _, row_length = host.kv.shape
        self._trace = trace
        self.host = host
        self.device = device
        self.sets: Mapping[int, Held] = {}
        self.summaries: Rows = np.empty((n_pages, n_kv_heads, summary_rows, row_length), host.kv.dtype)
        """Summaries (lo and hi, and codes if there are any) of the keys of every full page, stored like them: [M, K, R, W]."""
        self.last_query: Floats = np.empty((n_pages, n_query_heads, head_size_of(host.kv)), np.float32)
        """The query of the last token of a layer of a sequence, in the row of its first page: [M, H, D]."""
        self.statistics = RecallStatistics(
            n_layers=n_layers, n_kv_heads=n_kv_heads, page_head_bytes=host.kv[0].nbytes // n_kv_heads, n_pages=n_pages
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """The ops' own kernels, which replace those over the pool, by op name."""
        states = {"kv": self.host.kv, "token_positions": self.host.token_positions}
        attend, find_budget = kernel("RecallAttention", "cpu"), kernel("AdaptiveBudget", "cpu")

        def attend_and_count(**given: Any) -> tuple[Any, ...]:
            with self._trace.span("attention", layer=given["layer"]):
                results = attend(**(given | states | {"summaries": self.summaries, "last_query": self.last_query}))
            if given["prompt_remaining"][-1] < 0:  # a decode step, with one token of each sequence
                self.statistics.count(given["layer"], given["page_table"][given["layer"], :, 0], results[-1])
            return results

        return {"RecallAttention": attend_and_count, "AdaptiveBudget": lambda **given: find_budget(**(given | states))}

    @property
    def used_bytes(self) -> dict[str, int]:
        """Exact bytes in use: pages of either pool, summaries of the pages on the host."""
        n_host, per_page = self.host.n_pages - self.host.n_free, self.summaries.nbytes // self.host.n_pages
        return {"host": self.host.used_bytes, "device": self.device.used_bytes, "summaries": n_host * per_page}

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence from its pages ``pages`` to the new pages ``twin_pages`` of its fork."""
        for array in (self.host.kv, self.host.token_positions, self.summaries, self.last_query):
            array[twin_pages] = array[pages]

    def read_pages(self, row: int, pages: Ints) -> Mapping[str, np.ndarray]:
        """See ``CopyableTiers``."""
        return {"kv": self.host.kv[pages], "summaries": self.summaries[pages]}

    def write_pages(self, pages: Ints, values: Mapping[str, np.ndarray]) -> None:
        """See ``CopyableTiers``."""
        self.host.kv[pages], self.summaries[pages] = values["kv"], values["summaries"]

    def read_open_page(self, row: int, page: int, number: int, limits: PageLimits) -> np.ndarray:
        """See ``CopyableTiers``."""
        copy: np.ndarray = self.host.kv[page].copy()
        return copy

    def begin_at(self, pages: Ints, positions_MP: Ints, limits: PageLimits, *, n_tokens: int) -> None:
        """See ``CopyableTiers``."""
        self.host.token_positions[pages] = positions_MP[:, None]

    def warm_up(self) -> None:
        """Nothing is compiled but the ops' kernels."""

    def release(self, rows: Sequence[int]) -> None:
        """Sequences have no state here but their pages."""

    def close(self) -> None:
        """Nothing runs in the background."""
