"""Whole steps on the host from a ``DenseExecutor`` and the KV ops that run between its layers."""

from collections.abc import Mapping
from typing import Any

from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.graph_io import specs_of
from trt_kv.plugins.registry import Kernel, kernel
from trt_kv.program import Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.ops import LayerOps
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool


class SplitStepExecutor:
    """A ``DenseExecutor`` with the KV ops of each phase. See ``StepExecutor``."""

    def __init__(
        self,
        dense: DenseExecutor,
        programs: Mapping[str, Program],
        *,
        implementation: str = "cpu",
        kernels: Mapping[str, Kernel] | None = None,
        kv_dtype: str = "float32",
    ) -> None:
        """``kernels``, by op name, replace those of ``implementation``. ``kv_dtype``: of the pools that steps will run on."""
        self.dense = dense
        self._programs = programs
        self._implementation = implementation
        self._kv_dtype = kv_dtype
        own = kernels or {}
        self._ops = {
            phase: LayerOps(program, lambda op: own.get(op) or kernel(op, implementation))
            for phase, program in programs.items()
        }

    @property
    def description(self) -> str:
        return self.dense.description

    def warm_up(self) -> None:
        """Run each op once on its spec's first case, which compiles kernels that are compiled at their first call."""
        warm_up_kernels(self._programs, self._implementation, self._kv_dtype)

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``."""
        attend = self._ops[phase].for_step(vars(step) | pool.states)
        logits = self.dense.run(step.input_ids, step.positions, step.logit_rows, attend)
        return StepResult.assemble(step, logits, attend.made)


def warm_up_kernels(programs: Mapping[str, Program], implementation: str, kv_dtype: str) -> None:
    """Run each op of ``programs`` once on its spec's first case. See ``StepExecutor.warm_up``."""
    specs = {spec.name: spec for program in programs.values() for spec in specs_of(program)}
    for spec in specs.values():
        kernel(spec.name, implementation)(**case_inputs(spec, spec.cases[0], kv_dtype=kv_dtype))
