"""Runs the KV ops between the dense layers, in place on the pool: on numpy arrays of the host or torch tensors of a device."""

from collections.abc import Callable, Mapping
from typing import Any, Generic

from trt_kv.opspec import OpSpec
from trt_kv.plugins.graph_io import results_of_layer
from trt_kv.plugins.registry import Kernel, op_specs
from trt_kv.plugins.tensors import Array
from trt_kv.program import Program


class LayerOps:
    """A program whose kernels have been looked up; ``for_step`` binds it to the tensors of one step."""

    def __init__(self, program: Program, kernel_of: Callable[[str], Kernel]) -> None:
        """``kernel_of`` maps the name of an op to the kernel that runs it."""
        specs = op_specs()
        self.layers: list[list[tuple[OpSpec, Kernel, Mapping[str, Any]]]] = [
            [(specs[node.op], kernel_of(node.op), node.attributes) for node in nodes] for nodes in program
        ]
        self.results = [[t.name for t in results_of_layer(nodes)] for nodes in program]
        """For each layer, the names of the results that its ops return to the runtime."""

    def for_step(self, tensors: Mapping[str, Array]) -> "BoundLayerOps[Array]":
        """``tensors``: the ops' inputs from the step, and the states, by name."""
        return BoundLayerOps(self, tensors)


class BoundLayerOps(Generic[Array]):
    """``Attend`` for one step: called by the dense layers once per layer. Synchronizes only if the kernels do."""

    def __init__(self, ops: LayerOps, tensors: Mapping[str, Array]) -> None:
        self._ops = ops
        self._tensors = tensors
        self.made: dict[str, dict[int, Array]] = {}
        """Results of the ops for the runtime, by name and layer: see ``StepResult.assemble``."""

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention output [N, H, D] of ``layer``; q is [N, H, D], k and v are [N, K, D]. Updates the pool."""
        tensors: dict[str, Any] = {**self._tensors, "q": q, "k": k, "v": v}
        if (budget_LB := tensors.pop("budget", None)) is not None:
            tensors["budget"] = budget_LB[layer]
        for spec, run, attributes in self._ops.layers[layer]:
            inputs = {t.name: tensors[t.name] for t in spec.inputs if not t.optional or t.name in tensors}
            results = run(**inputs, **attributes)
            tensors.update(zip((t.name for t in spec.outputs), results, strict=True))
        for name in self._ops.results[layer]:
            self.made.setdefault(name, {})[layer] = tensors[name]
        out: Array = tensors["out"]
        return out
