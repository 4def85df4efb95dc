"""Whole steps on the host from a ``DenseExecutor`` and the KV ops that run between its layers."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numba

from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.graph_io import specs_of
from trt_kv.plugins.registry import Kernel, kernel
from trt_kv.program import Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.attention_layers import OP, AttentionLayers, CachedTokens, WholeStepExecutor
from trt_kv.runtime.backends.host.heads_apart import attend_by_head
from trt_kv.runtime.backends.ops import LayerOps
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.kernel_threads import kernel_threads_bound


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
        n_threads: int = 0,
    ) -> None:
        """``kernels``, by op name, replace those of ``implementation``. ``kv_dtype``: of the pools that steps will run on.
        ``n_threads`` run the kernels; 0: as many as numba has.
        """
        self.dense = dense
        self._programs = programs
        self._implementation = implementation
        self._kv_dtype = kv_dtype
        self._n_threads = n_threads
        own = kernels or {}
        replaced = implementation != "cpu" or OP in own
        self._attention = None if replaced else AttentionLayers.of(programs["decode"])
        """What decode steps do between the dense layers, if these can do it themselves."""
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
        with _kernels_on(self._n_threads):
            if phase == "decode" and self._attention is not None and isinstance(self.dense, WholeStepExecutor):
                logits = self.dense.decode(step.input_ids, step.logit_rows, self._attention, CachedTokens.of(step, pool))
            else:
                by_head = attend_by_head(attend, pool.kv.shape[2])
                logits = self.dense.run(step.input_ids, step.positions, step.logit_rows, by_head)
        return StepResult.assemble(step, logits, attend.made)


@contextlib.contextmanager
def _kernels_on(n_threads: int) -> Iterator[None]:
    """Let kernels that this thread starts run on ``n_threads`` threads, or if 0, or above what numba has, on those it has."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(n_threads or before, int(vars(numba.config)["NUMBA_NUM_THREADS"])))
    try:
        with kernel_threads_bound():
            yield
    finally:
        numba.set_num_threads(before)


def warm_up_kernels(programs: Mapping[str, Program], implementation: str, kv_dtype: str) -> None:
    """Run each op of ``programs`` once on its spec's first case. See ``StepExecutor.warm_up``."""
    specs = {spec.name: spec for program in programs.values() for spec in specs_of(program)}
    for spec in specs.values():
        kernel(spec.name, implementation)(**case_inputs(spec, spec.cases[0], kv_dtype=kv_dtype))
