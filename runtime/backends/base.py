"""Interfaces of backends: dense layers of a decoder, KV ops of a layer, and whole steps made of both.

Dense layers are everything in a decoder except its KV ops: embedding, norms, projections, RoPE, MLPs and output head.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.step import Choice, Ints, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool


class Attend(Protocol):
    """The KV ops of one layer in one step: attention and all updates of the KV cache."""

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """Attention output [N, H, D] fp32 of q [N, H, D] and k, v [N, K, D], q and k after RoPE. Called once per layer, in
        order.
        """
        ...


class DenseExecutor(Protocol):
    """Runs the dense layers of a decoder. Holds no state between steps, so a failed step changes nothing here."""

    @property
    def description(self) -> str:
        """What runs the dense layers, for reports: library, version, device."""
        ...

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """Logits [R, V] fp32 of the rows ``logit_rows`` of the token-flat batch ``input_ids`` [N] at ``positions`` [N]."""
        ...


@runtime_checkable
class StepExecutor(Protocol):
    """Runs whole steps: dense layers and KV ops. All state is in the pool; a failed step leaves its sequences unusable."""

    @property
    def description(self) -> str:
        """What runs the steps, for reports: library, version, device."""
        ...

    def warm_up(self) -> None:
        """Compile the kernels that would otherwise be compiled at their first call."""
        ...

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """Run ``step`` with the program of ``phase`` ("prefill" or "decode"), updating the pool."""
        ...


@runtime_checkable
class ChoosingExecutor(StepExecutor, Protocol):
    """Can also choose the tokens, where the logits are, so that these need not be copied to the host."""

    def run_step_choosing(self, step: Step, pool: KvPool[Any], choices: Sequence[Choice]) -> StepResult:
        """Run a decode step, and choose the token of each row by ``choices``."""
        ...
