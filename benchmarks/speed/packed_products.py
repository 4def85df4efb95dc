"""Products with weights in blocks of 4 bits and offsets, as GGUF files of type Q4_1 have them: our kernels and ONNX Runtime.

One row reads more matrices than the CPU caches, as a decode step does; a probe tells how fast memory is. Both sides round
activations to int8, within what is timed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import Check, Report, Row, check_close, rounded, take_turns
from benchmarks.speed.decode_bandwidth import total_of
from trt_kv.plugins.packed_products import RoundedRows, multiply_packed, round_activations, rounded_rows
from trt_kv.plugins.packed_weights import PackedWeights, weight_table
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.runtime.cpus import usable_cpus

SHAPES = {
    "SmolLM2 135M": ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)),
    "Llama 3.2 1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (128256, 2048)),
}
"""Columns and rows of products: N, K."""
BLOCK = 32
READ_BYTES = 2**27
"""Of weights that a round of a single row reads, and of the probe."""
AGREE_WITHIN = 0.05
"""Of the largest number: both sides round activations, each in its own way."""
MOST_SCORES = 2**23
"""Numbers of an output: the head of a model is not measured with as many rows as a prompt has."""


def run(folder: Path, *, quick: bool) -> Report:  # noqa: ARG001  every benchmark is called alike
    """Every shape with one row, with a few as when several requests decode, and with a chunk of a prompt."""
    rows_of, rounds, read_bytes = ((1, 6), 3, 2**22) if quick else ((1, 2, 8, 512), 15, READ_BYTES)
    shapes = {"small": ((96, 64), (33, 192))} if quick else SHAPES
    before, n_threads = numba.get_num_threads(), min(usable_cpus(), numba.get_num_threads())
    probe = np.ones((256, read_bytes // 1024), np.float32)
    checks: list[Check] = []
    tables: dict[str, list[Row]] = {}
    numba.set_num_threads(n_threads)
    try:
        for model, sizes in shapes.items():
            for n_columns, n_inputs in sizes:
                for n_rows in (n for n in rows_of if n * n_columns <= MOST_SCORES):
                    row, check = _measured(n_columns, n_inputs, n_rows, rounds, read_bytes, probe, n_threads)
                    tables.setdefault(model, []).append(row)
                    checks.append(check)
    finally:
        numba.set_num_threads(before)
    settings = {"block": BLOCK, "threads": n_threads, "rounds": rounds, "read_bytes": read_bytes}
    return Report(title="Products with packed weights", settings=settings, checks=checks, tables=tables)


def _measured(
    n_columns: int, n_inputs: int, n_rows: int, rounds: int, read_bytes: int, probe: Floats, n_threads: int
) -> tuple[Row, Check]:
    matrix_bytes = n_columns * n_inputs // BLOCK * (BLOCK // 2 + 8)
    n_matrices = max(1, read_bytes // matrix_bytes) if n_rows < 64 else 1
    matrices = [_matrix(n_columns, n_inputs, seed) for seed in range(n_matrices)]
    x_RK = np.random.default_rng(1).standard_normal((n_rows, n_inputs), np.float32)
    sides: Mapping[str, Callable[[], Sequence[Floats]]] = {
        "ours": _ours(x_RK, matrices),
        "theirs": _theirs(x_RK, matrices, n_threads),
    }
    found, expected = np.stack(sides["ours"]()), np.stack(sides["theirs"]())
    what = f"{n_rows} rows x [{n_inputs}, {n_columns}]"
    check = check_close(what, found, expected, within=AGREE_WITHIN * float(np.abs(expected).max()))
    timings = take_turns({**sides, "probe": lambda: total_of(probe)}, rounds=rounds, warmup=1)
    median_s = {side: float(np.median(samples)) / 1e3 for side, samples in timings.samples_ms.items()}
    reached = n_matrices * matrix_bytes / median_s["ours"]
    row: Row = {
        "columns": n_columns,
        "inputs": n_inputs,
        "rows": n_rows,
        "us": rounded(median_s["ours"] / n_matrices * 1e6),
        "onnxruntime_us": rounded(median_s["theirs"] / n_matrices * 1e6),
        "times_faster": timings.ratio("theirs", "ours"),
        "95_percent": timings.interval("theirs", "ours"),
        "gb_per_s": rounded(reached / 1e9),
        "share_of_probe": rounded(reached / (probe.nbytes / median_s["probe"])),
        "gops": rounded(2 * n_rows * n_columns * n_inputs * n_matrices / median_s["ours"] / 1e9),
    }
    return row, check


def _matrix(n_columns: int, n_inputs: int, seed: int) -> PackedWeights:
    rng = np.random.default_rng(seed)
    n_blocks = n_inputs // BLOCK
    blocks = rng.integers(0, 256, (n_columns, n_blocks, BLOCK // 2), np.uint8)
    scales = rng.random((n_columns, n_blocks), np.float32) / 8
    return PackedWeights(bits=4, blocks=blocks, scales=scales, offsets=rng.standard_normal(scales.shape, np.float32) / 16)


@numba.njit()
def _multiply_all(x_RK: Floats, rows: RoundedRows, table: Ints, out_MRN: Floats) -> None:
    round_activations(x_RK, rows)
    for i in range(len(table)):
        multiply_packed(rows, table, i, 1, out_MRN[i])


def _ours(x_RK: Floats, matrices: list[PackedWeights]) -> Callable[[], Sequence[Floats]]:
    rows, table = rounded_rows(*x_RK.shape), weight_table(matrices)
    out_MRN = np.zeros((len(matrices), len(x_RK), matrices[0].n_columns), np.float32)

    def multiply() -> Sequence[Floats]:
        _multiply_all(x_RK, rows, table, out_MRN)
        return list(out_MRN)

    return multiply


def _theirs(x_RK: Floats, matrices: list[PackedWeights], n_threads: int) -> Callable[[], Sequence[Floats]]:
    """A graph with MatMulNBits, and the product of offsets and sums over blocks, for each matrix."""
    n_columns, n_inputs = matrices[0].n_columns, matrices[0].n_inputs
    constants = [numpy_helper.from_array(np.array(v), k) for k, v in (("blocked", [0, -1, BLOCK]), ("last", [2]))]
    nodes = [
        helper.make_node("Reshape", ["x", "blocked"], ["x_blocks"]),
        helper.make_node("ReduceSum", ["x_blocks", "last"], ["sums"], keepdims=0),
    ]
    how: dict[str, Any] = {"K": n_inputs, "N": n_columns, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    for i, matrix in enumerate(matrices):
        parts = {"blocks": matrix.blocks, "scales": matrix.scales, "offsets": matrix.offsets}
        constants += [numpy_helper.from_array(array, f"{name}_{i}") for name, array in parts.items()]
        product = ["x", f"blocks_{i}", f"scales_{i}"]
        nodes.append(helper.make_node("MatMulNBits", product, [f"product_{i}"], domain="com.microsoft", **how))
        nodes.append(helper.make_node("Gemm", ["sums", f"offsets_{i}", f"product_{i}"], [f"y_{i}"], transB=1))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_RK.shape)]
    shape = (len(x_RK), n_columns)
    outputs = [helper.make_tensor_value_info(f"y_{i}", TensorProto.FLOAT, shape) for i in range(len(matrices))]
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x_RK})
