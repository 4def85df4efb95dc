"""Requests on the torch executor of a device equal those on the host; neither padding nor recording ever shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.device_steps import CHUNK, Side, device_runner, requests, runner_on_the_host
from tests.triton_kernels import ROOT
from trt_kv.errors import CapacityError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.opspec import TensorSpec
from trt_kv.profiles import build_profile
from trt_kv.runtime.backends.base import StepExecutor
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.step_buffers import StepBuffers, StepSizes
from trt_kv.runtime.backends.cuda.store import DeviceKvPool
from trt_kv.runtime.backends.step import Step
from trt_kv.runtime.model_runner import ModelRunner

POLICIES = ("full", "prefixkv_paper", "snapkv", "h2o", "refreekv", "freekv")
HALF, UNPADDED = Side(policy="prefixkv_paper", dtype="float16"), Side(policy="full", n_sequences=3)
ATOL = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}
"""Logits reach about 7: fp32 sums in another order; a rounding to 11 or 8 bits after every operation of three layers."""

Results = dict[str, np.ndarray]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.early]


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint_folder: Path) -> Checkpoint:
    return open_checkpoint(small_checkpoint_folder)


@pytest.fixture(scope="module")
def in_interpreter(small_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Side], Results]:
    """The results of a side; all of them have been run in one process."""
    sides = [*(Side(policy=name) for name in POLICIES), HALF, UNPADDED]
    results = tmp_path_factory.mktemp("device") / "results.npz"
    command = [sys.executable, "-m", "tests.device_steps", str(small_checkpoint_folder), str(results), *map(str, sides)]
    outcome = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr

    def results_of(side: Side) -> Results:
        with np.load(results) as arrays:
            return {name.rpartition(".")[2]: arrays[name] for name in arrays if name.startswith(f"{side}.")}

    return results_of


@pytest.mark.parametrize("side", [*(Side(policy=name) for name in POLICIES), HALF], ids=str)
def test_requests_on_a_device_equal_those_on_the_host(
    in_interpreter: Callable[[Side], Results], checkpoint: Checkpoint, side: Side
) -> None:
    """Prompts in chunks, eviction, batched decoding."""
    assert_alike(in_interpreter(side), requests(runner_on_the_host(side.policy, checkpoint)), ATOL[side.dtype])


def test_a_batch_that_is_padded_gets_what_it_gets_unpadded(in_interpreter: Callable[[Side], Results]) -> None:
    """But for the last bits: a CPU's matrix product of 3 rows is not made as that of 4."""
    assert_alike(in_interpreter(UNPADDED), in_interpreter(Side(policy="full")), 2e-5)


def assert_alike(got: Results, expected: Results, atol: float) -> None:
    assert got.keys() == expected.keys()
    for name in ("prefill", "decode"):
        np.testing.assert_allclose(got[name], expected[name], atol=atol, err_msg=name)
    for name in ("kv_len", "budget"):
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


SIZES = st.builds(StepSizes, **dict.fromkeys(("n_tokens", "n_rows", "n_sequences", "table_width"), st.integers(1, 40)))


@given(sizes=SIZES, largest=SIZES, one_token_each=st.booleans())
def test_a_bucket_holds_the_step_and_fits_the_buffers(sizes: StepSizes, largest: StepSizes, one_token_each: bool) -> None:
    if one_token_each:
        n = sizes.n_sequences
        sizes = StepSizes(n_tokens=n, n_rows=n, n_sequences=n, table_width=sizes.table_width)
    if any(sizes.axes[axis] > largest.axes[axis] for axis in "NRBT"):
        with pytest.raises(CapacityError, match="larger than what memory was planned for"):
            sizes.check_within(largest)
        return
    bucket = sizes.bucket(largest, one_token_each=one_token_each)
    bucket.check_within(largest)
    sizes.check_within(bucket)
    assert bucket.bucket(largest, one_token_each=one_token_each) == bucket


def test_few_buckets_serve_many_steps() -> None:
    largest = StepSizes(n_tokens=512, n_rows=32, n_sequences=32, table_width=1000)
    steps = [StepSizes(n_tokens=n, n_rows=n, n_sequences=n, table_width=t) for n in range(1, 33) for t in range(1, 1001)]
    assert len({step.bucket(largest, one_token_each=True) for step in steps}) == 6 * 11


def test_buffers_for_the_largest_step_of_a_profile() -> None:
    profiles = build_profile("edge").axis_ranges(n_layers=3, page_size=32)
    largest = StepSizes.largest(profiles)
    assert largest.axes == {axis: max(ranges[axis][2] for ranges in profiles) for axis in "NRBT"}


def test_a_step_stands_at_the_beginning_of_its_padding() -> None:
    tensors = {
        name: TensorSpec(name=name, axes=axes, dtype="int64", doc="")
        for name, axes in {
            "slots": ("L", "N"),
            "cu_tokens": ("B+1",),
            "page_table": ("L", "B", "T"),
            "kv_len": ("L", "B"),
        }.items()
    }
    largest = StepSizes(n_tokens=6, n_rows=6, n_sequences=4, table_width=3)
    buffers = StepBuffers(tensors, largest, n_layers=2, spare_slot=77, device=torch.device("cpu"))
    sizes = StepSizes(n_tokens=4, n_rows=2, n_sequences=3, table_width=2)
    for step in (step_of_two(), None, step_of_two()):
        buffers.fill(step, sizes)
    assert {name: view.tolist() for name, view in buffers.views(sizes).items()} == {
        "slots": [[4, 9, 77, 77], [5, 2, 77, 77]],
        "cu_tokens": [0, 1, 2, 2],
        "page_table": [[[1, -1], [2, -1], [-1, -1]], [[1, 3], [0, -1], [-1, -1]]],
        "kv_len": [[1, 2, 0], [6, 3, 0]],
    }
    assert len({view.data_ptr() for view in buffers.views(largest).values()}) == len(tensors)


