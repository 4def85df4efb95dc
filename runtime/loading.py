"""An engine's executor, pools and admission, as ``Engine.load`` is asked for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import UsageError
from trt_kv.layer_budget import ALL
from trt_kv.manifest import ITEM_BYTES, Manifest
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.program import budgets_of, finds_budgets, recalling_layers
from trt_kv.require import require
from trt_kv.runtime.admission import Admission, CacheDemand, Demand, HostDemand, WorkingSetDemand
from trt_kv.runtime.executors.onnxruntime_pieces import OnnxRuntimeExecutor
from trt_kv.runtime.executors.protocol import DenseExecutor, StepExecutor
from trt_kv.runtime.kv_pool import KvPool, token_bytes
from trt_kv.runtime.memory import available_bytes
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner
from trt_kv.runtime.recall.background import ThreadedCopies
from trt_kv.runtime.recall.host_tier import free_bytes, host_tier_at
from trt_kv.runtime.recall.streamed import StreamedRecall
from trt_kv.runtime.trace import NO_TRACE, Trace

OnProgress = Callable[[str, int, int], None]
"""Told (stage, done, total) while something long runs."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How an engine is opened; see ``Engine.load``."""

    cache_tokens: int | None = None
    host_tier: str | None = None
    host_tokens: int | None = None
    chunk: int = DEFAULT_CHUNK
    n_threads: int = 0
    trace: Trace = NO_TRACE

    def __post_init__(self) -> None:
        for name, valid, got, expected in (
            ("cache_tokens", self.cache_tokens is None or self.cache_tokens >= 1, self.cache_tokens, "tokens >= 1, or None"),
            ("chunk", self.chunk >= 1, self.chunk, "tokens >= 1"),
            ("n_threads", self.n_threads >= 0, self.n_threads, "threads >= 1, or 0: one per core"),
        ):
            if not valid:
                raise UsageError(f"bad {name}", got=got, expected=expected)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What runs an engine's steps, and who may use it."""

    runner: ModelRunner
    admission: Admission
    layer_pages: int
    """Pages of whole caches that there is room for in every layer."""
    batch: int | None = None
    """How many sequences may certainly decode together, each of them and a copy of it; None: any number."""


def load_as_built(folder: Path, manifest: Manifest, options: LoadOptions, tell: OnProgress) -> Loaded:
    """On what the engine was built for: ONNX Runtime and the host's kernels, or a TensorRT plan.

    ``UsageError`` for options about a cache on the host where there is none.
    """
    policy = manifest.policy
    streams = policy.recalls and manifest.plan is None
    if not streams:
        check_no_host_tier(folder, manifest, options)
    on = _on_onnxruntime if manifest.plan is None else _on_tensorrt
    executor, pool = on(folder, manifest, options.cache_tokens, options.n_threads, tell)
    runner = ModelRunner(
        executor,
        pool,
        manifest.programs,
        chunk=options.chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        recall=_recall(manifest, pool, options) if streams else None,
        trace=options.trace,
    )
    return Loaded(
        runner=runner,
        admission=Admission(_demands(manifest, runner)),
        layer_pages=pool.n_pages // manifest.config.n_layers,
        batch=None if manifest.plan is None else max(ranges["B"][2] for ranges in manifest.plan.profiles),
    )


def check_no_host_tier(folder: Path, manifest: Manifest, options: LoadOptions) -> None:
    """``UsageError`` where a cache on the host is described, for an engine that has none."""
    host_tier, host_tokens = options.host_tier, options.host_tokens
    if (host_tier, host_tokens) != (None, None):
        raise UsageError(
            f"{folder} keeps no cache on the host",
            got=f"host_tier={host_tier}, host_tokens={host_tokens} for policy {manifest.policy.name!r}, "
            f"target {manifest.target}",
            expected="neither",
            fix="leave them out, or build an engine with --policy freekv",
        )


