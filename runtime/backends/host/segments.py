"""The graph segments of an engine one after the other, whichever library runs them; the KV ops run between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trt_kv.errors import EngineError
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.step import Ints

Shapes = dict[str, list[int | str | None]]
"""The axes of each value: a size, a name, or None."""


class Value(Protocol):
    """An input or output of a segment."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> list[int | str | None]: ...


class Session(Protocol):
    """A segment that can be run: what is used of ``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[Value]: ...

    def get_outputs(self) -> Sequence[Value]: ...

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, np.ndarray]) -> Sequence[Any]:
        """The named outputs. The arrays may be overwritten by the next run, except q, k, v and logits."""
        ...


class SegmentExecutor:
    """Runs segment, attention, segment, attention ... segment, without copies between them. See ``DenseExecutor``."""

    def __init__(
        self,
        folder: Path,
        segments: Sequence[GraphSegment],
        ports: Sequence[AttentionPort],
        sessions: Sequence[Session],
        *,
        description: str,
    ) -> None:
        """``sessions`` run the ``segments`` of ``folder``. ``EngineError`` if they are not those of the manifest."""
        self.shapes = shapes_of(folder, segments, ports, sessions)
        self.description = description
        self._segments, self._ports, self._sessions = segments, ports, sessions

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


def shapes_of(
    folder: Path, segments: Sequence[GraphSegment], ports: Sequence[AttentionPort], sessions: Sequence[Session]
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
