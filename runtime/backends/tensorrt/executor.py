"""A TensorRT plan as ``StepExecutor``: fixed buffers, state updated in place, optionally CUDA graphs.

Needs an NVIDIA GPU, its driver, torch with CUDA, and TensorRT. docs/tensorrt.md lists what has been run on hardware.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trt_kv.errors import CapacityError, EngineError
from trt_kv.manifest import Plan
from trt_kv.plugins.graph_io import graph_inputs, graph_outputs, makers_of, results_of, states_of
from trt_kv.plugins.tensorrt_base import OpPlugin, register_plugins, trt
from trt_kv.program import Program
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.backends.cuda.store import TORCH_TYPES
from trt_kv.runtime.backends.step import Ints, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool

Ranges = Mapping[str, tuple[int, int, int]]


class TensorRtExecutor:
    """Runs both phases on one plan, made from the prefill program. See ``StepExecutor``.

    All layers share the pool's memory, so every state is bound to the same address as input and output. If TensorRT copied a
    state between ops, stale pages of one layer would overwrite those of another. The plugins count such copies, and the first
    one raises ``EngineError``.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        program: Program,
        *,
        vocab_size: int,
        n_kv_heads: int,
        dtype: str,
        cuda_graphs: bool = False,
    ) -> None:
        """``cuda_graphs`` needs device kernels in every plugin: work on the host cannot be captured."""
        register_plugins()
        self._plan = plan
        self._program = program
        self._vocab_size = vocab_size
        self._engine = engine_from_plan(path)
        self._stream = torch.cuda.Stream()
        self._contexts = [self._context(index) for index in range(len(plan.profiles))]
        largest = {axis: max(ranges[axis][2] for ranges in plan.profiles) for axis in plan.profiles[0]}
        self._most_columns = largest["T"]
        largest |= {"B+1": largest["B"] + 1, "L": len(program), "V": vocab_size, "K": n_kv_heads}
        types = {"float": TORCH_TYPES[dtype], "float32": torch.float32, "int64": torch.int64}
        states = states_of(program)
        self._buffers = {
            name: torch.empty(int(np.prod([largest[axis] for axis in t.axes])), dtype=types[t.dtype], device="cuda")
            for name, t in {**graph_inputs(program), **graph_outputs(program)}.items()
            if t.name not in states
        }
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] | None = {} if cuda_graphs else None

    @property
    def description(self) -> str:
        return f"{trt.__name__} {trt.__version__}, {torch.cuda.get_device_name()}"

    def warm_up(self) -> None:
        """Does nothing: a plan compiles nothing at its first call."""

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``. Raises ``CapacityError`` for a step larger than the plan was built for."""
        step = with_used_columns(step, self._most_columns, pool.page_size)
        sizes = {"N": len(step.input_ids), "R": len(step.logit_rows), "B": len(step.cu_tokens) - 1}
        sizes |= {"T": step.page_table.shape[2], "M": pool.n_pages, "U": pool.n_pages}
        index = profile_index(self._plan.profiles, sizes, newest_first=phase == "decode")
        context = self._contexts[index]
        with torch.cuda.stream(self._stream):
            self._bind(context, step, pool)
            self._execute((index, *sizes.values(), states_address(pool)), context)
            logits = self._buffers["logits"][: sizes["R"] * self._vocab_size].view(sizes["R"], -1).float().cpu().numpy()
            return StepResult.assemble(step, logits, self._made(sizes | {"K": pool.kv.shape[2]}))

    def _context(self, index: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise EngineError(
                "TensorRT cannot make an execution context", fix="free GPU memory, or build with a smaller PROFILE"
            )
        return context

    def _bind(self, context: Any, step: Step, pool: KvPool[Any]) -> None:
        states: dict[str, Any] = {name: getattr(pool, name) for name in states_of(self._program)}
        for name, tensor in graph_inputs(self._program).items():
            if tensor.name in states:
                state = states[tensor.name]
                context.set_input_shape(name, tuple(state.shape))
                context.set_tensor_address(name, state.data_ptr())
                context.set_tensor_address(f"{name}_out", state.data_ptr())
            else:
                values = np.ascontiguousarray(getattr(step, name))
                self._buffers[name][: values.size].copy_(torch.from_numpy(values.reshape(-1)), non_blocking=True)
                context.set_input_shape(name, values.shape)
                context.set_tensor_address(name, self._buffers[name].data_ptr())
        for name in graph_outputs(self._program):
            if name in self._buffers:
                context.set_tensor_address(name, self._buffers[name].data_ptr())

    def _execute(self, key: tuple[Any, ...], context: Any) -> None:
        """Launch the step. With CUDA graphs, a step is captured at its first run and replayed for later steps of its shape."""
        if self._graphs is not None and key in self._graphs:
            self._graphs[key].replay()
            return
        copies = OpPlugin.n_state_copies
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("TensorRT failed to run a step", fix="see the messages above; the sequences of the step are lost")
        if OpPlugin.n_state_copies != copies:
            raise EngineError(
                "this plan copies KV state between ops, which would mix up layers that share a pool",
                got=f"{OpPlugin.n_state_copies - copies} copies in one step",
                expected="every state updated in place",
                fix="report this with your TensorRT version; --target onnxruntime is not affected",
            )
        if self._graphs is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                context.execute_async_v3(self._stream.cuda_stream)
            self._graphs[key] = graph

    def _made(self, axes: Mapping[str, int]) -> dict[str, dict[int, Ints]]:
        """Results of the ops for the runtime, by name and layer; ``axes``: the sizes of this step."""
        specs = results_of(self._program)

        def read(name: str) -> Ints:
            shape = [axes[axis] for axis in specs[name].axes]
            array: Ints = self._buffers[name][: math.prod(shape)].cpu().numpy().reshape(shape)
            return array

        return {name: {layer: read(f"{name}_{layer}") for layer in layers} for name, layers in makers_of(self._program).items()}


def states_address(pool: KvPool[Any]) -> int:
    """Address of the pool: a captured step can only be replayed on the same memory."""
    tensor: Any = pool.kv
    return int(tensor.data_ptr())


def engine_from_plan(path: Path) -> Any:
    """Deserialize a plan; the plugins must be registered. ``EngineError`` with TensorRT's messages if that fails."""
    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Collects TensorRT's error messages."""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    logger = Logger()
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"TensorRT cannot load {path}",
            got="; ".join(said) or "no reason given",
            expected="the TensorRT version that built it, on a GPU it was built for, with a driver for it",
            fix="build the engine again on this machine",
        )
    return engine


def free_device_bytes() -> int:
    """Free bytes of the current GPU."""
    return int(torch.cuda.mem_get_info()[0])


def with_used_columns(step: Step, most_columns: int, page_size: int) -> Step:
    """``step`` with at most ``most_columns`` of its page table, if the others are unused: tables grow by doubling."""
    used = StepSizes.of(step, page_size).table_width
    return dataclasses.replace(step, page_table=step.page_table[:, :, : max(most_columns, used)])


def profile_index(profiles: Sequence[Ranges], sizes: Mapping[str, int], *, newest_first: bool = False) -> int:
    """The first optimization profile that admits ``sizes``; with ``newest_first`` the last one (decode profiles come last).

    Raises ``CapacityError`` naming the axes that no profile admits.
    """
    order = range(len(profiles))
    for index in reversed(order) if newest_first else order:
        if all(low <= sizes[axis] <= high for axis, (low, _, high) in profiles[index].items()):
            return index
    raise CapacityError(
        "no optimization profile of this engine admits the step",
        got=dict(sizes),
        expected=[{axis: f"{low}..{high}" for axis, (low, _, high) in ranges.items()} for ranges in profiles],
        fix="send less at once, or build with a larger PROFILE",
    )
