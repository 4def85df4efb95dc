"""Decode steps of some layers whose cache lies in pinned host memory: recall that overlaps, recall that does not, and
corrections for which the host waits; at correction rates that synthetic queries bring about.

A layer is RecallAttention and, in place of its projections and its MLP, one matrix product that reads as many weights. Keys and
values are random and nothing reads a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import WARMUP, device, on_gpu, recorded, times
from benchmarks.harness import Check, Report, Row, check_close
from trt_kv.plugins.attention_triton import attend_one
from trt_kv.plugins.recall_attention.choice_triton import PageCounts
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.recall_triton import recall_pages
from trt_kv.plugins.recall_attention.triton import summaries_of_filled
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import Program, program_of
from trt_kv.runtime.device_pool import DeviceKvPool
from trt_kv.runtime.recall.device_recall import DeviceRecall, LayerStep, RecallCapacity
from trt_kv.runtime.recall.side_work import InPlace

RATES = (0.0, 0.1, 0.5, 0.9, 1.0)
DTYPE = "float16"
NOISE = 0.05
"""Of queries that are not to be corrected, beside the query before: a cosine of about 0.999."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the layers, Llama 3 8B's by default; ``n_weights`` are those of a layer."""

    n_layers: int = 4
    n_heads: int = 32
    n_kv_heads: int = 8
    head_size: int = 128
    page_size: int = 32
    hidden: int = 4096
    n_weights: int = 218_103_808
    rounds: int = 20

    @property
    def program(self) -> Program:
        return program_of(
            POLICY if self == Shape() else SMALL_POLICY,
            phase="decode",
            n_layers=self.n_layers,
            scale=self.head_size**-0.5,
            page_size=self.page_size,
        )

    @property
    def steps_per_rate(self) -> int:
        """Some more than are measured: recording takes steps too."""
        return self.rounds + 3 * WARMUP


POLICY = policy_from_name("freekv")
SMALL_POLICY: Policy = dataclasses.replace(POLICY, tokens=24, sinks=3, recent=5)
SMALL = Shape(n_layers=2, n_heads=4, n_kv_heads=2, head_size=6, page_size=4, hidden=8, n_weights=128, rounds=1)


class CorrectedByHost(DeviceRecall):
    """The host asks in every layer whether any KV head is corrected, as the system published with FreeKV does."""

    def _recall_at_once(self, step: LayerStep, counts: PageCounts, corrected_BK: Tensor, probe_BHD: Tensor) -> None:
        if bool(corrected_BK.any()):
            super()._recall_at_once(step, counts, corrected_BK, probe_BHD)


