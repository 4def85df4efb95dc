"""Device and measurement methods of the GPU benchmarks: events, cold caches, CUDA graphs, the two bandwidths as bounds.

Without a GPU everything runs on the CPU in Triton's interpreter, with tiny sizes; such times mean nothing.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Check, Row, Timings, check_close
from trt_kv.opspec import Case
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.registry import device_kernel, kernel, op_specs

WARMUP = 3
_QUERIES = {
    "driver": "driver_version",
    "pcie_generation": "pcie.link.gen.max",
    "pcie_width": "pcie.link.width.max",
    "power_limit": "power.limit",
    "sm_clock_max": "clocks.max.sm",
}


def on_gpu() -> bool:
    """Whether torch finds a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The GPU, or the CPU if there is none."""
    return torch.device("cuda" if on_gpu() else "cpu")


def gpu_record() -> dict[str, Any]:
    """GPU, driver and CUDA versions for the results file; name None if there is no GPU."""
    if not on_gpu():
        return {"name": None, "note": "Triton's interpreter on the CPU: its times mean nothing"}
    properties = torch.cuda.get_device_properties(0)
    record = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi") is None:
        return record
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIES.values())}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return record | dict(zip(_QUERIES, (value.strip() for value in answer.stdout.split(",")), strict=False))


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as a CUDA graph, so that Python's launch overhead does not dominate a short kernel. On the CPU ``run`` itself."""
    if not on_gpu():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times(sides: Mapping[str, Callable[[], object]], *, rounds: int, cold: bool = True) -> Timings:
    """Device time of every side, once per round, in rotating order; after ``WARMUP`` rounds.

    ``cold``: the GPU's L2 cache is overwritten before each call, which also lets the host launch ahead.
    """
    names = list(sides)
    flush = torch.empty(2**28 if on_gpu() else 1, dtype=torch.int8, device=device())
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-WARMUP if on_gpu() else 0, rounds):
        first = index % len(names)
        readings = {}
        for name in names[first:] + names[:first]:
            if cold:
                flush.zero_()
            readings[name] = _timed(sides[name])
        for name, elapsed_ms in readings.items():
            if index >= 0:
                samples[name].append(elapsed_ms())
    return Timings(samples_ms={name: np.array(values) for name, values in samples.items()})


def _timed(run: Callable[[], object]) -> Callable[[], float]:
    """Run, and return a function that waits for the end and returns the time in ms."""
    if not on_gpu():
        start = time.perf_counter()
        run()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return lambda: elapsed_ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()

    def elapsed() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return elapsed


def copy_bandwidth(*, quick: bool) -> float:
    """Bytes per second that the device reads and writes while it copies 1 GiB within its memory."""
    n_bytes = 2**16 if quick else 2**30
    source, target = (torch.zeros(n_bytes, dtype=torch.int8, device=device()) for _ in range(2))
    return 2 * n_bytes / _median_s(lambda: target.copy_(source), quick)


def pinned_bandwidth(*, quick: bool) -> float:
    """Bytes per second of one copy of 256 MiB from pinned host memory to the device."""
    n_bytes = 2**16 if quick else 2**28
    source = pinned(torch.zeros(n_bytes, dtype=torch.int8))
    target = torch.zeros(n_bytes, dtype=torch.int8, device=device())
    return n_bytes / _median_s(lambda: target.copy_(source, non_blocking=True), quick)


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory, where there is a GPU to pin it for."""
    return tensor.pin_memory() if on_gpu() else tensor


def _median_s(run: Callable[[], object], quick: bool) -> float:
    return float(np.median(times({"copy": run}, rounds=3 if quick else 20).samples_ms["copy"])) / 1e3


def check_kernel(op: str, case: Case, dtype: torch.dtype, *, within: float) -> Check:
    """Check of the op's device kernel against its reference on a small case: the largest difference over its outputs."""
    spec = op_specs()[op]
    run = device_kernel(op)
    assert run is not None
    inputs = case_inputs(spec, case)
    floats = {t.name for t in spec.inputs if t.dtype == "float"}
    tensors = {n: torch.from_numpy(v).to(device()) for n, v in inputs.items() if isinstance(v, np.ndarray)}
    tensors = {n: t.to(dtype) if n in floats else t for n, t in tensors.items()}
    expected_inputs = inputs | {n: t.float().cpu().numpy() for n, t in tensors.items() if n in floats}
    attributes = {n: v for n, v in inputs.items() if n not in tensors}
    expected = kernel(op, "reference")(**expected_inputs)
    got = run(**tensors, **attributes)
    pairs = list(zip(got, expected, strict=True))
    pairs += [(tensors[t.name], expected_inputs[t.name]) for t in spec.states if t.name == "scores"]
    found, wanted = ([], [])
    for tensor, values in pairs:
        there = np.isfinite(values)
        size = 1 + np.abs(values[there])
        found.append(tensor.float().cpu().numpy()[there] / size)
        wanted.append(values[there] / size)
    what = f"{op} and its reference, differences over 1 + size"
    return check_close(what, np.concatenate(found), np.concatenate(wanted), within=within)


def of_bandwidth(n_bytes: float, elapsed_ms: float, bandwidth: float) -> Row:
    """Columns for a transfer: GB/s, and the share of ``bandwidth``."""
    rate = n_bytes / (elapsed_ms / 1e3)
    return {"gb_per_s": float(f"{rate / 1e9:.4g}"), "share_of_bound": float(f"{rate / bandwidth:.3g}")}
