"""Loads an engine that is a TensorRT plan, on the GPU that it was built for."""

from pathlib import Path

from trt_kv.errors import EngineError
from trt_kv.layer_budget import ALL
from trt_kv.manifest import Manifest
from trt_kv.program import budgets_of
from trt_kv.runtime.backends.cuda.store import DeviceKvPool
from trt_kv.runtime.backends.tensorrt.executor import TensorRtExecutor, free_device_bytes
from trt_kv.runtime.loading import Loaded, LoadOptions, OnProgress, check_no_host_tier, pool_sizes
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import CachePages, Places, Reservation
from trt_kv.safe_path import safe_join


def load(folder: Path, manifest: Manifest, options: LoadOptions, tell: OnProgress) -> Loaded:
    """Load the plan and allocate its pool. If the policy recalls, the whole cache is in the pool.

    ``UsageError`` for options of a host cache, ``EngineError`` for a plan that TensorRT cannot load.
    """
    check_no_host_tier(folder, manifest, options)
    plan, policy = manifest.plan, manifest.applied_policy
    assert plan is not None
    tell("loading the plan", 0, 1)
    executor = TensorRtExecutor(
        safe_join(folder, plan.file, error=EngineError),
        plan,
        manifest.programs["prefill"],
        vocab_size=manifest.config.vocab_size,
        n_kv_heads=manifest.config.n_kv_heads,
        dtype=manifest.dtype,
    )
    sizes = pool_sizes(manifest, options.cache_tokens, free_device_bytes() // 2)
    largest = max(ranges["M"][2] for ranges in plan.profiles)
    n_query_heads = manifest.config.n_heads if policy.recalls else 0
    pool = DeviceKvPool(
        n_pages=min(sizes.n_pages, largest),
        page_size=sizes.page_size,
        n_kv_heads=sizes.n_kv_heads,
        head_size=sizes.head_size,
        n_query_heads=n_query_heads,
        dtype=manifest.dtype,
    )
    tell("loading the plan", 1, 1)
    runner = ModelRunner(
        executor,
        pool,
        manifest.programs,
        chunk=options.chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        trace=options.trace,
    )
    budgets = budgets_of(manifest.programs["prefill"])
    kept = [ALL] * len(budgets) if policy.recalls else budgets
    most = max(ranges["B"][2] for ranges in plan.profiles)
    places = Places(min(most, options.max_sequences or most), "build with a PROFILE of more sequences")
    n_protected = policy.sinks + policy.recent
    pages = CachePages(pool, budgets=kept, n_protected=n_protected, windows=manifest.windows, chunk=options.chunk)
    return Loaded(runner=runner, reservation=Reservation([places, pages]), token_budget=options.token_budget)