class Stack:
    """The layers of one side, and a sequence of ``n_tokens`` that grows with every step."""

    def __init__(self, shape: Shape, n_tokens: int, make: Callable[..., DeviceRecall], weights: Tensor) -> None:
        self.shape, self._weights, self._on = shape, weights, device()
        size = shape.page_size
        most = n_tokens + (len(RATES) + 1) * shape.steps_per_rate
        self.n_pages = -(-most // size)
        pool = DeviceKvPool(
            n_pages=0,
            page_size=size,
            n_kv_heads=shape.n_kv_heads,
            head_size=shape.head_size,
            dtype=DTYPE,
            device=self._on,
        )
        capacity = RecallCapacity(
            host_pages=shape.n_layers * self.n_pages, sequences=1, longest_prompt=n_tokens, largest_chunk=1, prompt_block=size
        )
        self.recall = make(shape.program, capacity, pool, n_query_heads=shape.n_heads)
        self._kernel = self.recall.kernels("decode")["RecallAttention"]
        self._values = self._step_tensors(n_tokens)
        self._queries = torch.zeros(
            shape.steps_per_rate, shape.n_layers, 1, shape.n_heads, shape.head_size, dtype=pool.dtype, device=self._on
        )
        self._at = torch.zeros(1, dtype=torch.int64, device=self._on)
        torch.manual_seed(1)
        self._k, self._v = torch.randn(2, 1, shape.n_kv_heads, shape.head_size, device=self._on).to(pool.dtype)
        self._x = torch.randn(1, shape.hidden, device=self._on).to(pool.dtype)
        self._fill(n_tokens)

    def _step_tensors(self, n_tokens: int) -> dict[str, Tensor]:
        shape = self.shape
        table = torch.randperm(shape.n_layers * self.n_pages, generator=torch.Generator().manual_seed(0))
        values = {
            "positions": torch.tensor([n_tokens - 1]),
            "cu_tokens": torch.tensor([0, 1]),
            "prompt_remaining": torch.tensor([-1]),
            "prompt_len": torch.tensor([n_tokens]),
            "page_table": table.view(shape.n_layers, 1, -1),
            "kv_len": torch.full((shape.n_layers, 1), n_tokens),
            "found_budget": torch.full((shape.n_layers, 1), -1),
        }
        values["query_rows"] = values["page_table"][:, :, 0]
        return {name: value.to(self._on).contiguous() for name, value in values.items()}

    def _fill(self, n_tokens: int) -> None:
        """Random pages on the host, their summaries; sinks and newest pages on the device."""
        sets, size = self.recall.sets.tensors, self.shape.page_size
        torch.manual_seed(0)
        some = torch.randn(min(256, len(sets.host_kv)), *sets.host_kv.shape[1:], device=self._on).to(sets.host_kv.dtype)
        for begin in range(0, len(sets.host_kv), len(some)):
            part = sets.host_kv[begin : begin + len(some)]
            part.copy_(some[: len(part)].roll(begin // len(some), dims=3))
        cu_tokens, kv_len_B = (torch.tensor(values, device=self._on) for values in ([0, n_tokens], [n_tokens]))
        for layer, (node,) in enumerate(self.shape.program):
            table_BT = self._values["page_table"][layer]
            summaries_of_filled(
                sets.host_kv, sets.summaries, cu_tokens, table_BT, kv_len_B, n_tokens, int(node.attributes["summary"])
            )
            pages = table_BT[0].tolist()
            block = self.recall.sets.allocate(pages[0])
            limits = PageLimits(page_size=size, sinks=int(node.attributes["sinks"]), recent=int(node.attributes["recent"]))
            end = -(-n_tokens // size)
            places = [(j, j) for j in range(limits.n_sinks)]
            places += [(j, limits.n_sinks + j % limits.n_newest) for j in range(end - limits.n_newest, end)]
            moves = [
                (head, pages[j], block * sets.block_pages + own) for j, own in places for head in range(self.shape.n_kv_heads)
            ]
            recall_pages(sets.host_kv, sets.kv, torch.tensor(moves, device=self._on))
        sets.last_query.zero_()

    def turn(self, rate: float) -> None:
        """From here on so large a share of KV heads is corrected; all of them in the first step."""
        shape = self.shape
        rng = np.random.default_rng(int(1000 * rate))
        n, of_layers, n_kv_heads = shape.steps_per_rate, shape.n_layers, shape.n_kv_heads
        q = rng.standard_normal((n, of_layers, n_kv_heads, shape.n_heads // n_kv_heads, shape.head_size), np.float32)
        fresh = rng.random((n, of_layers, n_kv_heads)) < rate
        for i in range(1, n):
            q[i] = np.where(fresh[i][..., None, None], q[i], q[i - 1] + NOISE * q[i])
        self._queries.copy_(torch.from_numpy(q).view(self._queries.shape))
        self._at.fill_(-1)

    def step(self) -> Tensor:
        """One token through all layers; the last one's attention."""
        self._values["kv_len"].add_(1)
        self._values["positions"].add_(1)
        self._at.add_(1).remainder_(len(self._queries))
        q_LNHD = self._queries.index_select(0, self._at)[0]
        x, out = self._x, q_LNHD[0]
        for layer, (node,) in enumerate(self.shape.program):
            out, *_ = self._kernel(**self._values, q=q_LNHD[layer], k=self._k, v=self._v, **node.attributes)
            x = (x @ self._weights)[:, : self.shape.hidden]
        return out

    @property
    def n_moved(self) -> int:
        """Page-heads that have been brought so far."""
        return int(self.recall.sets.tensors.moved.sum())


class WholeCache:
    """The same layers with the whole cache on the device. All read one cache, which is larger than what a GPU caches."""

    def __init__(self, shape: Shape, n_tokens: int, weights: Tensor) -> None:
        on = device()
        n_pages = -(-n_tokens // shape.page_size)
        self._shape, self._weights = shape, weights
        torch.manual_seed(0)
        page = (2, shape.n_kv_heads, shape.page_size, shape.head_size)
        self._kv = torch.empty(n_pages, *page, dtype=weights.dtype, device=on).normal_()
        self._table_BKT = torch.randperm(n_pages, device=on).expand(1, shape.n_kv_heads, -1)
        self._cu_tokens, self._kv_len_B = (torch.tensor(values, device=on) for values in ([0, 1], [n_tokens]))
        self._q = torch.randn(1, shape.n_heads, shape.head_size, device=on).to(weights.dtype)
        self._x = torch.randn(1, shape.hidden, device=on).to(weights.dtype)

    def step(self) -> Tensor:
        out, lse = torch.empty_like(self._q), torch.empty(self._q.shape[:2], device=self._q.device)
        scale, x = self._shape.head_size**-0.5, self._x
        for _ in range(self._shape.n_layers):
            attend_one(self._q, self._cu_tokens, self._table_BKT, self._kv_len_B, self._kv, scale, out, lse)
            x = (x @ self._weights)[:, : self._shape.hidden]
        return out


LAUNCHED, WAITED_FOR = "ahead, launched one by one", "ahead, launched, host waits for corrections"
"""The others are CUDA graphs. What waits for the device cannot be one."""
SIDES: Mapping[str, Callable[..., DeviceRecall]] = {
    "ahead, on a stream of its own": DeviceRecall,
    "nothing overlaps": partial(DeviceRecall, side=InPlace()),
    LAUNCHED: DeviceRecall,
    WAITED_FOR: CorrectedByHost,
}


def run(*, quick: bool) -> Report:
    """FreeKV's budget of 2048 tokens, batch 1, at 32k and 128k tokens."""
    shape = SMALL if quick else Shape()
    weights = torch.randn(shape.hidden, shape.n_weights // shape.hidden, device=device()).to(getattr(torch, DTYPE))
    weights *= shape.hidden**-0.5
    checks = [_check_sides()]
    rows: list[Row] = []
    for n_tokens in (61,) if quick else (32768, 131072):
        rows += _rows(shape, n_tokens, weights, (0.5,) if quick else RATES)
    return Report(
        title="Decode steps with the cache in pinned host memory, by how many KV heads are corrected",
        settings={"shape": dataclasses.asdict(shape), "dtype": DTYPE, "policy": dataclasses.asdict(POLICY), "noise": NOISE},
        checks=checks,
        tables={"medians": rows},
    )


def _rows(shape: Shape, n_tokens: int, weights: Tensor, rates: Sequence[float]) -> list[Row]:
    stacks = {name: Stack(shape, n_tokens, make, weights) for name, make in SIDES.items()}
    steps: dict[str, Callable[[], Any]] = {}
    for name, stack in stacks.items():
        stack.turn(1.0)
        stack.step()  # nothing has been chosen yet
        steps[name] = stack.step if name in (LAUNCHED, WAITED_FOR) else recorded(stack.step)
    steps["whole cache on the device"] = recorded(WholeCache(shape, n_tokens, weights).step)
    rows = []
    for rate in rates:
        before = {}
        for name, stack in stacks.items():
            stack.turn(rate)
            steps[name]()
            before[name] = stack.n_moved
        timings = times(steps, rounds=shape.rounds)
        n_steps = shape.rounds + (WARMUP if on_gpu() else 0)
        for name in steps:
            stack_or_none = stacks.get(name)
            moved = None if stack_or_none is None else (stack_or_none.n_moved - before[name]) / n_steps / shape.n_layers
            device_bytes = None if stack_or_none is None else stack_or_none.recall.sets.planned_bytes["device"]
            rows.append(
                {
                    "tokens": n_tokens,
                    "corrected_share": rate,
                    "side": name,
                    **timings.row(name),
                    "page_heads_per_layer": None if moved is None else round(moved, 1),
                    "device_kv_mib": None if device_bytes is None else round(device_bytes / 2**20, 2),
                }
            )
    return rows


def _check_sides() -> Check:
    """A few steps of a small stack: all sides say the same."""
    weights = torch.zeros(SMALL.hidden, SMALL.n_weights // SMALL.hidden, dtype=getattr(torch, DTYPE), device=device())
    outs = []
    for make in SIDES.values():
        stack = Stack(SMALL, 61, make, weights)
        stack.turn(0.5)
        outs.append(np.stack([stack.step().float().cpu().numpy() for _ in range(4)]))
    worst = max(outs[1:], key=lambda out: float(np.abs(out - outs[0]).max()))
    return check_close("attention of four steps, overlapped and not", worst, outs[0], within=0.0)
