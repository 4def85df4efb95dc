"""Scattered page-heads from pinned host memory to the device: one kernel that reads host memory, or one copy for each."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu.decode_attention import DTYPE, Shape
from benchmarks.gpu.device import device, of_bandwidth, on_gpu, pinned, pinned_bandwidth, recorded, times
from benchmarks.harness import Check, Report, Row, Target, check_close
from trt_kv.runtime.backends.cuda.recall.recall_pages import PROGRAMS as AT_ONCE_PROGRAMS
from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages

PROGRAMS = (16, AT_ONCE_PROGRAMS, 132)


class Tiers:
    """Pools on the host and on the device, and a list of moves between them, half of which is padding."""

    def __init__(self, shape: Shape, n_moves: int, n_host_pages: int) -> None:
        rng = np.random.default_rng(n_moves)
        page = (2, shape.n_kv_heads, shape.page_size, shape.head_size)
        n_pages = -(-n_moves // shape.n_kv_heads) + 3
        torch.manual_seed(0)
        self.host = pinned(torch.randn(n_host_pages, *page).to(DTYPE))
        self.pool = torch.zeros(n_pages, *page, dtype=DTYPE, device=device())
        targets = rng.permutation(n_pages * shape.n_kv_heads)[:n_moves]
        sources = rng.integers(n_host_pages, size=n_moves)
        self.moves = np.stack([targets % shape.n_kv_heads, sources, targets // shape.n_kv_heads], axis=1)
        listed = rng.permutation(np.concatenate([self.moves, np.full_like(self.moves, -1)]))
        self.listed = torch.from_numpy(listed).to(device())
        self.n_bytes = n_moves * 2 * shape.page_size * shape.head_size * DTYPE.itemsize

    def by_kernel(self, programs: int) -> Callable[[], None]:
        """Move by the kernel: the GPU reads the list and the pages."""
        return lambda: recall_pages(self.host, self.pool, self.listed, programs=programs)

    def by_copies(self) -> None:
        """Move by two copies per page-head (cudaMemcpyAsync), one for its keys and one for its values."""
        for head, source, target in self.moves.tolist():
            for part in range(2):
                self.pool[target, part, head].copy_(self.host[source, part, head], non_blocking=True)

    def check(self, what: str, move: Callable[[], object]) -> Check:
        """Check that exactly the listed page-heads have moved."""
        expected = np.zeros(self.pool.shape, np.float32)
        head, source, target = self.moves.T
        expected[target, :, head] = self.host.numpy()[source, :, head].astype(np.float32)
        self.pool.zero_()
        move()
        return check_close(what, self.pool.float().cpu().numpy(), expected, within=0.0)


def run(*, quick: bool) -> Report:
    """64 to 4096 page-heads of 16 KiB."""
    shape = Shape(n_heads=4, n_kv_heads=2, head_size=16, page_size=4) if quick else Shape()
    bandwidth = pinned_bandwidth(quick=quick)
    rows: list[Row] = []
    checks: list[Check] = []
    notes: list[str] = []
    for n_moves in (5, 12) if quick else (64, 512, 4096):
        tiers = Tiers(shape, n_moves, n_host_pages=16 if quick else 4096)
        sides: dict[str, Callable[[], object]] = {
            f"kernel, {programs} programs": recorded(tiers.by_kernel(programs)) for programs in PROGRAMS
        }
        sides["a copy each"] = tiers.by_copies
        if on_gpu():
            try:
                sides["a copy each, as a CUDA graph"] = recorded(tiers.by_copies)
            except RuntimeError as error:  # CUDA's refusal
                notes.append(f"{n_moves} copies as a CUDA graph: {str(error)[:200]}")
        checks += [tiers.check(f"{n_moves} page-heads, {name}", move) for name, move in sides.items()]
        timings = times(sides, rounds=2 if quick else 20)
        for name in sides:
            row = timings.row(name)
            reached = of_bandwidth(tiers.n_bytes, row["median_ms"], bandwidth)
            rows.append({"page_heads": n_moves, "side": name, "mib": round(tiers.n_bytes / 2**20, 2), **row, **reached})
    return Report(
        title="Recall of scattered page-heads from pinned host memory",
        settings={"shape": vars(shape), "dtype": str(DTYPE), "pinned_gb_per_s": round(bandwidth / 1e9, 2), "notes": notes},
        checks=checks,
        tables={"medians": rows},
        targets=[] if quick else [_target(rows)],
    )


def _target(rows: list[Row]) -> Target:
    most = rows[-1]["page_heads"]
    usual = next(row for row in rows if row["page_heads"] == most and row["side"] == f"kernel, {AT_ONCE_PROGRAMS} programs")
    return Target(
        what=f"{most} page-heads by the kernel, time over that of one pinned copy",
        measured=round(1 / usual["share_of_bound"], 3),
        limit=round(1 / 0.85, 3),
    )
