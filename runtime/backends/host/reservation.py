"""What requests reserve in the pools of an engine on the host, and how many bytes that is before any pool exists.

``trt-kv advise`` asks the same code as admission does, so that its figures are those by which requests are admitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trt_kv.kv_memory import recall_row_bytes, token_bytes
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.recall_attention.page_counts import PageLimits, most_rows
from trt_kv.policy import Policy
from trt_kv.program import Program, budgets_of, recalling_layers, windows_of
from trt_kv.runtime.cache.draws import most_generated
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.model_runner import DEFAULT_CHUNK
from trt_kv.runtime.reservation import CachePages, HostPages, RequestSize, Resource, WorkingSetPages


def host_resources(
    policy: Policy,
    programs: Mapping[str, Program],
    pool: PagePool,
    tier: PagePool | None,
    *,
    in_place: bool,
    chunk: int,
) -> list[Resource]:
    """The resources of ``pool`` and, if the policy recalls, of the host ``tier``.

    ``policy``: as it applies to the model. ``in_place``: attention reads the tier where it is, so that ``pool`` holds only the
    layers that do not recall. ``chunk``: prompt tokens that are read in one step.
    """
    budgets, windows = budgets_of(programs["prefill"]), windows_of(programs["decode"])
    if tier is None:
        pages = CachePages(
            pool,
            budgets=budgets,
            n_protected=policy.sinks + policy.recent,
            windows=windows,
            chunk=chunk,
            reserve=policy.reading_reserve,
            most_generated=most_generated(policy, pool.page_size),
        )
        return [pages]
    recalling = recalling_layers(programs["decode"])
    host = HostPages(tier, n_layers=len(recalling))
    if in_place:
        others = [layer for layer in range(len(budgets)) if layer not in recalling]
        whole = CachePages(
            pool,
            budgets=[None] * len(others),
            n_protected=0,
            windows=[windows[layer] for layer in others],
            chunk=chunk,
            n_layers=len(budgets),
            layers=others,
        )
        return [whole, host]
    limits = PageLimits(page_size=pool.page_size, sinks=policy.sinks, recent=policy.recent)
    of_layers = [limits if layer in recalling else None for layer in range(len(budgets))]
    return [WorkingSetPages(pool, limits=of_layers, budgets=budgets, windows=windows, chunk=chunk), host]


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Pages that requests reserve, and their bytes: in the pool, and in a host tier in memory (0 if there is none)."""

    pool_pages: int
    pool_bytes: int
    tier_pages: int
    tier_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.pool_bytes + self.tier_bytes


class HostSizing:
    """Sizes of the caches of a model on the host, from its config and the policy's programs alone.

    A cache on the host is in memory, where attention reads it in place.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        programs: Mapping[str, Program],
        *,
        page_size: int,
        kv_dtype: str,
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        """``policy``: as it applies to the model. ``programs``: per phase; see ``program_of_model``."""
        self.config = config
        self.page_size = page_size
        self.page_bytes = page_size * token_bytes(config, kv_dtype)
        n_rows = most_rows(programs["decode"], page_size, kv_dtype)
        self.tier_page_bytes = self.page_bytes + recall_row_bytes(config, kv_dtype, n_rows)
        self._n_host_layers = len(recalling_layers(programs["decode"]))
        pools = [PagePool(n_pages=1, page_size=page_size) for _ in range(2)]
        tier = pools[1] if self._n_host_layers else None
        self._resources = host_resources(policy, programs, pools[0], tier, in_place=True, chunk=chunk)

    def of(self, size: RequestSize, n_requests: int = 1) -> CacheSizes:
        """The most that ``n_requests`` of one size reserve together: one reads its prompt while the others decode."""
        pages = [resource.while_reading(size) + (n_requests - 1) * resource.after_reading(size) for resource in self._resources]
        return self._sizes(pages)

    def after_reading(self, size: RequestSize, n_requests: int = 1) -> CacheSizes:
        """The most that they reserve when all prompts have been read."""
        return self._sizes([n_requests * resource.after_reading(size) for resource in self._resources])

    def options(self, sizes: CacheSizes) -> dict[str, int]:
        """The least ``cache_tokens``, and ``host_tokens`` if there is a tier, that ``Engine.load`` needs for ``sizes``.

        A pool has the same number of pages for each layer.
        """
        per_layer = max(1, -(-sizes.pool_pages // self.config.n_layers))
        options = {"cache_tokens": per_layer * self.page_size}
        if self._n_host_layers:
            options["host_tokens"] = -(-sizes.tier_pages // self._n_host_layers) * self.page_size
        return options

    def _sizes(self, pages: Sequence[int]) -> CacheSizes:
        pool_pages, tier_pages = pages[0], pages[1] if len(pages) > 1 else 0
        return CacheSizes(
            pool_pages=pool_pages,
            pool_bytes=pool_pages * self.page_bytes,
            tier_pages=tier_pages,
            tier_bytes=tier_pages * self.tier_page_bytes,
        )
