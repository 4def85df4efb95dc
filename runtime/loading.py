"""Options for loading an engine, and the result of every backend's ``load``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import UsageError, load_option
from trt_kv.kv_memory import token_bytes
from trt_kv.manifest import KV_DTYPES, Manifest
from trt_kv.runtime.arguments import is_integer
from trt_kv.runtime.backends.devices import check_host_dense
from trt_kv.runtime.cache.kv_pool import PoolSizes
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner
from trt_kv.runtime.prefix.cache import PrefixCache
from trt_kv.runtime.reservation import Reservation
from trt_kv.runtime.trace import NO_TRACE, Trace

MAX_SEQUENCES = 256
"""Default limit of sequences that run at once."""

OnProgress = Callable[[str, int, int], None]
"""Progress callback, called with (stage, done, total)."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for loading an engine; see ``Engine.load``. ``dense`` and ``precision`` are those of a host."""

    cache_tokens: int | None = None
    host_tier: str | None = None
    host_tokens: int | None = None
    chunk: int = DEFAULT_CHUNK
    token_budget: int | None = None
    max_sequences: int | None = None
    n_threads: int = 0
    batch_invariant: bool | None = None
    dense: str | None = None
    precision: str | None = None
    kv_dtype: str | None = None
    prefix_cache: bool = True
    prefix_bytes: int | None = None
    prefix_store: str | None = None
    trace: Trace = NO_TRACE

    def __post_init__(self) -> None:
        for name, expected in (
            ("cache_tokens", "tokens >= 1, or None"),
            ("host_tokens", "tokens >= 1, or None"),
            ("chunk", "tokens >= 1"),
            ("token_budget", "tokens >= 1, or None"),
            ("max_sequences", "an integer >= 1, or None"),
            ("n_threads", "threads >= 1, or 0: one per CPU"),
            ("prefix_bytes", "bytes >= 1, or None"),
        ):
            got = getattr(self, name)
            if not ((got is None and expected.endswith("or None")) or is_integer(got, 0 if name == "n_threads" else 1)):
                raise UsageError(f"bad {name}", got=repr(got), expected=expected)
        if not isinstance(self.batch_invariant, bool | None):
            raise UsageError("bad batch_invariant", got=repr(self.batch_invariant), expected="True, False or None")
        check_host_dense(self.dense, self.precision)
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise UsageError("bad kv_dtype", got=repr(self.kv_dtype), expected=f"{', '.join(KV_DTYPES)}, or None")
        if not isinstance(self.prefix_cache, bool):
            raise UsageError("bad prefix_cache", got=repr(self.prefix_cache), expected="True or False")
        if not isinstance(self.prefix_store, str | None) or self.prefix_store == "":
            raise UsageError("bad prefix_store", got=repr(self.prefix_store), expected="the path of a folder, or None")
        if not self.prefix_cache and (self.prefix_bytes, self.prefix_store) != (None, None):
            raise UsageError(
                "the prefix cache is off",
                got=f"prefix_bytes={self.prefix_bytes}, prefix_store={self.prefix_store}",
                expected="neither, with prefix_cache=False",
            )
        if not isinstance(self.host_tier, str | None):
            raise UsageError("bad host_tier", got=repr(self.host_tier), expected="ram, or file:/path/of/a/new/file")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded engine: what runs its steps, and the reservation that admits its requests."""

    runner: ModelRunner
    reservation: Reservation
    token_budget: int | None = None
    """Prompt tokens that may be processed between two decode steps; None: one chunk."""
    prefixes: PrefixCache | None = None
    """What prompts have in common; None: the prefix cache is off."""


def check_no_host_tier(folder: Path, manifest: Manifest, options: LoadOptions) -> None:
    """``UsageError`` if options for a host cache are given; for engines that have none."""
    host_tier, host_tokens = options.host_tier, options.host_tokens
    if (host_tier, host_tokens) != (None, None):
        raise UsageError(
            f"{folder} keeps no cache on the host",
            got=f"host_tier={host_tier}, host_tokens={host_tokens} for policy {manifest.policy.name!r}, "
            f"target {manifest.target}",
            expected="neither",
            fix="leave them out, or build an engine with --policy freekv",
        )


def check_reads_whole_prompts(folder: Path, manifest: Manifest) -> None:
    """``UsageError`` for an engine that evicts while it reads; for devices that cannot."""
    if manifest.applied_policy.reading_reserve is not None:
        raise UsageError(
            f"{folder} evicts while it reads a prompt, which runs on a CPU only",
            got=f"policy {manifest.policy.name!r} with evict=while_reading",
            fix="use the device cpu, or build the engine without evict",
        )


def check_policy_for_devices(folder: Path, manifest: Manifest) -> None:
    """``UsageError`` for an engine whose KV heads have budgets of their own, as devices have one per layer, or whose scores are
    predicted, for which there are no kernels.
    """
    if manifest.heads_apart > 1:
        raise UsageError(
            f"{folder} has a budget for each KV head, which runs on a CPU only",
            got=f"policy {manifest.policy.name!r} with heads=own",
            expected="heads shared or each",
            fix="use the device cpu, or build the engine with --set heads=each",
        )
    if manifest.applied_policy.scoring.predicts:
        raise UsageError(
            f"{folder} predicts scores, which runs on a CPU only",
            got=f"policy {manifest.policy.name!r} with score {manifest.policy.score}",
            expected="another score",
            fix="use the device cpu, or build the engine with another policy",
        )


def check_kv_as_computed(folder: Path, manifest: Manifest, options: LoadOptions, dtype: str) -> None:
    """``UsageError`` if keys and values are to be stored in another type than ``dtype``, in which a GPU computes."""
    built = manifest.kv_dtype if manifest.kv_dtype != manifest.dtype else dtype
    wanted = options.kv_dtype or built
    if wanted != dtype:
        asked = "asked for" if options.kv_dtype else f"which {folder} was built with"
        raise UsageError(
            "on a GPU the KV cache is stored in the type of the computation",
            got=f"{wanted}, {asked}",
            expected=dtype,
            fix=f"use {load_option('kv_dtype', dtype)}, or the device cpu, which stores any of {', '.join(KV_DTYPES)}",
        )


def pool_sizes(manifest: Manifest, cache_tokens: int | None, n_bytes: int, *, kv_dtype: str) -> PoolSizes:
    """Sizes of a pool for ``cache_tokens`` tokens in every layer, stored as ``kv_dtype``. None: as many as fit into
    ``n_bytes``, at most twice the model's maximum positions, and what a working set takes besides: sinks and newest tokens
    in whole pages.

    Layers with an attention window take part as if they had none: the pages that they do not need serve the others.
    """
    config, policy = manifest.cache_config, manifest.applied_policy
    if cache_tokens is None:
        bytes_per_token = config.n_layers * token_bytes(config, kv_dtype)
        besides = policy.sinks + policy.recent + 4 * manifest.page_size if policy.recalls else 0
        cache_tokens = max(1, min(2 * config.max_positions + besides, n_bytes // bytes_per_token))
    return PoolSizes(
        n_pages=config.n_layers * -(-cache_tokens // manifest.page_size),
        page_size=manifest.page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        dtype=kv_dtype,
    )
