"""Paged decode attention at the shape of Llama 3 8B, beside torch's attention on contiguous keys and values."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.device import check_kernel, copy_bandwidth, device, of_bandwidth, on_gpu, recorded, times
from benchmarks.harness import Check, Report, Row, Target, check_close
from trt_kv.opspec import Case
from trt_kv.plugins.cached_attention.arguments import Arguments

DTYPE = torch.float16
LARGE_BYTES = 2**28
"""From this size on, reading keys and values dominates: 256 MiB, five times the L2 cache of an H100."""
FLEX = ((1, 32768), (16, 32768))
"""Shapes (batch, tokens) at which FlexAttention is measured, since it compiles for each one."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Query heads, KV heads, head size, page size."""

    n_heads: int = 32
    n_kv_heads: int = 8
    head_size: int = 128
    page_size: int = 32

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.n_kv_heads * self.head_size * DTYPE.itemsize


class Caches:
    """The same keys and values twice: in scattered pages, and contiguous [B, K, S, D] for torch's attention."""

    def __init__(self, shape: Shape, batch: int, n_tokens: int) -> None:
        width = n_tokens // shape.page_size
        page = (2, shape.n_kv_heads, shape.page_size, shape.head_size)
        on = device()
        torch.manual_seed(0)
        self.shape = shape
        self.kv = torch.empty(batch * width, *page, dtype=DTYPE, device=on).normal_()
        self.token_positions = torch.zeros(batch * width, *page[1:3], dtype=torch.int64, device=on)
        self.table_LBT = torch.randperm(batch * width, device=on).view(1, batch, width)
        self.kv_len = torch.full((1, batch), n_tokens, device=on)
        self.cu_tokens = torch.arange(batch + 1, device=on)
        self.q = torch.randn(batch, shape.n_heads, shape.head_size, dtype=DTYPE, device=on)
        self.k_new, self.v_new = (torch.randn(batch, *page[1::2], dtype=DTYPE, device=on) for _ in range(2))
        self.slots = self.table_LBT[:, :, -1] * shape.page_size + shape.page_size - 1
        for part, new in enumerate((self.k_new, self.v_new)):
            self.kv[self.table_LBT[0, :, -1], part, :, -1] = new
        size = (batch, shape.n_kv_heads, n_tokens, shape.head_size)
        self.k, self.v = (torch.empty(size, dtype=DTYPE, device=on) for _ in range(2))
        for b in range(batch):
            for part, target in enumerate((self.k, self.v)):
                target[b] = self.kv[self.table_LBT[0, b], part].transpose(0, 1).flatten(1, 2)

    def attention(self) -> Tensor:
        """The decode attention kernels alone: [B, H, D]."""
        from trt_kv.plugins.attention_triton import attend_one

        out, lse = torch.empty_like(self.q), torch.empty(self.q.shape[:2], device=self.q.device)
        table_BKT = self.table_LBT[0][:, None].expand(-1, self.shape.n_kv_heads, -1)
        attend_one(self.q, self.cu_tokens, table_BKT, self.kv_len[0], self.kv, self.scale, out, lse)
        return out

    def op(self) -> Tensor:
        """The whole op, which also appends and launches the kernel for prefill chunks."""
        from trt_kv.plugins.cached_attention.triton import run

        arguments = Arguments(
            q=self.q,
            k=self.k_new,
            v=self.v_new,
            positions=self.kv_len[0] - 1,
            cu_tokens=self.cu_tokens,
            slots=self.slots,
            page_table=self.table_LBT,
            kv_len=self.kv_len,
            kv=self.kv,
            token_positions=self.token_positions,
            layer=0,
            scale=self.scale,
            page_size=self.shape.page_size,
        )
        return run(arguments)[0]

    @property
    def scale(self) -> float:
        return float(self.shape.head_size**-0.5)

    def sdpa(self) -> Tensor:
        """torch's attention as a model calls it."""
        out = functional.scaled_dot_product_attention(self.q[:, :, None], self.k, self.v, enable_gqa=True)
        return out[:, :, 0]

    def sdpa_grouped(self) -> Tensor:
        """torch's attention with the query heads of a KV head as query tokens, so that keys are read once."""
        q = self.q.unflatten(1, (self.shape.n_kv_heads, -1))
        return functional.scaled_dot_product_attention(q, self.k, self.v).flatten(1, 2)

    def flex(self) -> Callable[[], Tensor]:
        """FlexAttention, compiled for this shape."""
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(self.q[:, :, None], self.k, self.v, enable_gqa=True)[:, :, 0]


