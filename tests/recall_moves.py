"""Page-heads moved in Triton's interpreter, as a program: ``TRITON_INTERPRET=1 python -m tests.recall_moves FOLDER``.

Every case of ``CASES`` gets its file FOLDER/NAME.npz with the tiers before and after.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.interpreted import prepare


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Random moves between pools of random numbers; ``flagged``: every third is not wanted."""

    name: str
    n_moves: int
    n_padding: int = 0
    flagged: bool = False
    dtype: str = "float16"
    programs: int = 3
    shape: tuple[int, int, int] = (3, 7, 10)
    """KV heads, page size, head size."""


CASES = (
    Moves(name="one", n_moves=1),
    Moves(name="padded", n_moves=11, n_padding=6),
    Moves(name="flagged", n_moves=20, n_padding=3, flagged=True),
    Moves(name="tiles", n_moves=4, shape=(2, 37, 130), dtype="float32"),
    Moves(name="nothing", n_moves=0, n_padding=5),
    Moves(name="no_rows", n_moves=0),
    Moves(name="more_programs_than_moves", n_moves=2, programs=64),
)


def moved(case: Moves, device: str) -> dict[str, torch.Tensor]:
    """The tiers, the moves, and the device tier ``after`` them."""
    from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages

    rng = np.random.default_rng(len(case.name))
    n_host, n_device = 23, 13
    n_heads, page_size, head_size = case.shape
    host, before = (
        torch.from_numpy(rng.standard_normal((n, 2, n_heads, page_size, head_size), np.float32)).to(getattr(torch, case.dtype))
        for n in (n_host, n_device)
    )
    targets = rng.permutation(n_heads * n_device)[: case.n_moves]
    listed = np.stack([targets // n_device, rng.integers(n_host, size=case.n_moves), targets % n_device], axis=1)
    padding = np.tile([-1, 3, 2], (case.n_padding, 1))
    padding[::2] = [0, -1, -1]
    moves = torch.from_numpy(rng.permutation(np.concatenate([listed, padding])).astype(np.int64))
    wanted = torch.arange(len(moves)) % 3
    tiers = (host.pin_memory(), before.to(device)) if device == "cuda" else (host, before.clone())
    recall_pages(*tiers, moves.to(device), wanted.to(device) if case.flagged else None, programs=case.programs)
    return {"host": host, "before": before, "moves": moves, "wanted": wanted, "after": tiers[1].cpu(), "host_after": tiers[0]}


if __name__ == "__main__":
    prepare()
    for case in CASES:
        arrays = {name: tensor.numpy() for name, tensor in moved(case, "cpu").items()}
        np.savez(Path(sys.argv[1]) / f"{case.name}.npz", **arrays)  # type: ignore[arg-type]
