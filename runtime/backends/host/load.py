"""An engine on the CPU: ONNX Runtime and the host's kernels; where the policy recalls, a cache in RAM or in a file."""

from pathlib import Path

from trt_kv.errors import UsageError
from trt_kv.manifest import Manifest
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.program import budgets_of, finds_budgets, recalling_layers
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import free_bytes, host_tier_at
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.loading import Loaded, LoadOptions, OnProgress, check_no_host_tier, pool_sizes
from trt_kv.runtime.memory import available_bytes
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import Admission, CacheDemand, Demand, HostDemand, WorkingSetDemand


def load(folder: Path, manifest: Manifest, options: LoadOptions, tell: OnProgress) -> Loaded:
    """Everything that runs an engine for ONNX Runtime on the CPU.

    ``UsageError`` for an engine in another type than float32, and for options about a cache on the host where there is none.
    """
    policy = manifest.policy
    if not policy.recalls:
        check_no_host_tier(folder, manifest, options)
    if manifest.dtype != "float32":
        raise UsageError(
            f"{folder} was built for GPUs",
            got=f"graphs in {manifest.dtype}",
            expected="float32 on a host",
            fix="load it with device=cuda, or build it again without --dtype",
        )
    executor = OnnxRuntimeExecutor(
        folder / "graphs",
        manifest.pieces,
        manifest.attention_ports,
        n_threads=options.n_threads,
        on_piece=lambda done, total: tell("opening graphs", done, total),
    )
    pool = KvPool(**pool_sizes(manifest, options.cache_tokens, available_bytes()))
    runner = ModelRunner(
        executor,
        pool,
        manifest.programs,
        chunk=options.chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        recall=_recall(manifest, pool, options) if policy.recalls else None,
        trace=options.trace,
    )
    return Loaded(
        runner=runner,
        admission=Admission(_demands(manifest, runner)),
        layer_pages=pool.n_pages // manifest.config.n_layers,
    )


def _demands(manifest: Manifest, runner: ModelRunner) -> list[Demand]:
    """What requests need of the engine's pools."""
    budgets = budgets_of(manifest.programs["prefill"])
    policy = manifest.policy
    if runner.recall is None:
        return [CacheDemand(runner.pool, budgets=budgets, n_protected=policy.sinks + policy.recent)]
    limits = PageLimits(page_size=manifest.page_size, sinks=policy.sinks, recent=policy.recent)
    recalling = recalling_layers(manifest.programs["decode"])
    return [
        WorkingSetDemand(
            runner.pool, limits=[limits if layer in recalling else None for layer in range(len(budgets))], budgets=budgets
        ),
        HostDemand(runner.recall.host, n_layers=len(recalling)),
    ]


def _recall(manifest: Manifest, device: KvPool, options: LoadOptions) -> StreamedRecall:
    """The cache on the host, and threads that stream it."""
    host_tokens, where = options.host_tokens, options.host_tier or "ram"
    if host_tokens is not None and host_tokens < 1:
        raise UsageError("bad host_tokens", got=host_tokens, expected="tokens >= 1, or None")
    sizes = pool_sizes(manifest, host_tokens, free_bytes(where))
    n_layers = manifest.config.n_layers
    n_host_layers = len(recalling_layers(manifest.programs["decode"]))
    host = host_tier_at(where, **sizes | {"n_pages": sizes["n_pages"] // n_layers * n_host_layers})
    finds = finds_budgets(manifest.programs["prefill"])
    return StreamedRecall(host, device, ThreadedCopies(), n_layers=n_layers, finds_budgets=finds, trace=options.trace)
