"""Decode steps of sequences with the cache in pinned host memory, by several recall methods that share both tiers.

Each side runs the next step of the same sequences, so sides can take turns: the chosen and resident pages do not depend on
the side. There is no prefill; pages are random.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.device import device, on_gpu, recorded
from benchmarks.gpu.freekv_model import DTYPE, Corrections, Dense, Shape, drifting_queries
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.spec import SPEC
from trt_kv.plugins.recall_attention.triton import summaries_of_filled
from trt_kv.program import Program
from trt_kv.runtime.backends.cuda.recall.background import InPlace, SideStream, SideWork
from trt_kv.runtime.backends.cuda.recall.begin import BegunLayer, LayerStep
from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall, RecallCapacity
from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages
from trt_kv.runtime.backends.cuda.store import DeviceKvPool

FILL_PAGES = 256


class Way(DeviceRecall):
    """Recall that shares the tiers and working sets of another one."""

    def __init__(self, other: DeviceRecall, side: SideWork | None) -> None:
        vars(self).update(vars(other))
        on = other.device.device
        self._side = side or (SideStream(on) if on.type == "cuda" else InPlace())


class CorrectedByHost(Way):
    """The host checks in every layer whether any KV head is corrected, as in the published FreeKV system."""

    def _recall_at_once(self, step: LayerStep, begun: BegunLayer) -> Tensor:
        if bool(begun.corrected_BK.any()):
            return super()._recall_at_once(step, begun)
        *_, places_BKT = self._plan_now(step, begun, torch.zeros_like(begun.needs_BK), begun.probe_BHD.float())
        return places_BKT


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way of running a step. ``overlaps``: recall has its own stream. ``replayed``: as a CUDA graph. ``tau``: replaces the
    policy's threshold.
    """

    name: str
    kind: type[Way] = Way
    overlaps: bool = True
    replayed: bool = True
    tau: float | None = None


OURS = Side(name="ours")
LAUNCHED = Side(name="ours, launched one by one", replayed=False)
IN_PLACE = Side(name="ours, nothing overlaps", overlaps=False)
BY_HOST = Side(name="streamed, host decides corrections", kind=CorrectedByHost, replayed=False)
STREAMED = (OURS, LAUNCHED, IN_PLACE, BY_HOST) if on_gpu() else (OURS, BY_HOST)
"""Without a GPU the first three are the same."""
SYNCHRONOUS = Side(name="synchronous retrieval", overlaps=False, tau=1.01)


