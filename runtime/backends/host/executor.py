"""Whole steps from a dense executor and the KV ops that run between its parts, on the host."""

from collections.abc import Mapping
from typing import Any

from trt_kv.plugins.registry import Kernel
from trt_kv.program import Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.ops import LayerOps
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool


class SplitStepExecutor:
    """A dense executor with the KV ops of each phase. See ``StepExecutor``."""

    def __init__(
        self,
        dense: DenseExecutor,
        programs: Mapping[str, Program],
        *,
        implementation: str = "cpu",
        kernels: Mapping[str, Kernel] | None = None,
    ) -> None:
        """``kernels`` run the ops they are named after, in place of those of ``implementation``."""
        self.dense = dense
        self._ops = {
            phase: LayerOps(program, implementation=implementation, kernels=kernels) for phase, program in programs.items()
        }

    @property
    def description(self) -> str:
        return self.dense.description

    def warm_up(self) -> None:
        for ops in self._ops.values():
            ops.warm_up()

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``."""
        attend = self._ops[phase].for_step(step, pool)
        logits = self.dense.run(step.input_ids, step.positions, step.logit_rows, attend)
        return attend.result(logits)
