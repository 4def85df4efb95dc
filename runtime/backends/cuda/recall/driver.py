"""RecallAttention over two tiers, driven by the device: page choices and copies are never read back by the host.

One layer of one decode step, as launches that a CUDA graph can capture and replay at any sequence lengths
(docs/decisions/0022-recall-driven-by-the-device.md):

    main stream                                             side stream
    append the token; copy a full page to the host, summarise it
    test drift, count pages
    queries are written -----------------------------------> choose pages for the next step
    KV heads that need pages now choose and plan; write page tables
    copy their missing pages
    page tables are written -------------------------------> plan; fill slots that attention does not read
    attention over the working set
    attention is done -------------------------------------> fill slots that attention has read
    next layers ...
    <------------------- the last layer joins the side stream

The plan on the side stream changes the chosen pages and the contents of slots, after this step's page table was made from them
and before the next step's is. CUDA graph capture requires that a forked stream joins its origin within the step. The price: if
recall is not done when the last layer has attended, the step waits for it there, before that layer's output projection,
instead of overlapping it with the first layers of the next step.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trt_kv.errors import CapacityError, UsageError
from trt_kv.plugins.attention_triton import attend_one
from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.plugins.recall_attention.bounds_triton import page_bounds
from trt_kv.plugins.recall_attention.page_counts import PageLimits, most_rows
from trt_kv.plugins.recall_attention.triton import summaries_of_filled
from trt_kv.plugins.registry import Kernel, called_by_name
from trt_kv.program import Program, recalling_layers
from trt_kv.runtime.backends.cuda.recall.ahead import RecallAhead
from trt_kv.runtime.backends.cuda.recall.background import InPlace, SideStream, SideWork
from trt_kv.runtime.backends.cuda.recall.begin import BegunLayer, LayerStep, begin_layer
from trt_kv.runtime.backends.cuda.recall.moves import WorkingSets, plan_now
from trt_kv.runtime.backends.cuda.recall.prompt_attention import PromptStaging
from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages
from trt_kv.runtime.backends.cuda.recall.working_set import BlockSizes, DeviceSets, PinnedTier
from trt_kv.runtime.backends.cuda.store import DeviceKvPool, bits_on_host, from_bits
from trt_kv.runtime.backends.host.recall.prompt_attention import BLOCK_TOKENS
from trt_kv.runtime.backends.step import Ints


@dataclass(frozen=True, kw_only=True)
class RecallCapacity:
    """Sizes that memory is planned for: host pages, sequences, tokens of the longest prompt and of the largest chunk.
    ``prompt_block``: tokens of earlier pages that are on the device at a time while a chunk attends to them.
    """

    host_pages: int
    sequences: int
    longest_prompt: int
    largest_chunk: int
    prompt_block: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise UsageError("bad sizes for recall", got=vars(self), expected="at least 1 of each")


class DeviceRecall:
    """Stateful kernels of RecallAttention, like ``StreamedRecall``. Page tables list host pages; query rows are the numbers of
    first host pages.

    Prompts are read by the kernels of phase "prefill", which wait for the device. Those of "decode" never wait, and accept
    generated tokens only. ``release`` frees a sequence's working sets.
    """

    in_memory = False
    statistics = None
    """Not counted: the host does not read back what the device recalls."""

    def __init__(
        self,
        program: Program,
        capacity: RecallCapacity,
        pool: DeviceKvPool,
        *,
        n_query_heads: int,
        side: SideWork | None = None,
    ) -> None:
        """``program``: of either phase. ``pool``: the cache of the layers that do not recall; its device, dtype and page shape
        apply to the others, too. ``side``: runs work that no step waits for; None: on a second stream if the device is a GPU.

        ``UsageError`` if no layer recalls, or if budgets depend on the prompt.
        """
        layers = recalling_layers(program)
        if not layers:
            raise UsageError("no layer recalls", expected="a program with RecallAttention", fix="choose a policy that recalls")
        sizes = BlockSizes.of(program, capacity.longest_prompt)
        on = pool.device
        self.device = pool
        self.host = PinnedTier(capacity.host_pages, pool.kv.shape[1:], pool.dtype, on)
        self.sets = DeviceSets(
            self.host,
            sizes,
            n_blocks=capacity.sequences * len(layers),
            n_query_heads=n_query_heads,
            summary_rows=most_rows(program, pool.page_size, pool.kv_dtype),
            device=on,
        )
        self.prompts = PromptStaging(self.sets, largest_chunk=capacity.largest_chunk, block_tokens=capacity.prompt_block)
        self._longest_prompt = capacity.longest_prompt
        self._side = side or (SideStream(on) if on.type == "cuda" else InPlace())
        self._first_layer, self._last_layer = layers[0], layers[-1]

    def kernels(self, phase: str) -> Mapping[str, Kernel]:
        """Kernels by op name that replace the ops' own in steps of ``phase``, "prefill" or "decode"."""
        attend = partial(self._attend, reads_prompts=phase == "prefill")
        return {"RecallAttention": called_by_name("RecallAttention", attend)}

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence from its host pages ``pages`` to the new host pages ``twin_pages`` of its fork."""
        self._side.join()
        sets = self.sets.tensors
        heads = range(sets.kv.shape[2])
        pairs = zip(pages.tolist(), twin_pages.tolist(), strict=True)
        moves = torch.tensor([(head, *pair) for pair in pairs for head in heads], device=self.device.device)
        with torch.cuda.device(moves.device) if moves.is_cuda else nullcontext():  # Triton launches on it
            recall_pages(sets.host_kv, sets.host_kv, moves)
        sets.summaries[torch.from_numpy(twin_pages)] = sets.summaries[torch.from_numpy(pages)]
        self.sets.fork(int(pages[0]), int(twin_pages[0]))

    def read_pages(self, row: int, pages: Ints) -> Mapping[str, np.ndarray]:
        """See ``CopyableTiers``. Waits for the device."""
        sets = self._waited_for()
        return {
            "kv": bits_on_host(sets.host_kv[torch.from_numpy(pages)]),
            "summaries": bits_on_host(sets.summaries[torch.from_numpy(pages).to(sets.summaries.device)]),
        }

    def write_pages(self, pages: Ints, values: Mapping[str, np.ndarray]) -> None:
        """See ``CopyableTiers``. Waits for the device."""
        sets = self._waited_for()
        summaries = from_bits(values["summaries"], sets.summaries.dtype)
        sets.host_kv[torch.from_numpy(pages)] = from_bits(values["kv"], sets.host_kv.dtype)
        sets.summaries[torch.from_numpy(pages).to(sets.summaries.device)] = summaries.to(sets.summaries.device)

    def read_open_page(self, row: int, page: int, number: int, limits: PageLimits) -> np.ndarray:
        """See ``CopyableTiers``. Waits for the device."""
        sets = self._waited_for()
        return bits_on_host(sets.kv[self.prompts.place(self.sets.block(row), limits, number)])

    def begin_at(self, pages: Ints, positions_MP: Ints, limits: PageLimits, *, n_tokens: int) -> None:
        """See ``CopyableTiers``. Sinks and newest pages are copied to the device."""
        sets, block = self._waited_for(), self.sets.allocate(int(pages[0]))
        for number, page in enumerate(pages.tolist()):
            if number < limits.n_sinks or number >= len(pages) - limits.n_newest:
                sets.kv[self.prompts.place(block, limits, number)] = sets.host_kv[page].to(sets.kv.device)

    def _waited_for(self) -> WorkingSets:
        """The working sets and the host tier, when the device has written all that it was to write."""
        self._side.join()
        sets = self.sets.tensors
        if sets.kv.is_cuda:
            torch.cuda.synchronize(sets.kv.device)
        return sets

    def warm_up(self) -> None:
        """Does nothing: the executor's warm-up steps compile all kernels."""

    def release(self, rows: Sequence[int]) -> None:
        """Free the working sets of layers of sequences, identified by their first host pages."""
        self._side.join()
        self.sets.release(rows)

    def close(self) -> None:
        """Free all working sets."""
        self.release(self.sets.rows)

    def _attend(self, args: Arguments[Tensor], *, reads_prompts: bool) -> tuple[Tensor, Tensor, Tensor]:
        """RecallAttention according to its spec. The states that the spec keeps in the pool are kept in working sets."""
        if args.layer == self._first_layer:
            self._side.join()  # a step may have been interrupted before its last layer
        sets, step = self.sets.tensors, LayerStep.of(args)
        out, lse = torch.empty_like(step.q_NHD), torch.empty(args.q.shape[:2], dtype=torch.float32, device=args.q.device)
        if reads_prompts:
            self._read_prompts(step, out, lse)
        begun = begin_layer(sets, self.sets.block_of, step)
        if reads_prompts:  # from the host, where every full page is by now
            summaries_of_filled(
                sets.host_kv, sets.summaries, args.cu_tokens, step.table_BT, step.kv_len_B, len(args.q), args.summary
            )
        ahead = RecallAhead(sets, step, begun) if args.tau <= 1.0 else None  # a cosine is at most 1
        if ahead is not None:
            self._side.submit(ahead.choose)
        places_BKT = self._recall_at_once(step, begun)
        if ahead is not None:
            self._side.submit(ahead.plan_and_fill)
        attend_one(
            *(step.q_NHD, args.cu_tokens, places_BKT, begun.now.attended, sets.kv, args.scale, out, lse), soft_cap=args.soft_cap
        )
        if ahead is not None:
            self._side.submit(ahead.fill_read)
        if args.layer == self._last_layer:
            self._side.join()
        return out, lse, begun.corrected_BK

    def _recall_at_once(self, step: LayerStep, begun: BegunLayer) -> Tensor:
        """Choose and copy pages now for KV heads that were corrected, or for which none were chosen ahead. Returns the device
        pages that all KV heads attend to, [B, K, T].
        """
        sets = self.sets.tensors
        bounds_BHT = page_bounds(
            begun.probe_BHD, sets.summaries, step.table_BT, begun.now.between, begun.wanted_BK, step.limits.n_sinks
        )
        rows, made, places_BKT = self._plan_now(step, begun, begun.needs_BK, bounds_BHT)
        recall_pages(sets.host_kv, sets.kv, rows, made)
        return places_BKT

    def _plan_now(
        self, step: LayerStep, begun: BegunLayer, needs_BK: Tensor, bounds_BHT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moves, which of them are to be made, and the device pages that are attended to: see ``plan_now``."""
        return plan_now(
            self.sets.tensors,
            bounds_BHT,
            step.table_BT,
            step.kv_len_B,
            begun.now,
            begun.blocks_B,
            needs_BK,
            step.limits,
            step.args.pooling,
            step.args.softmax_scale,
        )

    def _read_prompts(self, step: LayerStep, out: Tensor, lse: Tensor) -> None:
        """Attention of prompt chunks, one after another, into their rows of ``out`` and ``lse``. ``CapacityError`` for a prompt
        longer than planned.
        """
        args, limits = step.args, step.limits
        ends, prompts, lengths = args.cu_tokens.tolist(), args.prompt_len.tolist(), step.kv_len_B.tolist()
        remaining = args.prompt_remaining.tolist()
        for b, (begin, end) in enumerate(pairwise(ends)):
            if begin == end or remaining[end - 1] < 0:
                continue
            if prompts[b] > self._longest_prompt:
                raise CapacityError(
                    "the prompt is longer than recall was planned for",
                    got=f"{prompts[b]} tokens",
                    expected=f"at most {self._longest_prompt}",
                    fix="send a shorter prompt, or plan for longer ones",
                )
            pages = step.table_BT[b, : -(-lengths[b] // limits.page_size)].tolist()
            begins = lengths[b] == end - begin
            block = self.sets.allocate(pages[0]) if begins else self.sets.block(pages[0])
            q, k, v, positions = (tensor[begin:end] for tensor in (step.q_NHD, args.k, args.v, args.positions))
            out[begin:end], lse[begin:end] = self.prompts.attend(
                block, limits, pages, lengths[b], q, k, v, positions, scale=args.scale, soft_cap=args.soft_cap
            )