def run(*, quick: bool) -> Report:
    """Batches 1 to 32, 2k to 128k cached tokens, as far as memory goes."""
    shape = Shape(n_heads=4, n_kv_heads=2, head_size=16, page_size=4) if quick else Shape()
    case = Case(
        name="small",
        cached=(300, 77),
        new=(1, 1),
        dims={"H": shape.n_heads, "K": shape.n_kv_heads, "D": shape.head_size, "P": shape.page_size, "L": 1},
    )
    checks = [check_kernel("CachedAttention", case, DTYPE, within=1e-2)]
    bandwidth = copy_bandwidth(quick=quick)
    rows, notes = [], []
    for batch in (1, 2) if quick else (1, 4, 16, 32):
        for n_tokens in (24, 40) if quick else (2048, 8192, 32768, 131072):
            kv_bytes = batch * n_tokens * shape.token_bytes
            torch.cuda.empty_cache()
            if on_gpu() and torch.cuda.mem_get_info()[0] < 3 * kv_bytes:
                notes.append(f"batch {batch} with {n_tokens} tokens does not fit twice")
                continue
            row, check, note = _measured(Caches(shape, batch, n_tokens), kv_bytes, bandwidth, rounds=2 if quick else 30)
            rows.append({"batch": batch, "tokens": n_tokens, "kv_mib": round(kv_bytes / 2**20, 1), **row})
            checks.append(check)
            notes += note
    return Report(
        title="Paged decode attention beside torch's on contiguous keys and values",
        settings={"shape": vars(shape), "dtype": str(DTYPE), "notes": notes, "copy_gb_per_s": round(bandwidth / 1e9, 1)},
        checks=checks,
        tables={"one layer, medians on the device": rows},
        targets=[] if quick else _targets(rows),
    )


def _measured(caches: Caches, kv_bytes: int, bandwidth: float, *, rounds: int) -> tuple[Row, Check, list[str]]:
    batch, _, n_tokens, _ = caches.k.shape
    where = f"attention at batch {batch}, {n_tokens} tokens"
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": caches.attention,
        "op": caches.op,
        "sdpa": caches.sdpa,
        "sdpa_grouped": caches.sdpa_grouped,
    }
    check = _check(where, sides, caches)
    recordings = {name: recorded(side) for name, side in sides.items()}
    notes = []
    if on_gpu() and (batch, n_tokens) in FLEX:
        try:
            flex = caches.flex()
            _check(f"{where}, FlexAttention", {"flex": flex}, caches)
            recordings["flex"] = recorded(flex)
        except RuntimeError as error:  # what torch's compiler raises, and CUDA
            notes.append(f"{where}: FlexAttention says {str(error)[:200]}")
    timings = times(recordings, rounds=rounds)
    medians = {name: timings.row(name)["median_ms"] for name in recordings}
    row: Row = {f"{name}_ms": medians.get(name) for name in ("ours", "op", "sdpa", "sdpa_grouped", "flex")}
    row |= of_bandwidth(kv_bytes, medians["ours"], bandwidth)
    best = min(elapsed_ms for name, elapsed_ms in medians.items() if name not in ("ours", "op"))
    row["ratio_to_best_of_torch"] = float(f"{medians['ours'] / best:.3g}")
    return row, check, notes


def _check(what: str, sides: Mapping[str, Callable[[], Tensor]], caches: Caches) -> Check:
    """Differences of all sides from torch's attention in fp32 on the first sequence, relative to the largest output."""
    q, k, v = (t[:1].float() for t in (caches.q.unflatten(1, (caches.shape.n_kv_heads, -1)), caches.k, caches.v))
    expected = functional.scaled_dot_product_attention(q, k, v).flatten(1, 2).cpu().numpy()
    largest = np.abs(expected).max()
    found = np.stack([side()[:1].float().cpu().numpy() for side in sides.values()])
    return check_close(f"{what}, over the largest", found / largest, expected[None] / largest, within=0.02)


def _targets(rows: list[Row]) -> list[Target]:
    large = [row for row in rows if row["kv_mib"] * 2**20 >= LARGE_BYTES]
    return [
        Target(
            what="time over that of reading at the copy bandwidth, worst of 256 MiB and more",
            measured=max((round(1 / row["share_of_bound"], 3) for row in large), default=math.inf),
            limit=1.25,
        ),
        Target(
            what="time over that of the fastest of torch, worst of 256 MiB and more",
            measured=max((row["ratio_to_best_of_torch"] for row in large), default=math.inf),
            limit=1.0,
        ),
    ]
