"""Runs the KV ops between the dense pieces, in place on the pool."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.registry import Kernel, kernel, op_specs
from trt_kv.program import Program
from trt_kv.runtime.backends.step import Ints, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool


class LayerOps:
    """A program whose kernels have been looked up; ``for_step`` binds it to the tensors of one step."""

    def __init__(self, program: Program, *, implementation: str = "cpu", kernels: Mapping[str, Kernel] | None = None) -> None:
        """``kernels`` run the ops they are named after, in place of those of ``implementation``."""
        specs = op_specs()
        self._implementation = implementation
        own = kernels or {}
        self._layers = [
            [(specs[node.op], own.get(node.op) or kernel(node.op, implementation), dict(node.attributes)) for node in nodes]
            for nodes in program
        ]

    def warm_up(self) -> None:
        """Run each op once on its spec's first case: kernels that are compiled at their first call are compiled now."""
        for spec in {spec.name: spec for nodes in self._layers for spec, _, _ in nodes}.values():
            kernel(spec.name, self._implementation)(**case_inputs(spec, spec.cases[0]))

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    def for_step(self, step: Step, pool: KvPool[Any]) -> "BoundLayerOps":
        return BoundLayerOps(self._layers, step, pool)


class BoundLayerOps:
    """``Attend`` for one step: called by the dense program once per layer."""

    def __init__(self, layers: list[list[tuple[Any, Kernel, dict[str, Any]]]], step: Step, pool: KvPool[Any]) -> None:
        self._layers = layers
        self._tensors = {
            "positions": step.positions,
            "cu_tokens": step.cu_tokens,
            "slots": step.slots,
            "page_table": step.page_table,
            "kv_len": step.kv_len,
            "prompt_remaining": step.prompt_remaining,
            "evict": step.evict,
            "prompt_len": step.prompt_len,
            "found_budget": step.found_budget,
            "query_rows": step.query_rows,
            **pool.states,
        }
        self._kept: Ints = step.kv_len.copy()
        self._found_budget: Ints = np.full(step.kv_len.shape, -1)
        self._corrected: Ints | None = None

    def result(self, logits: Floats) -> StepResult:
        """The step's result, once all layers have been called and ``logits`` came out."""
        return StepResult(logits=logits, kept=self._kept, found_budget=self._found_budget, corrected=self._corrected)

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """Attention output [N, H, D] of ``layer``; q is [N, H, D], k and v are [N, K, D]. Updates the pool."""
        tensors: dict[str, Any] = {**self._tensors, "q": q, "k": k, "v": v}
        for spec, run, attributes in self._layers[layer]:
            inputs = {t.name: tensors[t.name] for t in spec.inputs if not t.optional or t.name in tensors}
            results = run(**inputs, **attributes)
            tensors.update(zip((t.name for t in spec.outputs), results, strict=True))
        if "kept" in tensors:
            self._kept[layer] = tensors["kept"]
        elif "budget" in tensors:
            self._found_budget[layer] = np.where(self._tensors["evict"] == 1, tensors["budget"], -1)
        if "corrected" in tensors:
            if self._corrected is None:
                self._corrected = np.zeros((len(self._layers), *tensors["corrected"].shape), np.int64)
            self._corrected[layer] = tensors["corrected"]
        out: np.ndarray = tensors["out"]
        return out
