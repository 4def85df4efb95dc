"""An engine's segments on the step executor of a device; as a program, on the CPU with the kernels in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.onnxruntime_steps RESULTS ENGINE ...`` writes what ``requests`` returns for every engine.
A program, because the variable has to be set before a kernel is imported.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.device_steps import CHUNK, Side, requests
from tests.interpreted import prepare
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.cuda.decoder import DeviceDecoder
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.onnxruntime_segments import OnnxRuntimeDeviceDecoder
from trt_kv.runtime.backends.cuda.store import DeviceKvPool
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.model_runner import ModelRunner

N_PAGES = 100


def segments_of(engine: Path, *, device: str, weights: dict[str, torch.Tensor] | None = None) -> OnnxRuntimeDeviceDecoder:
    manifest = load_manifest(engine)
    return OnnxRuntimeDeviceDecoder(
        engine / "graphs", manifest.segments, manifest.attention_ports, device=device, weights=weights, n_threads=1
    )


def on_device(engine: Path, decoder: DeviceDecoder | torch.nn.Module, *, device: str) -> ModelRunner:
    """Requests to ``engine`` on ``device``, the dense parts by ``decoder``; steps are launched."""
    manifest = load_manifest(engine)
    pool = DeviceKvPool(**_pool_sizes(manifest), dtype=manifest.dtype, device=device, spare_page=True)
    largest = Side(policy=manifest.policy.name).largest
    executor = TorchDeviceExecutor(decoder, manifest.programs, pool, largest, cuda_graphs=None if device == "cpu" else False)
    return ModelRunner(executor, pool, manifest.programs, chunk=CHUNK, decode=manifest.policy.decode)


def on_host(engine: Path, dense: DenseExecutor | None = None) -> ModelRunner:
    """Requests to ``engine`` as hosts run it, the dense parts by ``dense``; None: by its segments."""
    manifest = load_manifest(engine)
    dense = dense or OnnxRuntimeExecutor(engine / "graphs", manifest.segments, manifest.attention_ports, n_threads=1)
    pool = HostKvPool(**_pool_sizes(manifest))
    return host_runner(dense, pool, manifest.programs, chunk=CHUNK, decode=manifest.policy.decode)


def two_rows(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's ``input_ids``, ``positions`` and ``logit_rows``: five tokens of which two need logits."""
    ids, positions, rows = [17, 4, 101, 55, 9], [0, 1, 2, 3, 4], [4, 2]
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device), torch.tensor(rows, device=device)


def _pool_sizes(manifest: Manifest) -> dict[str, Any]:
    config = manifest.config
    return {
        "n_pages": N_PAGES,
        "page_size": manifest.page_size,
        "n_kv_heads": config.n_kv_heads,
        "head_size": config.head_dim,
    }


def main(results: str, *engines: str) -> None:
    prepare()
    arrays: dict[str, np.ndarray] = {}
    for engine in map(Path, engines):
        found = requests(on_device(engine, segments_of(engine, device="cpu"), device="cpu"))
        arrays |= {f"{engine.name}.{name}": array for name, array in found.items()}
    np.savez(results, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
