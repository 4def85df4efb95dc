"""Choosing pages on the device by bounds and by codes of keys: what one layer's choice takes, and what it reads.

J pages of a sequence, K KV heads, P page size, D head size, R rows of a summary.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.decode_attention import DTYPE, Shape
from benchmarks.gpu.device import copy_bandwidth, device, of_bandwidth, recorded, times
from benchmarks.harness import Check, Report, Row, check_close
from trt_kv.plugins.recall_attention.choice import best_pages
from trt_kv.plugins.recall_attention.choice_triton import choose_pages
from trt_kv.plugins.recall_attention.page_counts import summary_rows
from trt_kv.plugins.recall_attention.triton import summaries_of_filled
from trt_kv.program import GROUP_POOLINGS, PAGE_SUMMARIES
from trt_kv.runtime.backends.cuda.store import bits_on_host

BUDGET = 2048
"""Tokens that each KV head chooses, in whole pages."""
POOLING = GROUP_POOLINGS["max_raw"]
NEAR_TIES = 0.01
"""Share of the pages that both sides may choose differently, because they add up in another order."""


class Cache:
    """Random keys of ``batch`` sequences, their summaries, and queries that choose among all of their pages."""

    def __init__(self, shape: Shape, summary: str, n_tokens: int, batch: int) -> None:
        self.n_pages, self.n_chosen = n_tokens // shape.page_size, min(BUDGET, n_tokens // 2) // shape.page_size
        on, n_all = device(), batch * self.n_pages
        torch.manual_seed(0)
        kv = torch.randn(n_all, 2, shape.n_kv_heads, shape.page_size, shape.head_size, device=on).to(DTYPE)
        rows = summary_rows(PAGE_SUMMARIES[summary], shape.page_size, str(DTYPE).removeprefix("torch."))
        self.summaries = torch.zeros(n_all, shape.n_kv_heads, rows, shape.head_size, dtype=DTYPE, device=on)
        self.probe_BHD = torch.randn(batch, shape.n_heads, shape.head_size, device=on).to(DTYPE)
        self.table_BT = torch.arange(n_all, device=on).view(batch, -1)
        self.between_B = torch.full((batch,), self.n_pages, device=on)
        self.wanted_BK = torch.full((batch, shape.n_kv_heads), self.n_chosen, device=on)
        self.filled = (
            *(kv, self.summaries, torch.arange(batch + 1, device=on) * n_tokens, self.table_BT),
            *(torch.full((batch,), n_tokens, device=on), batch * n_tokens, PAGE_SUMMARIES[summary]),
        )

    def choose(self) -> Tensor:
        """What a layer does once in a step."""
        arguments = (self.probe_BHD, self.summaries, self.table_BT, self.between_B, self.wanted_BK)
        return choose_pages(*arguments, n_sinks=0, pooling=POOLING, softmax_scale=1.0)

    def unlike_a_cpu(self) -> float:
        """Share of the first sequence's chosen pages that the kernel of a CPU does not choose, from the same summaries."""
        found_KC = self.choose()[0, :, : self.n_chosen].cpu().numpy()
        rows = bits_on_host(self.summaries[: self.n_pages])
        probe_HD = self.probe_BHD[0].float().cpu().numpy()
        wanted_KC = best_pages(probe_HD, np.arange(self.n_pages), rows, self.n_chosen, POOLING, 1.0)
        common = sum(len(np.intersect1d(*pair)) for pair in zip(found_KC, wanted_KC, strict=True))
        return 1 - common / wanted_KC.size


def run(*, quick: bool) -> Report:
    """A layer of Llama 3.1 8B in fp16, pages of 8 and of 32 tokens."""
    bandwidth = copy_bandwidth(quick=quick)
    sizes, rounds = (((61, 2),), 2) if quick else (((32768, 1), (131072, 1), (32768, 8)), 20)
    page_sizes = (8,) if quick else (8, 32)
    rows: list[Row] = []
    checks: list[Check] = []
    for n_tokens, batch in sizes:
        for page_size in page_sizes:
            shape = Shape(n_heads=4, n_kv_heads=2, head_size=16, page_size=8) if quick else Shape(page_size=page_size)
            caches = {summary: Cache(shape, summary, n_tokens, batch) for summary in ("minmax", "codes")}
            sides: dict[str, Callable[[], object]] = {}
            for summary, cache in caches.items():
                summarise = partial(summaries_of_filled, *cache.filled)
                summarise()
                what = f"{n_tokens} tokens, batch {batch}, pages of {page_size}, {summary}: chosen unlike on a CPU"
                checks.append(check_close(what, np.array([cache.unlike_a_cpu()]), np.zeros(1), within=NEAR_TIES))
                sides |= {f"choose, {summary}": recorded(cache.choose), f"summarise all pages, {summary}": recorded(summarise)}
            timings = times(sides, rounds=rounds)
            for name in sides:
                row, n_bytes = timings.row(name), caches[name.split(", ")[1]].summaries.nbytes
                of_bound = of_bandwidth(n_bytes, row["median_ms"], bandwidth)
                rows.append({"tokens": n_tokens, "batch": batch, "page": page_size, "side": name, **row, **of_bound})
    return Report(
        title="Choosing pages by bounds and by codes of keys",
        settings={"dtype": str(DTYPE), "budget_tokens": BUDGET, "bytes": "of the summaries, read or written once"},
        checks=checks,
        tables={"one layer": rows},
    )
