"""What the runtime of a target executes."""

from dataclasses import dataclass

from trt_kv.manifest import AttentionPort, Piece, Plan


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Dense pieces for ONNX Runtime, or a plan for TensorRT."""

    pieces: tuple[Piece, ...] = ()
    ports: tuple[AttentionPort, ...] = ()
    plan: Plan | None = None
