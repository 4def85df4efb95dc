"""Graph -> TensorRT plan: optimization profiles, limits, timing cache, progress, and a description of the plan.

TensorRT builds for the GPU of this machine; TensorRT-RTX builds without one. One plan serves prefill and decode:
docs/decisions/0011-one-tensorrt-plan.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import EngineError
from trt_kv.export.targets.tensorrt_network import (
    CollectingLogger,
    ParsedNetwork,
    check_network,
    describe_network,
    network_from_onnx,
)
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.graph_io import graph_inputs
from trt_kv.plugins.tensorrt_base import trt
from trt_kv.profiles import Range
from trt_kv.program import Program

OnProgress = Callable[[str, int, int], None]
MIB = 2**20
PLAN_FILE = "model.plan"


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to build from one graph. ``timing_cache`` is read if it exists, and written afterwards."""

    graph: Path
    program: Program
    config: ModelConfig
    page_size: int
    dtype: str
    options: TensorRtOptions

    @property
    def ranges(self) -> list[dict[str, Range]]:
        """The ranges of the graph's axes in each optimization profile of the plan."""
        axes = {axis for tensor in graph_inputs(self.program).values() for axis in tensor.axes}
        profiles = self.options.profile.axis_ranges(n_layers=self.config.n_layers, page_size=self.page_size)
        return [{axis: sizes for axis, sizes in ranges.items() if axis in axes} for ranges in profiles]


def build_plan(request: PlanRequest, folder: Path, on_progress: OnProgress | None = None) -> None:
    """Write ``model.plan`` into ``folder``, ``network.json`` (tensors, plugins and their fields) and, if the driver can load
    the plan, ``layers.json`` (TensorRT's engine inspector).

    Raises ``EngineError`` with TensorRT's messages if it rejects the graph or the build fails.
    """
    parsed = network_from_onnx(request.graph)
    check_network(parsed, request.program, request.config, page_size=request.page_size, dtype=request.dtype)
    _save_json(folder / "network.json", describe_network(parsed))
    progress = BuildProgress("building the plan", on_progress)
    config = _builder_config(parsed, request, progress)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT could not build an engine from {request.graph.name}",
            got="; ".join(parsed.logger.errors) or "no reason given",
            fix="if it ran out of memory, choose a smaller PROFILE; else report this",
        )
    (folder / PLAN_FILE).write_bytes(plan)
    if request.options.timing_cache is not None:
        request.options.timing_cache.write_bytes(config.get_timing_cache().serialize())
    layers = inspected_layers(plan)
    if layers is not None:
        _save_json(folder / "layers.json", layers)


class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]
    """Calls ``on_progress`` with the progress of TensorRT's outermost phase, from TensorRT's threads."""

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
        """Always True: continue the build."""
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
    """The engine inspector's description of a plan's layers, or None if no driver can load the plan."""
    runtime = trt.Runtime(CollectingLogger())
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _builder_config(parsed: ParsedNetwork, request: PlanRequest, progress: BuildProgress) -> Any:
    profile, timing_cache = request.options.profile, request.options.timing_cache
    config = parsed.builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, profile.workspace_mib * MIB)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.builder_optimization_level = profile.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = progress
    for ranges in request.ranges:
        _add_optimization_profile(parsed, config, request.program, ranges)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            raise EngineError(
                f"TensorRT rejects the timing cache {timing_cache}",
                got="; ".join(parsed.logger.errors),
                fix="remove the file; it was made by another version or on another GPU",
            )
    return config


def _add_optimization_profile(parsed: ParsedNetwork, config: Any, program: Program, ranges: dict[str, Range]) -> None:
    shapes = parsed.builder.create_optimization_profile()
    one_more: Range = (ranges["B"][0] + 1, ranges["B"][1] + 1, ranges["B"][2] + 1)
    by_axis = ranges | {"B+1": one_more}
    network = parsed.network
    found = {network.get_input(i).name: list(network.get_input(i).shape) for i in range(network.num_inputs)}
    for name, spec in graph_inputs(program).items():
        fixed = found[name]
        low, usual, high = (
            [by_axis[axis][k] if axis in by_axis else size for axis, size in zip(spec.axes, fixed, strict=True)]
            for k in range(3)
        )
        shapes.set_shape(name, low, usual, high)
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError("TensorRT rejects an optimization profile", got=ranges, fix="change the sizes in the PROFILE")


def _save_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def library_version() -> str:
    """The package that builds, and its version."""
    return f"{trt.__name__} {trt.__version__}"
