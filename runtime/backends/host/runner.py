"""Makes a ``ModelRunner`` on the CPU from a ``DenseExecutor``."""

from collections.abc import Mapping
from typing import Any

from trt_kv.program import Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.model_runner import ModelRunner


def host_runner(
    dense: DenseExecutor,
    pool: KvPool[Any],
    programs: Mapping[str, Program],
    *,
    implementation: str = "cpu",
    n_threads: int = 0,
    recall: StreamedRecall | RecallInPlace | None = None,
    **options: Any,
) -> ModelRunner:
    """A ``ModelRunner`` of ``dense`` and the KV ops' kernels of ``implementation``; ``options`` as for ``ModelRunner``.

    ``recall`` runs RecallAttention over a cache on the host, with ``pool`` as the device. None: the op's own kernel runs over
    the whole cache in ``pool``.
    """
    kernels = None if recall is None else recall.kernels
    steps = SplitStepExecutor(
        dense, programs, implementation=implementation, kernels=kernels, kv_dtype=pool.kv_dtype, n_threads=n_threads
    )
    return ModelRunner(steps, pool, programs, tiers=recall, **options)
