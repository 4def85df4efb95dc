"""Graph -> TensorRT plan: optimization profiles, limits, timing cache, progress, and what the plan looks like afterwards.

Needs no GPU of its own account: official TensorRT builds for the GPU of this machine, TensorRT-RTX builds anywhere.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import EngineError
from trt_kv.export.tensorrt_network import (
    ParsedNetwork,
    check_network,
    describe_network,
    network_from_onnx,
)
from trt_kv.export.tensorrt_profile import BuildProfile, Range
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.graph_io import graph_inputs
from trt_kv.plugins.tensorrt_base import trt
from trt_kv.program import Program

OnProgress = Callable[[str, int, int], None]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to build from one graph. ``timing_cache`` is read where it exists and written afterwards."""

    graph: Path
    phase: str
    program: Program
    config: ModelConfig
    page_size: int
    dtype: str
    profile: BuildProfile
    timing_cache: Path | None = None


def build_plan(request: PlanRequest, folder: Path, on_progress: OnProgress | None = None) -> None:
    """Write ``<phase>.plan`` into ``folder``, ``<phase>.network.json`` (tensors, plugins and their fields) and, where a driver
    lets the plan be loaded, ``<phase>.layers.json`` (TensorRT's engine inspector).

    Raises ``EngineError`` with TensorRT's own words where it refuses the graph or the build.
    """
    parsed = network_from_onnx(request.graph)
    check_network(parsed, request.program, request.config, page_size=request.page_size, dtype=request.dtype)
    _save_json(folder / f"{request.phase}.network.json", describe_network(parsed))
    progress = BuildProgress(f"building {request.phase}", on_progress)
    config = _builder_config(parsed, request, progress)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT could not build the {request.phase} engine",
            got="; ".join(parsed.logger.errors) or "no reason given",
            fix="if it ran out of memory, choose a smaller PROFILE; else report this",
        )
    (folder / f"{request.phase}.plan").write_bytes(plan)
    if request.timing_cache is not None:
        request.timing_cache.write_bytes(config.get_timing_cache().serialize())
    layers = inspected_layers(plan)
    if layers is not None:
        _save_json(folder / f"{request.phase}.layers.json", layers)


class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]
    """Tells ``on_progress`` how far TensorRT's outermost phase is; called from TensorRT's threads."""

    def __init__(self, stage: str, on_progress: OnProgress | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self._stage = stage
        self._on_progress = on_progress
        self._totals: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if not parent_phase:
            self._totals[phase_name] = max(1, num_steps)
            self._tell(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Always True: go on building."""
        if phase_name in self._totals:
            self._tell(phase_name, min(step + 1, self._totals[phase_name]))
        return True

    def phase_finish(self, phase_name: str) -> None:
        if phase_name in self._totals:
            self._tell(phase_name, self._totals[phase_name])

    def _tell(self, phase_name: str, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(self._stage, done, self._totals[phase_name])


def inspected_layers(plan: Any) -> Any:
    """The engine inspector's account of a plan's layers, or None where no driver lets the plan be loaded."""
    from trt_kv.export.tensorrt_network import CollectingLogger

    runtime = trt.Runtime(CollectingLogger())
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _builder_config(parsed: ParsedNetwork, request: PlanRequest, progress: BuildProgress) -> Any:
    profile = request.profile
    config = parsed.builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, profile.workspace_mib * MIB)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.builder_optimization_level = profile.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = progress
    for ranges in profile.axis_ranges(request.phase, n_layers=request.config.n_layers, page_size=request.page_size):
        _add_optimization_profile(parsed, config, request.program, ranges)
    if request.timing_cache is not None:
        known = request.timing_cache.read_bytes() if request.timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            raise EngineError(
                f"TensorRT refuses the timing cache {request.timing_cache}",
                got="; ".join(parsed.logger.errors),
                fix="remove the file; it was made by another version or on another GPU",
            )
    return config


def _add_optimization_profile(parsed: ParsedNetwork, config: Any, program: Program, ranges: dict[str, Range]) -> None:
    shapes = parsed.builder.create_optimization_profile()
    one_more: Range = (ranges["B"][0] + 1, ranges["B"][1] + 1, ranges["B"][2] + 1)
    by_axis = ranges | {"B+1": one_more}
    for name, spec in graph_inputs(program).items():
        fixed = [network_shape(parsed, name)[i] for i in range(len(spec.axes))]
        low, usual, high = (
            [by_axis[axis][k] if axis in by_axis else size for axis, size in zip(spec.axes, fixed, strict=True)] for k in range(3)
        )
        shapes.set_shape(name, low, usual, high)
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError("TensorRT refuses an optimization profile", got=ranges, fix="change the sizes in the PROFILE")


def network_shape(parsed: ParsedNetwork, name: str) -> list[int]:
    """The shape of an input of the network, -1 where it is dynamic."""
    inputs = (parsed.network.get_input(i) for i in range(parsed.network.num_inputs))
    return next(list(tensor.shape) for tensor in inputs if tensor.name == name)


def _save_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
