"""Segments in ONNX Runtime take their scratch memory in turn from the same place."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.memory import CLEAR_REFS, peak_growth_bytes
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor

N_SEGMENTS, SIDE = 4, 4096
SCRATCH_BYTES = 4 * SIDE**2


def segment_with_scratch(path: Path, outputs: list[str]) -> GraphSegment:
    """A segment that spreads its input over a matrix of ``SCRATCH_BYTES``, and gives that matrix's maximum for each output."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Expand", ["x", "shape"], ["matrix"]),
        *(helper.make_node("ReduceMax", ["matrix"], [name], keepdims=1) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "segment",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in outputs],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [SIDE, SIDE])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return GraphSegment(file=path.name, inputs=("input_ids",), outputs=tuple(outputs))


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="peaks of memory are Linux's")
def test_all_segments_together_need_the_scratch_memory_of_one(tmp_path: Path) -> None:
    ports = [AttentionPort(q=f"q{i}", k=f"k{i}", v=f"v{i}", out=f"out{i}") for i in range(N_SEGMENTS - 1)]
    outputs = [*([port.q, port.k, port.v] for port in ports), ["logits"]]
    segments = [segment_with_scratch(tmp_path / f"{i}.onnx", names) for i, names in enumerate(outputs)]
    executor = OnnxRuntimeExecutor(tmp_path, segments, ports, n_threads=1)
    ids = np.array([3], np.int64)
    growth = peak_growth_bytes(lambda: executor.run(ids, ids, ids, lambda _layer, q, _k, _v: q))
    assert growth < 1.5 * SCRATCH_BYTES < N_SEGMENTS * SCRATCH_BYTES
