"""Memory of recall on a device, allocated before the first step: the two tiers, blocks of pages, and their state.

M host pages, U blocks (one per recalling layer and sequence, and a spare one), K KV heads, H query heads, P page size, D head
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trt_kv.errors import CapacityError, UsageError
from trt_kv.layer_budget import LayerBudget
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.program import Program, finds_budgets, recall_nodes
from trt_kv.runtime.backends.cuda.recall.moves import WorkingSets
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.cache.page_pool import PagePool

NO_PAGE = -1
NOBODY = -1


class PinnedTier(PagePool):
    """Pages on the host, [M, 2, K, P, D], in memory that the GPU reads and writes directly."""

    name = "the host tier"
    how_to_enlarge = "plan for more host pages, or send shorter or fewer prompts at once"

    def __init__(self, n_pages: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """``shape``: of one page. Pinned if ``device``, which recalls from it, is a GPU."""
        super().__init__(n_pages=n_pages, page_size=shape[2])
        place = "cpu" if device.type == "cuda" else device
        self.kv = torch.empty((n_pages, *shape), dtype=dtype, device=place, pin_memory=device.type == "cuda")

    @property
    def page_bytes(self) -> int:
        return self.kv[0].nbytes


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Pages of a block: ``own_pages`` for sinks and newest pages, slots for at most ``n_chosen`` pages, and staging slots."""

    own_pages: int
    n_chosen: int

    @property
    def n_slots(self) -> int:
        return self.n_chosen + staging_slots(self.n_chosen)

    @property
    def n_pages(self) -> int:
        return self.own_pages + self.n_slots

    @classmethod
    def of(cls, program: Program, longest_prompt: int) -> "BlockSizes":
        """Sizes for the largest budget of any layer. ``UsageError`` for budgets that depend on the prompt."""
        if finds_budgets(program):
            raise UsageError(
                "recall on a device needs budgets that do not depend on the prompt",
                got="a policy with budget unimetric",
                expected="budget constant, or a share",
                fix="choose another budget, or load the engine with recall on the host",
            )
        own_pages, n_chosen = 1, 1
        for node in recall_nodes(program):
            if node is not None:
                found = node.attributes
                limits = PageLimits(page_size=int(found["page_size"]), sinks=int(found["sinks"]), recent=int(found["recent"]))
                budget = LayerBudget(share=float(found["kept_share"]), tokens=int(found["kept_tokens"]))
                own_pages = max(own_pages, limits.n_sinks + limits.n_newest)
                n_chosen = max(n_chosen, limits.n_chosen(budget.of_prompt(longest_prompt)))
        return cls(own_pages=own_pages, n_chosen=n_chosen)


@dataclass(frozen=True, kw_only=True)
class HeldBlock:
    """An allocated block. It never fails: copies on the device raise no errors of their own."""

    number: int
    n_held_tokens: int
    failure: None = None


class DeviceSets:
    """Allocates blocks to layers of sequences, which are identified by their row, the number of their first host page."""

    def __init__(
        self,
        host: PinnedTier,
        sizes: BlockSizes,
        *,
        n_blocks: int,
        n_query_heads: int,
        summary_rows: int = 2,
        device: torch.device,
    ) -> None:
        """``summary_rows``: as ``page_counts.summary_rows`` counts them."""
        self.host = host
        self.sizes = sizes
        dtype, (_, n_kv_heads, _, head_size) = host.kv.dtype, host.kv.shape[1:]
        n_rows = n_blocks + 1

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def integers(fill: int, *shape: int) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.tensors = WorkingSets(
            host_kv=host.kv,
            kv=floats(n_rows * sizes.n_pages, *host.kv.shape[1:]),
            summaries=floats(host.n_pages, n_kv_heads, summary_rows, head_size),
            last_query=floats(n_rows, n_query_heads, head_size),
            held=integers(NO_PAGE, n_rows, n_kv_heads, sizes.n_slots),
            chosen=integers(NO_PAGE, n_rows, n_kv_heads, sizes.n_chosen),
            slots=integers(0, n_rows, n_kv_heads, sizes.n_chosen),
            chosen_for=integers(0, n_rows, n_kv_heads),
            moved=integers(0, n_rows, n_kv_heads, 2),
            first_slot=sizes.own_pages,
            block_pages=sizes.n_pages,
        )
        self.block_of = integers(n_blocks, host.n_pages)
        """[M] int64 on the device: the block of each row; the spare one for pages that are no rows."""
        self._row_of = np.full(n_blocks, NOBODY, np.int64)
        """The row that each block is allocated to: written in one operation, before the block is used."""
        self._nobody = n_blocks

    @property
    def n_free(self) -> int:
        return int((self._row_of == NOBODY).sum())

    @property
    def rows(self) -> list[int]:
        """The rows that have a block."""
        return [int(row) for row in self._row_of if row != NOBODY]

    def block(self, row: int) -> int:
        """The block of a row that has one."""
        return int(np.flatnonzero(self._row_of == row)[0])

    def get(self, row: int) -> HeldBlock | None:
        """The block of a row; None if it has none."""
        if row == NOBODY or row not in self._row_of:
            return None
        return HeldBlock(number=self.block(row), n_held_tokens=self.sizes.n_pages * self.host.page_size)

    def fork(self, row: int, twin_row: int) -> None:
        """Copy a row's block to a new block of ``twin_row``."""
        block, twin = self.block(row), self.allocate(twin_row)
        sets, size = self.tensors, self.sizes.n_pages
        for tensor in (sets.last_query, sets.held, sets.chosen, sets.slots, sets.chosen_for, sets.moved):
            tensor[twin] = tensor[block]
        sets.kv[twin * size : (twin + 1) * size] = sets.kv[block * size : (block + 1) * size]

    def allocate(self, row: int) -> int:
        """Allocate an empty block to a row whose cache begins now; ``CapacityError`` if all are in use."""
        self.release([row])
        free = np.flatnonzero(self._row_of == NOBODY)
        if not len(free):
            raise CapacityError(
                "every working set on the device is in use",
                got=f"{len(self._row_of)} layers of sequences",
                fix="plan for more sequences, or send fewer at once",
            )
        block = int(free[0])
        self._row_of[block] = row
        self.block_of[row] = block
        self.tensors.held[block] = NO_PAGE
        self.tensors.chosen_for[block] = 0
        self.tensors.moved[block] = 0
        return block

    def release(self, rows: Sequence[int]) -> None:
        """Free the blocks of ``rows``; rows without one are ignored."""
        for row in rows:
            if self.get(row) is not None:
                self.block_of[row] = self._nobody
                self._row_of[self.block(row)] = NOBODY
