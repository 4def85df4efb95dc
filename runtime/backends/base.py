"""The seams: between a decoder's dense parts and its KV ops, and around both of them together."""

from typing import Any, Protocol, runtime_checkable

from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.step import Ints, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool


class Attend(Protocol):
    """Everything that happens to the KV cache in one layer of one step."""

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """Attention output [N, H, D] fp32; q [N, H, D] and k, v [N, K, D] are rotated. Called once per layer, in order."""
        ...


class DenseExecutor(Protocol):
    """The dense parts of a decoder. Holds no state between steps: a failed step changes nothing here."""

    @property
    def description(self) -> str:
        """What runs the dense parts, for reports: library, version, device."""
        ...

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """Logits [R, V] fp32 of the rows ``logit_rows`` of the token-flat batch ``input_ids`` [N] at ``positions`` [N]."""
        ...


@runtime_checkable
class StepExecutor(Protocol):
    """Whole steps, dense parts and KV ops. All state is in the pool, and a failed step leaves its sequences unusable."""

    @property
    def description(self) -> str:
        """What runs the steps, for reports: library, version, device."""
        ...

    def warm_up(self) -> None:
        """Compile what is compiled at its first call."""
        ...

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """Run ``step`` by the program of ``phase``, updating the pool."""
        ...
