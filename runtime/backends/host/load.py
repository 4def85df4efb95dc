"""Loads an engine on the CPU: ONNX Runtime and host kernels; if the policy recalls, a cache in RAM or in a file."""

import dataclasses
import mmap
from functools import partial
from pathlib import Path

from trt_kv.beside import beside
from trt_kv.errors import CapacityError, UsageError, load_option
from trt_kv.kv_memory import token_bytes
from trt_kv.manifest import Manifest
from trt_kv.plugins.kv_rows import converts_halves
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.program import finds_budgets, recalling_layers
from trt_kv.runtime.backends.host.dense import open_dense
from trt_kv.runtime.backends.host.executor import warm_up_kernels
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import MemoryTier, RecallInPlace
from trt_kv.runtime.backends.host.recall.store import free_on_disk, host_tier_at
from trt_kv.runtime.backends.host.reservation import host_resources
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.draws import draws_of
from trt_kv.runtime.cache.kv_pool import PoolSizes
from trt_kv.runtime.cpus import threads_for
from trt_kv.runtime.loading import MAX_SEQUENCES, Loaded, LoadOptions, OnProgress, check_no_host_tier, pool_sizes
from trt_kv.runtime.memory import available_bytes, free_for_cache
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.processes import will_compute
from trt_kv.runtime.reservation import Places, Reservation, Resource

_ROOM_FOR_THREADS = 64 * 2**20
"""Bytes of address space that kernels' threads and sessions need at once, at the least."""


def load(folder: Path, manifest: Manifest, options: LoadOptions, tell: OnProgress) -> Loaded:
    """Load an engine for ONNX Runtime on the CPU.

    ``UsageError`` for an engine in a dtype other than float32, and for options of a host cache if the policy does not recall.
    """
    policy = manifest.applied_policy
    if not policy.recalls:
        check_no_host_tier(folder, manifest, options)
    if manifest.dtype != "float32":
        raise UsageError(
            f"{folder} was built for GPUs",
            got=f"graphs in {manifest.dtype}",
            expected="float32 on a host",
            fix=f"load it with {load_option('device', 'cuda')}, or build it again without --dtype",
        )
    if (options.kv_dtype or manifest.kv_dtype) == "float16" and not converts_halves():
        raise UsageError(
            "this processor has no instructions for float16",
            got="float16 as the type of the KV cache",
            fix=f"use {load_option('kv_dtype', 'bfloat16')}, which takes as much memory",
        )
    # OpenMP ends the process if it cannot start a thread: better an error, which this raises.
    mmap.mmap(-1, _ROOM_FOR_THREADS).close()
    will_compute()
    with beside(partial(open_dense, folder, manifest, options), partial(tell, "opening graphs")) as opening:
        warm_up_kernels(manifest.programs, "cpu", options.kv_dtype or manifest.kv_dtype)
        dense = opening.result()
    mapped = sum(record.n_bytes for name, record in manifest.files.items() if name.endswith(".data"))
    pool, recall = _memory(manifest, options, free_for_cache(mapped))
    runner = host_runner(
        dense,
        pool,
        manifest.programs,
        n_threads=threads_for(options.n_threads),
        chunk=options.chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        reading_reserve=policy.reading_reserve,
        draws=draws_of(policy),
        recall=recall,
        trace=options.trace,
    )
    places = Places(options.max_sequences or MAX_SEQUENCES)
    return Loaded(
        runner=runner,
        reservation=Reservation([places, *_pages(manifest, runner, options.chunk)]),
        token_budget=options.token_budget,
    )


def _memory(manifest: Manifest, options: LoadOptions, n_free: int) -> tuple[HostKvPool, StreamedRecall | RecallInPlace | None]:
    """The pool, and if the policy recalls, the host tier: in memory it is read in place, from a file threads copy pages.

    A size that is not given in tokens is half of the free memory or disk: first the tier, then the pool, of the memory that the
    tier leaves.
    """
    if not manifest.applied_policy.recalls:
        return _pool(manifest, options, n_free), None
    host_tokens, where = options.host_tokens, options.host_tier or "ram"
    n_layers, n_host_layers = manifest.cache_config.n_layers, len(recalling_layers(manifest.programs["decode"]))
    on_disk = free_on_disk(where)
    if options.cache_tokens is not None:
        n_free -= _n_bytes(manifest, _sizes(manifest, options, options.cache_tokens, 0))
    n_bytes = max(0, n_free if on_disk is None else on_disk) // 2
    whole = _sizes(manifest, options, host_tokens, n_bytes)
    n_pages = whole.n_pages // n_layers * n_host_layers
    if on_disk is None and host_tokens is not None:
        _check_free("host_tokens", _n_bytes(manifest, dataclasses.replace(whole, n_pages=n_pages)), available_bytes())
    sizes = dataclasses.asdict(whole) | {"n_pages": n_pages}
    n_rows = most_rows(manifest.programs["decode"], manifest.page_size, whole.dtype)
    if on_disk is None:
        tier = MemoryTier(**sizes)
        pool = _pool(manifest, options, max(0, n_free - tier.n_pages * tier.page_bytes))
        n_heads = manifest.config.n_heads
        recall = RecallInPlace(tier, pool, n_layers=n_layers, n_query_heads=n_heads, summary_rows=n_rows, trace=options.trace)
        return pool, recall
    host = host_tier_at(where, **sizes)
    pool = _pool(manifest, options, n_free)
    finds = finds_budgets(manifest.programs["prefill"])
    streamed = StreamedRecall(
        *(host, pool, ThreadedCopies()), n_layers=n_layers, finds_budgets=finds, summary_rows=n_rows, trace=options.trace
    )
    return pool, streamed


def _sizes(manifest: Manifest, options: LoadOptions, n_tokens: int | None, n_bytes: int) -> PoolSizes:
    """``pool_sizes`` in the type of the options, or that of the engine."""
    return pool_sizes(manifest, n_tokens, n_bytes, kv_dtype=options.kv_dtype or manifest.kv_dtype)


def _pool(manifest: Manifest, options: LoadOptions, n_free: int) -> HostKvPool:
    """The pool: of ``cache_tokens``, or of half of ``n_free`` bytes."""
    sizes = _sizes(manifest, options, options.cache_tokens, n_free // 2)
    if options.cache_tokens is not None:
        _check_free("cache_tokens", _n_bytes(manifest, sizes), available_bytes())
    return HostKvPool(**dataclasses.asdict(sizes))


def _check_free(option: str, n_bytes: int, n_free: int) -> None:
    """``CapacityError`` for memory that is not there: it would be reserved, and the process killed as it is used."""
    if n_bytes > n_free:
        raise CapacityError(
            f"the machine has too little memory for {option}",
            got=f"{n_bytes / 2**30:.1f} GiB",
            expected=f"at most {n_free / 2**30:.1f} GiB, which are free",
            fix=f"lower {option}, or leave it out for what fits",
        )


def _n_bytes(manifest: Manifest, sizes: PoolSizes) -> int:
    return sizes.n_pages * sizes.page_size * token_bytes(manifest.cache_config, sizes.dtype)


def _pages(manifest: Manifest, runner: ModelRunner, chunk: int) -> list[Resource]:
    """The resources that requests reserve in the engine's pools."""
    tiers = runner.tiers
    return host_resources(
        manifest.applied_policy,
        manifest.programs,
        runner.pool,
        None if tiers is None else tiers.host,
        in_place=isinstance(tiers, RecallInPlace),
        chunk=chunk,
    )
