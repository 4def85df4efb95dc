"""Makes the prefix cache of an engine that has been opened."""

import hashlib
import json
import math
import shutil
from pathlib import Path

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

from trt_kv import __version__
from trt_kv.errors import UsageError
from trt_kv.manifest import Manifest
from trt_kv.runtime.cpus import threads_for
from trt_kv.runtime.loading import LoadOptions
from trt_kv.runtime.memory import available_bytes
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.prefix.cache import PrefixCache
from trt_kv.runtime.prefix.store import PrefixStore

MEMORY_SHARE = 8
"""The cache may use one of so many parts of the memory that is free when the engine is loaded, unless it is told how much."""
DISK_SHARE = 2
"""The store may use one of so many parts of the free disk, besides what it uses already."""


def open_prefixes(manifest: Manifest, runner: ModelRunner, options: LoadOptions) -> PrefixCache | None:
    """The prefix cache of an engine; None if the policy evicts while a prompt is read: what is left of its beginning depends on
    its length. ``UsageError`` for options of a cache then, or if its files cannot be written.
    """
    capacity = options.prefix_bytes
    if manifest.applied_policy.reading_reserve is not None:
        if (capacity, options.prefix_store) != (None, None):
            raise UsageError(
                "an engine that evicts while it reads cannot reuse prefixes",
                got=f"prefix_bytes={capacity}, prefix_store={options.prefix_store} for policy {manifest.policy.name!r}",
                expected="neither",
                fix="leave them out, or build the engine without evict=while_reading",
            )
        return None
    return PrefixCache(
        runner.blocks,
        block_tokens=math.lcm(runner.chunk, runner.pool.page_size),
        capacity_bytes=available_bytes() // MEMORY_SHARE if capacity is None else capacity,
        fingerprint=_fingerprint(manifest, runner, options),
        store=None if options.prefix_store is None else _open_store(Path(options.prefix_store).expanduser()),
        engine=manifest.to_json()["digest"],
        policy=manifest.policy.name,
    )


def _open_store(path: Path) -> PrefixStore:
    store = PrefixStore(path)
    store.capacity_bytes = store.used_bytes + shutil.disk_usage(path).free // DISK_SHARE
    return store


def _fingerprint(manifest: Manifest, runner: ModelRunner, options: LoadOptions) -> str:
    """The digest of all that the bits of a block depend on, except its tokens."""
    what = {
        "engine": manifest.to_json()["digest"],
        "version": __version__,
        "stored as": runner.pool.kv_dtype,
        "chunk": runner.chunk,
        "computed by": runner.description,
        "threads": threads_for(options.n_threads),
        "processor": [get_host_cpu_name(), str(get_host_cpu_features())],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
