"""Copies page-heads from pinned host memory to pages on the GPU, by a kernel that reads the list of copies on the GPU.

The kernel reads pinned memory directly (unified addressing), so the host need not know which pages were chosen, and a step that
recalls can be captured as a CUDA graph. A page-head, which is the keys and values of one KV head in one page, is contiguous
for keys and for values in both tiers; nothing is transposed.
"""

import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.triton_launch import launch, power_of_2

PROGRAMS = 64
"""Programs of the kernel. Each has 16 KiB in flight: together ten times what saturates the bus, and half of a large GPU is
left to the model."""
AHEAD_PROGRAMS = 16
"""Programs for copies that no step waits for. They reach 97 to 99 percent of the bus and leave more SMs to other kernels."""
_TILE_BYTES = 8192
_TILE_MOVES = 16


@triton.jit(do_not_specialize=["n_moves"], do_not_specialize_on_alignment=["moves_ptr", "wanted_ptr"])
def recall_kernel(
    host_ptr: tl.tensor,
    device_ptr: tl.tensor,
    moves_ptr: tl.tensor,
    wanted_ptr: tl.tensor,
    n_moves: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program p makes moves p, p + programs, ...; it tests whether any is to be made for TILE moves at a time."""
    at = tl.arange(0, BLOCK)
    stride = tl.num_programs(0)
    for first in range(tl.program_id(0), n_moves, stride * TILE):
        ours = first + stride * tl.arange(0, TILE)
        if HAS_WANTED:
            is_wanted = tl.load(wanted_ptr + ours, mask=ours < n_moves, other=0) != 0
        else:
            is_wanted = ours < n_moves
        if tl.max(is_wanted.to(tl.int32), 0) > 0:
            for i in range(first, tl.minimum(first + stride * TILE, n_moves), stride):
                head = tl.load(moves_ptr + 3 * i)
                host_page = tl.load(moves_ptr + 3 * i + 1)
                device_page = tl.load(moves_ptr + 3 * i + 2)
                moves = (head >= 0) & (host_page >= 0) & (device_page >= 0)
                if HAS_WANTED:
                    moves = moves & (tl.load(wanted_ptr + i) != 0)
                if moves:
                    source = host_ptr + (host_page * 2 * K + head) * (P * D)
                    target = device_ptr + (device_page * 2 * K + head) * (P * D)
                    for start in range(0, P * D, BLOCK):
                        mask = start + at < P * D
                        k = tl.load(source + start + at, mask=mask)
                        v = tl.load(source + K * P * D + start + at, mask=mask)
                        tl.store(target + start + at, k, mask=mask)
                        tl.store(target + K * P * D + start + at, v, mask=mask)


def recall_pages(
    host: Tensor, device: Tensor, moves_E3: Tensor, wanted_E: Tensor | None = None, *, programs: int = PROGRAMS
) -> None:
    """Copy page-heads, keys and values, from ``host`` [M', 2, K, P, D] in pinned memory to ``device`` [M, 2, K, P, D].

    ``moves_E3`` [E, 3] int64 on the device: KV head, page in ``host``, page in ``device``. Rows with a negative number and rows
    whose ``wanted_E`` [E] int64 is 0 are skipped. Both are contiguous. No two rows may have the same target. Launches on the
    current stream and does not wait: neither tier's pages may change until it has run.
    """
    assert host.shape[1:] == device.shape[1:]
    assert host.dtype == device.dtype
    n_kv_heads, page_size, head_size = device.shape[2:]
    launch(
        recall_kernel,
        (min(programs, len(moves_E3)),),
        host_ptr=host,
        device_ptr=device,
        moves_ptr=moves_E3,
        wanted_ptr=moves_E3 if wanted_E is None else wanted_E,
        n_moves=len(moves_E3),
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        HAS_WANTED=int(wanted_E is not None),
        BLOCK=min(power_of_2(page_size * head_size), _TILE_BYTES // device.itemsize),
        TILE=_TILE_MOVES,
    )
