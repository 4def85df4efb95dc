"""Chooses what runs the dense layers of an engine on the CPU, and opens it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import UsageError, load_option
from trt_kv.manifest import GRAPHS, INT8_ACTIVATIONS, Manifest
from trt_kv.require import require
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.attention_layers import AttentionLayers
from trt_kv.runtime.backends.host.native.weights import unsupported
from trt_kv.runtime.backends.host.openvino_segments import OpenVinoExecutor, default_precision
from trt_kv.runtime.backends.host.row_groups import with_rows_alike
from trt_kv.runtime.backends.host.segments import SegmentExecutor, check_shapes
from trt_kv.runtime.cpus import threads_for
from trt_kv.runtime.loading import LoadOptions
from trt_kv.weight_index import FILE_NAME, load_weight_index

if TYPE_CHECKING:
    from trt_kv.runtime.backends.host.native.executor import NativeExecutor


def open_dense(folder: Path, manifest: Manifest, options: LoadOptions, on_segment: Callable[[int, int], None]) -> DenseExecutor:
    """What ``options`` ask for; by default the kernels of our own, if they can run the engine, else ONNX Runtime.

    ``UsageError`` for what cannot run it.
    """
    if options.dense in (None, "native"):
        reason = why_not_native(folder, manifest)
        if reason is None:
            return _native(folder, manifest, options.kv_dtype or manifest.kv_dtype)
        if options.dense == "native":
            raise _refusal(folder, reason)
    segments = _segments(folder, manifest, options, on_segment)
    check_shapes(folder / GRAPHS, segments.shapes, manifest.attention_ports, manifest.config)
    return with_rows_alike(segments, manifest, wanted=options.batch_invariant)


def _refusal(folder: Path, reason: str) -> UsageError:
    return UsageError(
        f"the dense layers of {folder} cannot run in kernels of our own",
        got=reason,
        expected="matrices in blocks of integers, with activations in int8",
        fix=f"leave {load_option('dense', 'native')} out, or build the engine with --quant int4 or int8",
    )


def chosen_dense(folder: Path, manifest: Manifest, asked_for: str | None) -> str:
    """The one of ``HOST_DENSE`` that runs the engine in ``folder``."""
    if asked_for is not None:
        return asked_for
    return "onnxruntime" if why_not_native(folder, manifest) else "native"


def why_not_native(folder: Path, manifest: Manifest) -> str | None:
    """The first reason why the engine cannot run in kernels of our own; None if it can. ``EngineError`` for a bad index."""
    if manifest.quantization is None:
        return "weights that are not quantised"
    if manifest.quantization.accuracy_level != INT8_ACTIVATIONS:
        return f"accuracy level {manifest.quantization.accuracy_level}"
    if f"{GRAPHS}/{FILE_NAME}" not in manifest.files:
        return f"no {FILE_NAME}, which engines of earlier versions lack"
    return unsupported(load_weight_index(folder / GRAPHS, manifest.config.tensor_shapes()))


def _native(folder: Path, manifest: Manifest, kv_dtype: str) -> "NativeExecutor":
    from trt_kv.runtime.backends.host.native.executor import NativeExecutor
    from trt_kv.runtime.backends.host.native.weights import open_weights

    index = load_weight_index(folder / GRAPHS, manifest.config.tensor_shapes())
    dense = NativeExecutor(manifest.config, open_weights(folder / GRAPHS, index))
    dense.warm_up(kv_dtype, AttentionLayers.of(manifest.programs["decode"]))
    return dense


def _segments(
    folder: Path, manifest: Manifest, options: LoadOptions, on_segment: Callable[[int, int], None]
) -> SegmentExecutor:
    """The graph segments in a library. ``UsageError`` for integers as activations of weights that are not quantised."""
    graphs, segments, ports = folder / GRAPHS, manifest.segments, manifest.attention_ports
    if options.dense != "openvino":
        module = require("trt_kv.runtime.backends.host.onnxruntime_segments")
        run: SegmentExecutor = module.OnnxRuntimeExecutor(
            graphs, segments, ports, n_threads=threads_for(options.n_threads), on_segment=on_segment
        )
        return run
    precision = options.precision or default_precision(manifest.quantization)
    if precision == "int8" and manifest.quantization is None:
        raise UsageError(
            f"{folder} has no quantised weights",
            got="precision 'int8'",
            expected="float32 or bfloat16",
            fix="build the engine with --quant int8 or int4",
        )
    return OpenVinoExecutor(
        graphs,
        segments,
        ports,
        precision=precision,
        n_threads=threads_for(options.n_threads),
        on_segment=on_segment,
    )