class Tiers:
    """Both tiers for the most sequences, and random pages on the host with their summaries."""

    def __init__(self, shape: Shape) -> None:
        on = device()
        pool = DeviceKvPool(
            n_pages=0,
            page_size=shape.page_size,
            n_kv_heads=shape.n_kv_heads,
            head_size=shape.head_size,
            dtype=DTYPE,
            device=on,
        )
        capacity = RecallCapacity(
            host_pages=shape.host_pages,
            sequences=shape.most_sequences,
            longest_prompt=shape.most_tokens,
            largest_chunk=1,
            prompt_block=shape.page_size,
        )
        self.recall = DeviceRecall(shape.program(), capacity, pool, n_query_heads=shape.n_heads)
        sets = self.recall.sets.tensors
        torch.manual_seed(0)
        for begin in range(0, shape.host_pages, FILL_PAGES):
            part = sets.host_kv[begin : begin + FILL_PAGES]
            pages = torch.randn(part.shape, dtype=part.dtype, device=on)
            pages[:, 0, :, :, : shape.head_size // 2] = 1.0
            part.copy_(pages)
        sets.kv.zero_()
        sets.last_query.zero_()
        n_tokens = shape.host_pages * shape.page_size
        ends, lengths, table = ([0, n_tokens], [n_tokens], [list(range(shape.host_pages))])
        cu_tokens, kv_len_B, table_BT = (torch.tensor(values, device=on) for values in (ends, lengths, table))
        (node,) = shape.program()[0]
        summaries_of_filled(
            sets.host_kv, sets.summaries, cu_tokens, table_BT, kv_len_B, n_tokens, int(node.attributes["summary"])
        )


class Sequences:
    """``batch`` sequences of ``n_tokens``, which have room to grow by ``room`` tokens.

    Each layer of each sequence owns its first page and those that it will fill. The rest is drawn from the other host pages in
    random order without replacement, and again in another order when all have been drawn: only then are pages shared.
    """

    def __init__(self, tiers: Tiers, shape: Shape, dense: Dense, n_tokens: int, batch: int, room: int, n_steps: int) -> None:
        self.shape, self.batch, self.n_tokens, self.recall = shape, batch, n_tokens, tiers.recall
        self._on, self._dense, dtype = device(), dense, getattr(torch, DTYPE)
        self.values = self._step_tensors(room)
        self.queries = torch.zeros(n_steps, shape.n_layers, batch, shape.n_heads, shape.head_size, dtype=dtype, device=self._on)
        self.corrected = torch.zeros(n_steps, shape.n_layers, batch, shape.n_kv_heads, dtype=torch.bool, device=self._on)
        self.at = torch.zeros(1, dtype=torch.int64, device=self._on)
        torch.manual_seed(1)
        self.k, self.v = torch.randn(2, batch, shape.n_kv_heads, shape.head_size, device=self._on).to(dtype)
        self.k[:, :, : shape.head_size // 2] = 1.0
        self._x = torch.randn(batch, shape.hidden, device=self._on).to(dtype)
        self._in_pool = {state.name: tiers.recall.device.states[state.name] for state in SPEC.states}
        self._in_pool["slots"] = torch.empty(shape.n_layers, 0, dtype=torch.int64, device=self._on)
        """The op's arguments that refer to a pool; recall uses its own tiers instead."""
        self._place()

    def _step_tensors(self, room: int) -> dict[str, Tensor]:
        shape, batch, n_tokens = self.shape, self.batch, self.n_tokens
        layers, size = (shape.n_layers, batch), shape.page_size
        n_shared = n_tokens // size - 1
        n_own = -(-(n_tokens + room) // size) - n_shared
        own = torch.arange(shape.n_layers * batch * n_own).view(*layers, n_own)
        generator = torch.Generator().manual_seed(0)
        n_others, dealt = shape.host_pages - own.numel(), torch.empty(0, dtype=torch.int64)
        if n_others < n_shared:
            raise RuntimeError(f"{shape.host_pages} host pages are too few for {n_shared + n_own} of a sequence")
        while len(dealt) < shape.n_layers * batch * n_shared:
            dealt = torch.cat([dealt, own.numel() + torch.randperm(n_others, generator=generator)])
        shared = dealt[: shape.n_layers * batch * n_shared].view(*layers, n_shared)
        self.distinct_share = min(1.0, n_others / shared.numel())
        table = torch.cat([own[..., :1], shared, own[..., 1:]], dim=2)
        values = {
            "positions": torch.full((batch,), n_tokens - 1),
            "cu_tokens": torch.arange(batch + 1),
            "prompt_remaining": torch.full((batch,), -1),
            "prompt_len": torch.full((batch,), n_tokens),
            "page_table": table,
            "kv_len": torch.full(layers, n_tokens),
            "adaptive_budget": torch.full(layers, -1),
            "query_rows": table[:, :, 0],
        }
        return {name: value.to(self._on).contiguous() for name, value in values.items()}

    def _place(self) -> None:
        """Working sets, with the sinks and the newest pages."""
        shape, sets = self.shape, self.recall.sets
        (node,) = shape.program()[0]
        limits = PageLimits(
            page_size=shape.page_size, sinks=int(node.attributes["sinks"]), recent=int(node.attributes["recent"])
        )
        end = -(-self.n_tokens // shape.page_size)
        places = [(j, j) for j in range(limits.n_sinks)]
        places += [(j, limits.n_sinks + j % limits.n_newest) for j in range(end - limits.n_newest, end)]
        moves = []
        for pages in self.values["page_table"].flatten(0, 1).tolist():
            first = sets.allocate(pages[0]) * sets.sizes.n_pages
            moves += [(head, pages[j], first + own) for j, own in places for head in range(shape.n_kv_heads)]
        recall_pages(sets.tensors.host_kv, sets.tensors.kv, torch.tensor(moves, device=self._on))

    def turn(self, corrections: Corrections) -> None:
        """Set the drift of the following queries. The next step corrects all KV heads and must not be the host side's."""
        queries, corrected = drifting_queries(self.shape, self.batch, len(self.queries), corrections)
        self.queries.copy_(queries)
        self.corrected.copy_(corrected)
        self.at.fill_(-1)

    def run(self, way: Way, program: Program, results: list[tuple[Tensor, ...]]) -> Tensor:
        """One token of every sequence through all layers: logits. ``results`` becomes (out, lse, corrected) of each layer."""
        self.values["kv_len"].add_(1)
        self.values["positions"].add_(1)
        self.at.add_(1).remainder_(len(self.queries))
        q_LBHD = self.queries.index_select(0, self.at)[0]
        kernel = way.kernels("decode")["RecallAttention"]
        results.clear()

        def attend(layer: int) -> Tensor:
            (node,) = program[layer]
            results.append(kernel(**self.values, **self._in_pool, q=q_LBHD[layer], k=self.k, v=self.v, **node.attributes))
            return results[-1][0]

        return self._dense.step(self._x, attend)

    @property
    def n_moved(self) -> Tensor:
        """Page-heads recalled so far, on demand and ahead."""
        return self.recall.sets.tensors.moved.sum((0, 1)).cpu()

    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        sets = self.recall.sets.tensors
        tensors = [sets.kv, sets.last_query, sets.held, sets.chosen, sets.slots, sets.chosen_for, sets.moved]
        return [*tensors, self.values["kv_len"], self.values["positions"], self.at]


class Step:
    """The next step of sequences by one side; ``results`` of the last one: (out, lse, corrected) of each layer.

    In a CUDA graph they are the same tensors each time.
    """

    def __init__(self, sequences: Sequences, side: Side) -> None:
        self.sequences, self.side = sequences, side
        self.results: list[tuple[Tensor, ...]] = []
        way = side.kind(sequences.recall, None if side.overlaps else InPlace())
        program = sequences.shape.program(side.tau)
        self._run: Callable[[], object] = lambda: sequences.run(way, program, self.results)
        if side.replayed:
            self._run = recorded(self._run)

    def __call__(self) -> None:
        self._run()

    @property
    def attended(self) -> Tensor:
        """[L, B, H, D]."""
        return torch.stack([out for out, *_ in self.results])

    @property
    def corrected(self) -> Tensor:
        """The KV heads that were corrected, [L, B, K] bool."""
        return torch.stack([corrected for *_, corrected in self.results]) != 0
