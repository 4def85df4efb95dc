"""Loads an engine that is a TensorRT plan, on the GPU that it was built for."""

from pathlib import Path

from trt_kv.errors import EngineError, UsageError
from trt_kv.layer_budget import ALL
from trt_kv.manifest import Manifest, Plan
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.program import budgets_of
from trt_kv.runtime.backends.cuda.reservation import LargestStep
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.backends.cuda.store import DeviceKvPool
from trt_kv.runtime.backends.tensorrt.executor import TensorRtExecutor, free_device_bytes
from trt_kv.runtime.cache.draws import draws_of, most_generated
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.loading import (
    Loaded,
    LoadOptions,
    OnProgress,
    check_kv_as_computed,
    check_no_host_tier,
    check_policy_for_devices,
    check_reads_whole_prompts,
    pool_sizes,
)
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import CachePages, Places, Reservation
from trt_kv.safe_path import safe_join


def load(folder: Path, manifest: Manifest, options: LoadOptions, tell: OnProgress) -> Loaded:
    """Load the plan and allocate its pool. If the policy recalls, the whole cache is in the pool.

    ``UsageError`` for options of a host cache, ``EngineError`` for a plan that TensorRT cannot load.
    """
    check_no_host_tier(folder, manifest, options)
    check_reads_whole_prompts(folder, manifest)
    check_policy_for_devices(folder, manifest)
    if options.batch_invariant:
        raise UsageError("a TensorRT plan is not batch-invariant", got="batch_invariant=True", fix="leave it out")
    if options.dense is not None:
        raise UsageError(
            f"TensorRT runs all of {folder}", got=f"the dense layers' library {options.dense!r}", fix="leave it out"
        )
    check_kv_as_computed(folder, manifest, options, manifest.dtype)
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
    sizes = pool_sizes(manifest, options.cache_tokens, free_device_bytes() // 2, kv_dtype=manifest.dtype)
    largest = max(ranges["M"][2] for ranges in plan.profiles)
    n_query_heads = manifest.config.n_heads if policy.recalls else 0
    pool = DeviceKvPool(
        n_pages=min(sizes.n_pages, largest),
        page_size=sizes.page_size,
        n_kv_heads=sizes.n_kv_heads,
        head_size=sizes.head_size,
        n_query_heads=n_query_heads,
        summary_rows=most_rows(manifest.programs["prefill"], sizes.page_size, manifest.dtype),
        dtype=manifest.dtype,
    )
    tell("loading the plan", 1, 1)
    runner = ModelRunner(
        executor,
        pool,
        manifest.programs,
        chunk=chunk_of(plan, options),
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        draws=draws_of(policy),
        trace=options.trace,
    )
    return Loaded(runner=runner, reservation=reservation_of(manifest, plan, pool, options), token_budget=options.token_budget)


def chunk_of(plan: Plan, options: LoadOptions) -> int:
    """Prompt tokens per step: those of the options, but no more than the plan admits in a step of one sequence."""
    return min(options.chunk, max(ranges["N"][2] for ranges in plan.profiles if ranges["B"][0] == 1))


def reservation_of(manifest: Manifest, plan: Plan, pool: PagePool, options: LoadOptions) -> Reservation:
    """Requests reserve pages and places in the plan's largest batch, and may be as long as its page tables."""
    policy, budgets = manifest.applied_policy, budgets_of(manifest.programs["prefill"])
    kept = [ALL] * len(budgets) if policy.recalls else budgets
    largest, how_to_enlarge = StepSizes.largest(plan.profiles), "build with a PROFILE of"
    places = Places(min(largest.n_sequences, options.max_sequences or largest.n_sequences), f"{how_to_enlarge} more sequences")
    pages = CachePages(
        pool,
        budgets=kept,
        n_protected=policy.sinks + policy.recent,
        windows=manifest.windows,
        chunk=chunk_of(plan, options),
        most_generated=most_generated(policy, pool.page_size),
    )
    length = LargestStep(
        largest, page_size=pool.page_size, most_held=pages.most_in_any_layer, how_to_enlarge=f"{how_to_enlarge} longer contexts"
    )
    return Reservation([places, pages], [length])