def _pool_sizes(manifest: Manifest, cache_tokens: int | None, free_bytes: int) -> dict[str, int]:
    """Sizes of a pool for ``cache_tokens`` tokens in every layer; None: what fits into half of ``free_bytes``."""
    config = manifest.config
    if cache_tokens is None:
        n_bytes = config.n_layers * token_bytes(config, element_bytes=ITEM_BYTES[manifest.dtype])
        cache_tokens = max(1, min(2 * config.max_positions, free_bytes // 2 // n_bytes))
    return {
        "n_pages": config.n_layers * -(-cache_tokens // manifest.page_size),
        "page_size": manifest.page_size,
        "n_kv_heads": config.n_kv_heads,
        "head_size": config.head_dim,
    }


def _demands(manifest: Manifest, runner: ModelRunner) -> list[Demand]:
    """What requests need of the engine's pools."""
    budgets = budgets_of(manifest.programs["prefill"])
    policy = manifest.policy
    if runner.recall is None:
        kept = [ALL] * len(budgets) if policy.recalls else budgets
        return [CacheDemand(runner.pool, budgets=kept, n_protected=policy.sinks + policy.recent)]
    limits = PageLimits(page_size=manifest.page_size, sinks=policy.sinks, recent=policy.recent)
    recalling = recalling_layers(manifest.programs["decode"])
    return [
        WorkingSetDemand(
            runner.pool, limits=[limits if layer in recalling else None for layer in range(len(budgets))], budgets=budgets
        ),
        HostDemand(runner.recall.host, n_layers=len(recalling)),
    ]


def _on_onnxruntime(
    folder: Path, manifest: Manifest, cache_tokens: int | None, n_threads: int, tell: OnProgress
) -> tuple[DenseExecutor | StepExecutor, KvPool]:
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
        n_threads=n_threads,
        on_piece=lambda done, total: tell("opening graphs", done, total),
    )
    return executor, KvPool(**_pool_sizes(manifest, cache_tokens, available_bytes()))


def _recall(manifest: Manifest, device: KvPool, options: LoadOptions) -> StreamedRecall:
    """The cache on the host, and threads that stream it."""
    host_tokens, where = options.host_tokens, options.host_tier or "ram"
    if host_tokens is not None and host_tokens < 1:
        raise UsageError("bad host_tokens", got=host_tokens, expected="tokens >= 1, or None")
    sizes = _pool_sizes(manifest, host_tokens, free_bytes(where))
    n_layers = manifest.config.n_layers
    n_host_layers = len(recalling_layers(manifest.programs["decode"]))
    host = host_tier_at(where, **sizes | {"n_pages": sizes["n_pages"] // n_layers * n_host_layers})
    finds = finds_budgets(manifest.programs["prefill"])
    return StreamedRecall(host, device, ThreadedCopies(), n_layers=n_layers, finds_budgets=finds, trace=options.trace)


def _on_tensorrt(
    folder: Path, manifest: Manifest, cache_tokens: int | None, _n_threads: int, tell: OnProgress
) -> tuple[DenseExecutor | StepExecutor, KvPool]:
    tensorrt_engine = require("trt_kv.runtime.executors.tensorrt_engine")
    assert manifest.plan is not None
    tell("loading the plan", 0, 1)
    executor = tensorrt_engine.TensorRtExecutor(
        folder / manifest.plan.file,
        manifest.plan,
        manifest.programs["prefill"],
        vocab_size=manifest.config.vocab_size,
        n_kv_heads=manifest.config.n_kv_heads,
        dtype=manifest.dtype,
    )
    sizes = _pool_sizes(manifest, cache_tokens, tensorrt_engine.free_device_bytes())
    largest = max(ranges["M"][2] for ranges in manifest.plan.profiles)
    n_query_heads = manifest.config.n_heads if manifest.policy.recalls else 0
    pool = tensorrt_engine.CudaKvPool(
        **sizes | {"n_pages": min(sizes["n_pages"], largest)}, n_query_heads=n_query_heads, dtype=manifest.dtype
    )
    tell("loading the plan", 1, 1)
    return executor, pool
