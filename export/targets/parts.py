"""The parts of an engine that the runtime of its target executes."""

from dataclasses import dataclass

from trt_kv.manifest import AttentionPort, GraphSegment, Plan


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Dense segments for ONNX Runtime, or a plan for TensorRT."""

    segments: tuple[GraphSegment, ...] = ()
    ports: tuple[AttentionPort, ...] = ()
    plan: Plan | None = None
