"""Runs the KV ops between the dense parts with their device kernels, in place on a pool on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trt_kv.errors import EngineError
from trt_kv.opspec import OpSpec, TensorSpec
from trt_kv.plugins.graph_io import INPUT_IDS, LOGIT_ROWS, results_of, step_tensors_of
from trt_kv.plugins.registry import Kernel, device_kernel, op_specs
from trt_kv.plugins.tensors import POSITIONS
from trt_kv.program import Program
from trt_kv.runtime.backends.cuda.store import DeviceKvPool

Tensors = dict[str, Tensor]


class DeviceOps:
    """A program whose device kernels have been looked up; ``for_step`` binds it to the tensors of one step."""

    def __init__(self, program: Program, pool: DeviceKvPool, kernels: Mapping[str, Kernel] | None = None) -> None:
        """``kernels`` run instead of the ops' own. Raises ``EngineError`` for an op that has no kernels for devices."""
        instead = kernels or {}
        specs = op_specs()
        self.n_layers = len(program)
        self.step_tensors: dict[str, TensorSpec] = {
            "input_ids": INPUT_IDS,
            "positions": POSITIONS,
            "logit_rows": LOGIT_ROWS,
        } | step_tensors_of(program)
        self.makers: dict[str, list[int]] = {}
        """By the name of what ops make for the runtime, the layers that make it."""
        for name in results_of(program):
            made, _, layer = name.rpartition("_")
            self.makers.setdefault(made, []).append(int(layer))
        self._states = pool.states
        self._layers = [
            [(specs[n.op], instead.get(n.op) or _device_kernel(n.op), dict(n.attributes)) for n in nodes] for nodes in program
        ]

    def for_step(self, tensors: Tensors) -> "BoundDeviceOps":
        return BoundDeviceOps(self._layers, tensors | self._states, self.makers)


class BoundDeviceOps:
    """The decoder's ``attend`` for one step: called once per layer. Launches on the current stream and never waits."""

    def __init__(
        self,
        layers: list[list[tuple[OpSpec, Kernel, dict[str, Any]]]],
        tensors: Tensors,
        makers: dict[str, list[int]],
    ) -> None:
        self._layers = layers
        self._tensors = tensors
        self._made: dict[str, list[Tensor]] = {name: [] for name in makers}

    @property
    def results(self) -> Tensors:
        """What ops made for the runtime, by name, one row for each layer that makes it."""
        return {name: torch.stack(of_layers) for name, of_layers in self._made.items()}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [N, H, D] of ``layer``; q is [N, H, D], k and v are [N, K, D]. Updates the pool."""
        tensors: dict[str, Any] = {**self._tensors, "q": q, "k": k, "v": v}
        for spec, run, attributes in self._layers[layer]:
            inputs = {t.name: tensors[t.name] for t in spec.inputs if not t.optional or t.name in tensors}
            results = run(**inputs, **attributes)
            tensors.update(zip((t.name for t in spec.outputs), results, strict=True))
        for name, of_layers in self._made.items():
            if name in tensors:
                of_layers.append(tensors[name])
        out: Tensor = tensors["out"]
        return out


def _device_kernel(op: str) -> Kernel:
    kernel = device_kernel(op)
    if kernel is None:
        raise EngineError(
            f"{op} has no kernels for devices", expected="Triton, and the op's kernels for it", fix="pip install 'trt-kv[gpu]'"
        )
    return kernel
