"""Attention of a prompt's chunk on a device over a cache on the host: block by block, through a bounded staging area."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_kv.errors import CapacityError
from trt_kv.plugins.attention_triton import append_tokens, attend_chunks
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages
from trt_kv.runtime.backends.cuda.recall.working_set import DeviceSets
from trt_kv.runtime.backends.host.recall.prompt_attention import BLOCK_TOKENS


class PromptStaging:
    """Staging area on the device: pages that a chunk writes, and a block of earlier ones. Used by one chunk at a time."""

    def __init__(self, sets: DeviceSets, *, largest_chunk: int, block_tokens: int = BLOCK_TOKENS) -> None:
        shape = sets.tensors.kv.shape[1:]
        n_kv_heads, page_size = shape[1:3]
        device = sets.tensors.kv.device
        self._sets = sets
        self._n_earlier = max(1, block_tokens // page_size)
        self._largest_chunk = largest_chunk
        n_pages = self._n_earlier + -(-largest_chunk // page_size) + 1
        self.kv = torch.empty((n_pages, *shape), dtype=sets.tensors.kv.dtype, device=device)
        self._token_positions = torch.empty((n_pages, n_kv_heads, page_size), dtype=torch.int64, device=device)

    def attend(
        self,
        block: int,
        limits: PageLimits,
        pages: Sequence[int],
        n_cached: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        scale: float,
        soft_cap: float,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the last N of ``n_cached`` tokens: (out [N, H, D], lse [N, H]).

        ``pages``: the sequence's host pages in order. Pages that the chunk fills are copied to the host, sinks and newest pages
        to the block. If all earlier pages fit into the staging area, the result is bit-identical to attention over the whole
        cache; otherwise blocks are merged by their log-sum-exps. ``CapacityError`` for a chunk longer than planned.
        """
        if len(q) > self._largest_chunk:
            raise CapacityError(
                "the chunk is larger than what memory was planned for",
                got=len(q),
                expected=f"at most {self._largest_chunk} tokens",
            )
        size, first = limits.page_size, (n_cached - len(q)) // limits.page_size
        of_logits = (scale, soft_cap)
        self._put_chunk(block, limits, n_cached, k, v, positions)
        end = -(-n_cached // size)
        own = range(self._n_earlier, self._n_earlier + end - first)
        kept = [j for j in range(first, end) if j < limits.n_sinks or j >= end - limits.n_newest]
        sets = self._sets.tensors
        self._copy(self.kv, sets.host_kv, [(own[j - first], pages[j]) for j in range(first, n_cached // size)])
        self._copy(self.kv, sets.kv, [(own[j - first], self.place(block, limits, j)) for j in kept])

        if first <= self._n_earlier:
            self._bring(pages[:first], 0)
            return self._over([*range(first), *own], n_cached, q, positions, of_logits, q.dtype)
        out, lse = self._over(own, n_cached - first * size, q, positions, of_logits, torch.float32)
        for begin in range(0, first, self._n_earlier):
            earlier = pages[begin : min(begin + self._n_earlier, first)]
            self._bring(earlier, begin)
            more, more_lse = self._over(range(len(earlier)), len(earlier) * size, q, positions, of_logits, torch.float32)
            both = torch.logaddexp(lse, more_lse)
            out = out * torch.exp(lse - both)[..., None] + more * torch.exp(more_lse - both)[..., None]
            lse = both
        return out.to(q.dtype), lse

    def _put_chunk(self, block: int, limits: PageLimits, n_cached: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write the open page and the chunk's tokens to the staging area, after the pages for earlier ones."""
        size, n_before = limits.page_size, n_cached - len(k)
        first, n_open = divmod(n_before, size)
        if n_open:
            self._copy(self._sets.tensors.kv, self.kv, [(self.place(block, limits, first), self._n_earlier)])
        self._number(self._n_earlier, -(-n_cached // size) - first, first)
        slots_N = torch.arange(len(k), device=k.device) + (self._n_earlier * size + n_open)
        append_tokens(self.kv, self._token_positions, slots_N, k, v, positions)

    def _bring(self, host_pages: Sequence[int], first: int) -> None:
        """Copy full pages of a sequence, starting with its page ``first``, to the beginning of the staging area."""
        self._copy(self._sets.tensors.host_kv, self.kv, [(page, at) for at, page in enumerate(host_pages)])
        self._number(0, len(host_pages), first)

    def _number(self, at: int, n_pages: int, first: int) -> None:
        """Set the token positions of staged pages from ``at`` on to those of the sequence's pages from ``first`` on."""
        n_kv_heads, size = self._token_positions.shape[1:]
        numbers = torch.arange(first * size, (first + n_pages) * size, device=self.kv.device)
        self._token_positions[at : at + n_pages] = numbers.view(n_pages, 1, size).expand(n_pages, n_kv_heads, size)

    def _over(
        self,
        staged: Sequence[int],
        n_tokens: int,
        q: Tensor,
        positions: Tensor,
        of_logits: tuple[float, float],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the first ``n_tokens`` tokens of the pages ``staged`` of the staging area.

        ``of_logits``: the scale and the soft cap.
        """
        scale, soft_cap = of_logits
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        cu_tokens, table_BT, kv_len_B = (
            torch.tensor(values, device=q.device) for values in ([0, len(q)], [list(staged)], [n_tokens])
        )
        attend_chunks(
            *(q, positions, cu_tokens, table_BT, kv_len_B, self.kv, self._token_positions, scale, out, lse),
            min_new=1,
            soft_cap=soft_cap,
        )
        return out, lse

    def place(self, block: int, limits: PageLimits, number: int) -> int:
        """The device page of a sink or one of the newest pages; the same rule as ``moves_kernels.own_page``."""
        own = number if number < limits.n_sinks else limits.n_sinks + number % limits.n_newest
        return block * self._sets.sizes.n_pages + own

    def _copy(self, source: Tensor, target: Tensor, pages: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages. ``pages``: (page in ``source``, page in ``target``)."""
        heads = range(self.kv.shape[2])
        moves = torch.tensor([(head, *pair) for pair in pages for head in heads], dtype=torch.int64).reshape(-1, 3)
        recall_pages(source, target, moves.to(self.kv.device))
