"""The graph segments of an engine in OpenVINO: the same files, weights in the order that its kernels read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.errors import EngineError
from trt_kv.manifest import INT8_ACTIVATIONS, AttentionPort, GraphSegment, Quantization
from trt_kv.plugins.paging import Floats
from trt_kv.require import require
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.segments import SegmentExecutor
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.memory import memory_error
from trt_kv.runtime.processes import never_destroy_in_forks
from trt_kv.safe_path import safe_join

_LARGE = 64
"""Rows from which on a segment gives its scratch memory back as soon as it has run."""


def default_precision(quantization: Quantization | None) -> str:
    """The precision of an engine whose loader was given none: what the engine's weights were built for."""
    return "int8" if quantization is not None and quantization.accuracy_level == INT8_ACTIVATIONS else "float32"


class OpenVinoExecutor(SegmentExecutor):
    """The segments in OpenVINO. See ``DenseExecutor``."""

    def __init__(
        self,
        folder: Path,
        segments: Sequence[GraphSegment],
        ports: Sequence[AttentionPort],
        *,
        precision: str = "float32",
        n_threads: int = 0,
        on_segment: Callable[[int, int], None] | None = None,
    ) -> None:
        """``folder`` holds the segment files and their weights. ``precision``: one of ``PRECISIONS``; "int8" is for quantised
        weights. ``n_threads`` 0: one per core; the threads are those of the process, shared by all segments and engines.

        Raises ``MissingDependencyError`` without OpenVINO, ``EngineError`` for a segment that it cannot load.
        """
        openvino = require("openvino", extra="openvino")
        core, settings = openvino.Core(), _settings(precision, n_threads)
        sessions = []
        for done, segment in enumerate(segments, start=1):
            path = safe_join(folder, segment.file, error=EngineError)
            sessions.append(OpenVinoSession(_compiled(core, path, settings), openvino.Tensor))
            if on_segment is not None:
                on_segment(done, len(segments))
        version = openvino.__version__.partition("-")[0]
        super().__init__(folder, segments, ports, sessions, description=f"OpenVINO {version}, CPU, {precision}")

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``. Rows are added up to one of few numbers: OpenVINO prepares its kernels for each number."""
        n_rows, n_logits = len(input_ids), len(logit_rows)
        n_more = padded(n_rows) - n_rows

        def attend_to_rows(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            out: Floats = _with_more(attend(layer, q[:n_rows], k[:n_rows], v[:n_rows]), n_more)
            return out

        logits = super().run(
            _with_more(input_ids, n_more),
            _with_more(positions, n_more),
            _with_more(logit_rows, padded(n_logits) - n_logits),
            attend_to_rows if n_more else attend,
        )
        return logits[:n_logits]


def padded(n_rows: int) -> int:
    """The number of rows that a step of ``n_rows`` computes: at most an eighth more, and 8 different ones per power of two."""
    unit = 1 << max(0, n_rows.bit_length() - 4)
    return -(-n_rows // unit) * unit


def _with_more(rows: Any, n_more: int) -> Any:
    """``rows`` and ``n_more`` rows of zeros."""
    return np.concatenate([rows, np.zeros((n_more, *rows.shape[1:]), rows.dtype)]) if n_more else rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Value:
    name: str
    shape: list[int | str | None]


class OpenVinoSession:
    """One compiled segment. See ``Session``."""

    def __init__(self, compiled: Any, tensor: Callable[..., Any]) -> None:
        """``compiled``: an ``openvino.CompiledModel``; ``tensor``: the class ``openvino.Tensor``."""
        self._compiled = compiled
        self._tensor = tensor
        self._request = compiled.create_infer_request()
        self._inputs = _values(compiled.inputs)
        self._outputs = _values(compiled.outputs)
        self._input_index = {value.name: index for index, value in enumerate(self._inputs)}
        self._output_index = {name: index for index, port in enumerate(compiled.outputs) for name in port.get_names()}
        never_destroy_in_forks(compiled)
        never_destroy_in_forks(self._request)

    def get_inputs(self) -> Sequence[_Value]:
        return self._inputs

    def get_outputs(self) -> Sequence[_Value]:
        return self._outputs

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs, copied: the request's own arrays are overwritten by its next run."""
        request = self._request
        for name, array in input_feed.items():
            request.set_input_tensor(self._input_index[name], self._tensor(np.ascontiguousarray(array), shared_memory=True))
        request.infer(share_outputs=True)
        outputs = [np.array(request.get_output_tensor(self._output_index[name]).data) for name in output_names]
        if max(map(len, input_feed.values())) >= _LARGE:
            self._compiled.release_memory()
        return outputs


def _values(ports: Sequence[Any]) -> list[_Value]:
    """A port has several names if the graph gives one value several."""
    return [
        _Value(name=name, shape=[axis.get_length() if axis.is_static else None for axis in port.get_partial_shape()])
        for port in ports
        for name in sorted(port.get_names())
    ]


def _settings(precision: str, n_threads: int) -> dict[str, Any]:
    """OpenVINO's properties, one for each thing that it would decide by itself."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        # Blocks of as many activations share a scale; with 0 they stay floats.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if precision == "int8" else 0,
        "INFERENCE_NUM_THREADS": n_threads,
        # No stream: segments run on the thread that calls and on the process's one pool, in place of two threads for each.
        "NUM_STREAMS": 0,
        # The KV kernels' threads use the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def _compiled(core: Any, path: Path, settings: Mapping[str, Any]) -> Any:
    try:
        return core.compile_model(core.read_model(path), "CPU", settings)
    except Exception as error:  # RuntimeError for everything, with text in place of types
        if (no_memory := memory_error(error, f"the segment {path.name}")) is not None:
            raise no_memory from error
        raise EngineError(
            f"OpenVINO cannot load {path}", got=str(error), fix="run it with the dense layers' library onnxruntime"
        ) from error