def step_of_two() -> Step:
    """Two sequences, one token each, two layers; the page table is wider than what is used of it."""
    ints = {name: np.zeros(2, np.int64) for name in ("input_ids", "positions", "logit_rows", "prompt_remaining", "evict")}
    table = np.array([[[1, -1, -1], [2, -1, -1]], [[1, 3, -1], [0, -1, -1]]])
    return Step(
        **ints,
        cu_tokens=np.array([0, 1, 2]),
        slots=np.array([[4, 9], [5, 2]]),
        page_table=table,
        kv_len=np.array([[1, 2], [6, 3]]),
        prompt_len=np.zeros(2, np.int64),
        adaptive_budget=np.full((2, 2), -1),
        query_rows=table[:, :, 0],
    )


def test_what_does_not_fit_together_is_refused(checkpoint: Checkpoint) -> None:
    side = Side(policy="full")
    runner = device_runner(side, checkpoint)
    executor = runner._executor
    assert isinstance(executor, TorchDeviceExecutor)
    assert isinstance(executor, StepExecutor)
    assert executor.description.endswith("on the CPU")
    with pytest.raises(UsageError, match="only GPUs replay"):
        device_runner(side, checkpoint, cuda_graphs=True)
    sizes: dict[str, Any] = {"n_pages": 9, "page_size": 5, "n_kv_heads": 2, "head_size": 16, "device": "cpu"}
    half, small = DeviceKvPool(**sizes, dtype="float16", spare_page=True), DeviceKvPool(**sizes)
    for pool, message in ((half, "different types"), (small, "padding needs a spare page")):
        with pytest.raises(UsageError, match=message):
            TorchDeviceExecutor(executor._decoder, {}, pool, side.largest)
    with pytest.raises(UsageError, match="steps of its own pool"):
        executor.run_step("decode", step_of_two(), small)
    with pytest.raises(CapacityError, match="larger than what memory was planned for"):
        ModelRunner(executor, runner.pool, {"prefill": ((),), "decode": ((),)}, chunk=CHUNK + 1).prefill(
            runner.new_sequence(), range(3, 4 + CHUNK)
        )


def test_a_step_that_is_interrupted_has_ended_before_the_next_begins(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one fills the buffers from which this one's copy may still be going on."""
    runner = device_runner(Side(policy="full"), checkpoint)
    executor = runner._executor
    assert isinstance(executor, TorchDeviceExecutor)
    events: list[str] = []

    def interrupted(*_: Any) -> None:
        events.append("launched")
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "_decoder", interrupted)
    monkeypatch.setattr(executor, "_wait", lambda: events.append("waited"))
    with pytest.raises(KeyboardInterrupt):
        runner.prefill(runner.new_sequence(), [5, 6])
    assert events == ["launched", "waited"]


def test_a_pool_on_a_device_has_the_arrays_of_one_on_the_host_and_a_page_for_nobody() -> None:
    sizes = {"n_pages": 9, "page_size": 5, "n_kv_heads": 2, "head_size": 16, "n_query_heads": 6}
    pool = DeviceKvPool(**sizes, device="cpu", dtype="bfloat16", spare_page=True)
    assert pool.spare_page == 9
    assert pool.allocate(9, owner=1) == list(range(9))
    assert {name: len(tensor) for name, tensor in pool.states.items()} == dict.fromkeys(pool.states, 10)
    assert pool.kv.dtype == pool.summaries.dtype == torch.bfloat16
    assert pool.scores.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("name", POLICIES)
def test_on_the_gpu_a_replayed_step_equals_one_that_is_launched(checkpoint: Checkpoint, name: str, dtype: str) -> None:
    """Bit for bit, at changing lengths and batch sizes; and both the host's, as far as the type allows."""
    side = Side(policy=name, dtype=dtype)
    runners = [device_runner(side, checkpoint, device="cuda", cuda_graphs=graphs) for graphs in (False, True)]
    launched, replayed, again = (requests(runner) for runner in (*runners, runners[1]))
    for key, values in launched.items():
        np.testing.assert_array_equal(replayed[key], values, err_msg=key)
        np.testing.assert_array_equal(again[key], values, err_msg=key)
    executor = runners[1]._executor
    assert isinstance(executor, TorchDeviceExecutor)
    assert executor._graphs is not None
    assert 1 <= len(executor._graphs) <= 6
    if dtype == "float32":
        assert_alike(replayed, requests(runner_on_the_host(name, checkpoint)), ATOL[dtype])


@pytest.mark.gpu
def test_a_decode_step_on_the_gpu_waits_for_its_results_alone(checkpoint: Checkpoint) -> None:
    """Launched one by one, too: torch refuses any other wait here, then warnings are errors."""
    runner = device_runner(Side(policy="full", dtype="float16"), checkpoint, device="cuda", cuda_graphs=False)
    requests(runner)
    executor = runner._executor
    assert isinstance(executor, TorchDeviceExecutor)
    sizes = StepSizes(n_tokens=2, n_rows=2, n_sequences=2, table_width=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor._launch("decode", None, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
