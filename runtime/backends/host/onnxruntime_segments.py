"""The graph segments of an engine, each an ONNX Runtime session; arrays pass between them and the KV ops without a copy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trt_kv.errors import EngineError
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.memory import memory_error
from trt_kv.runtime.processes import never_destroy_in_forks
from trt_kv.safe_path import safe_join

SESSION_OPTIONS = {
    # Threads wait a few microseconds between two matrix products: less than it takes to put a thread to sleep and wake it.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    # Threads left spinning would take cores from the KV kernels and the other segments.
    "session.force_spinning_stop": "1",
}


class OnnxRuntimeExecutor:
    """Runs segment, attention, segment, attention ... segment. See ``DenseExecutor``."""

    def __init__(
        self,
        folder: Path,
        segments: Sequence[GraphSegment],
        ports: Sequence[AttentionPort],
        *,
        n_threads: int = 0,
        on_segment: Callable[[int, int], None] | None = None,
    ) -> None:
        """``folder`` holds the segment files and their weights. ``n_threads`` 0: one per core."""
        self._ports = ports
        self._segments = segments
        self._sessions = []
        for done, segment in enumerate(segments, start=1):
            self._sessions.append(open_segment(safe_join(folder, segment.file, error=EngineError), n_threads=n_threads))
            if on_segment is not None:
                on_segment(done, len(segments))
        self.shapes = shapes_of(folder, segments, ports, self._sessions)

    @property
    def description(self) -> str:
        """Library, version and provider."""
        return f"ONNX Runtime {ort.__version__}, {self._sessions[0].get_providers()[0]}"

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""
        values: dict[str, np.ndarray] = {"input_ids": input_ids, "positions": positions, "logit_rows": logit_rows}
        for layer, (segment, session) in enumerate(zip(self._segments, self._sessions, strict=True)):
            outputs = session.run(segment.outputs, {name: values[name] for name in segment.inputs})
            values.update(zip(segment.outputs, outputs, strict=True))
            if layer < len(self._ports):
                port = self._ports[layer]
                values[port.out] = attend(layer, values.pop(port.q), values.pop(port.k), values.pop(port.v))
        return values["logits"]


def open_segment(
    path: Path,
    *,
    n_threads: int,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
    config: Mapping[str, str] = SESSION_OPTIONS,
    weights: Mapping[str, ort.OrtValue] | None = None,
    fix: str = "build the engine again",
) -> ort.InferenceSession:
    """A session for one segment. ``weights``, by initializer name, are used without a copy. ``EngineError`` with ``fix`` if
    ONNX Runtime cannot load the segment.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    for name, weight in (weights or {}).items():
        options.add_initializer(name, weight)
    options.log_severity_level = 3
    try:
        # With fallback, ONNX Runtime would replace a failing provider by another one and print that to standard output.
        session = ort.InferenceSession(path, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if (no_memory := memory_error(error, f"the segment {path.name}")) is not None:
            raise no_memory from error
        raise EngineError(f"ONNX Runtime cannot load {path}", got=str(error), fix=fix) from error
    never_destroy_in_forks(session)
    return session


Shapes = dict[str, list[int | str | None]]
"""The axes of each value: a size, a name, or None."""


def shapes_of(
    folder: Path, segments: Sequence[GraphSegment], ports: Sequence[AttentionPort], sessions: Sequence[ort.InferenceSession]
) -> Shapes:
    """The shapes of all values that the segments make. ``EngineError`` naming the file of a segment whose inputs and outputs
    are not those that the manifest gives it, or that neither an earlier segment nor attention makes.
    """
    shapes: Shapes = {}
    known = {"input_ids", "positions", "logit_rows"}
    for layer, (segment, session) in enumerate(zip(segments, sessions, strict=True)):
        outputs = {output.name: output.shape for output in session.get_outputs()}
        inputs = {value.name for value in session.get_inputs()}
        shapes |= {name: outputs[name] for name in segment.outputs if name in outputs}
        known |= set(segment.outputs)
        port = ports[layer] if layer < len(ports) else None
        read = {"logits"} if port is None else {port.q, port.k, port.v}
        distinct = port is None or len(read) == 3
        as_listed = inputs == set(segment.inputs) and inputs <= known and read | set(segment.outputs) <= shapes.keys()
        if not as_listed or not distinct:
            raise EngineError(
                f"{folder / segment.file} is not the segment that the manifest describes",
                got=f"inputs {sorted(inputs)}, outputs {sorted(outputs)}",
                expected=f"inputs {sorted(segment.inputs)}, outputs {sorted(segment.outputs)}, and then {sorted(read)}",
                fix="build the engine again",
            )
        known = known if port is None else known - read | {port.out}
    return shapes


def check_shapes(folder: Path, shapes: Shapes, ports: Sequence[AttentionPort], config: ModelConfig) -> None:
    """``EngineError`` unless the graphs in ``folder`` have the heads and the vocabulary of ``config``."""
    expected = {"logits": [config.vocab_size]}
    for port in ports:
        expected[port.q] = [config.n_heads, config.head_dim]
        expected[port.k] = expected[port.v] = [config.n_kv_heads, config.head_dim]
    for name, axes in expected.items():
        if shapes[name][1:] != axes:
            raise EngineError(
                f"the graphs in {folder} are not of the model in the manifest",
                got=f"{name} of shape {shapes[name]}",
                expected=f"{axes} after the first axis",
                fix="build the engine again",
            )
