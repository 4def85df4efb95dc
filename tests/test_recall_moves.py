"""What the GPU moves from pinned host memory: what is listed and wanted, nothing else, in accesses of 16 bytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recall_moves import CASES, Moves, moved
from tests.triton_kernels import ROOT
from trt_kv.plugins.triton_compile import compiled
from trt_kv.plugins.triton_launch import recording

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def in_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moves")
    command = [sys.executable, "-m", "tests.recall_moves", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    return folder


@EACH_CASE
def test_only_what_is_listed_and_wanted_moves(in_interpreter: Path, case: Moves) -> None:
    with np.load(in_interpreter / f"{case.name}.npz") as arrays:
        assert_moved(case, {name: arrays[name] for name in arrays})


@pytest.mark.gpu
@EACH_CASE
def test_the_gpu_reads_pinned_memory_where_it_is(case: Moves) -> None:
    assert_moved(case, {name: tensor.numpy() for name, tensor in moved(case, "cuda").items()})


def assert_moved(case: Moves, arrays: dict[str, np.ndarray]) -> None:
    expected = arrays["before"].copy()
    n_moved = 0
    for (head, host_page, device_page), wanted in zip(arrays["moves"], arrays["wanted"], strict=True):
        if min(head, host_page, device_page) >= 0 and (wanted or not case.flagged):
            expected[device_page, :, head] = arrays["host"][host_page, :, head]
            n_moved += 1
    assert (n_moved > 0) == (case.n_moves > 0)
    np.testing.assert_array_equal(arrays["after"], expected)
    np.testing.assert_array_equal(arrays["host_after"], arrays["host"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flagged", [False, True])
def test_sixteen_bytes_at_a_time_and_no_spills(dtype: torch.dtype, *, flagged: bool) -> None:
    """As compiled for pages of Llama 3.1 8B: of 16 KiB in half precision."""
    from trt_kv.runtime.backends.cuda.recall.recall_pages import recall_pages

    host, device = (torch.empty(n, 2, 8, 32, 128, dtype=dtype, device="meta") for n in (1000, 100))
    moves = torch.empty(50, 3, dtype=torch.int64, device="meta")
    with recording() as launches:
        recall_pages(host, device, moves, moves[:, 0] if flagged else None)
    for capability in (80, 90, 120):
        resources = compiled(launches[0], capability)
        lines = resources.ptx.splitlines()
        pages = [line for line in lines if ("ld.global" in line or "st.global" in line) and "b64" not in line]
        assert pages
        assert all(".v4.b32" in line for line in pages), pages
        assert resources.local_bytes == 0
