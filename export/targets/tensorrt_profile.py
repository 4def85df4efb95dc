"""How to compile an engine for TensorRT."""

from dataclasses import dataclass
from pathlib import Path

from trt_kv.profiles import BuildProfile


@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """How to compile an engine for TensorRT. ``timing_cache`` is read if the file exists, and written afterwards."""

    profile: BuildProfile
    timing_cache: Path | None = None
