"""Which requests may start: those that can be served to their end, whatever else is running."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from trt_kv.errors import CapacityError
from trt_kv.layer_budget import LayerBudget
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.request import Request


class Demand(Protocol):
    """What requests need of something that there is a limited number of: pages of a pool, or working sets."""

    @property
    def n_free(self) -> int:
        """How many nobody has."""
        ...

    def needed(self, requests: Sequence[Request]) -> int:
        """How many at the worst moment, prompts being read one after the other, then all decoded together."""
        ...

    def owned(self, requests: Sequence[Request]) -> int:
        """How many of these the requests have already."""
        ...

    def refusal(self, needed: int, available: int) -> CapacityError:
        """What to tell who needs more than are available."""
        ...


class Limit(Protocol):
    """What a group of requests must not exceed, whatever else is running."""

    def check(self, requests: Sequence[Request]) -> None:
        """``CapacityError`` where it does."""
        ...


class Admission:
    """Promises what requests demand to groups of them; a promise counts at its largest until the group ends."""

    def __init__(self, demands: Sequence[Demand], limits: Sequence[Limit] = ()) -> None:
        self._demands = demands
        self._limits = limits
        self._promised: list[Sequence[Request]] = []

    def check(self, requests: Sequence[Request]) -> None:
        """``CapacityError`` unless ``requests`` can be served to their end beside everything that is running."""
        for limit in self._limits:
            limit.check(requests)
        for demand in self._demands:
            needed = demand.needed(requests)
            outstanding = sum(demand.needed(group) - demand.owned(group) for group in self._promised)
            available = demand.n_free - outstanding
            if needed > available:
                raise demand.refusal(needed, available)

    @contextlib.contextmanager
    def promise(self, requests: Sequence[Request]) -> Iterator[None]:
        """Keep what ``requests`` need inside the block; ``CapacityError`` where ``check`` raises it."""
        self.check(requests)
        try:
            self._promised.append(requests)
            yield
        finally:
            self._promised = [other for other in self._promised if other is not requests]


class PageDemand:
    """Pages of one pool, taken by ``n_layers`` layers; ``option`` of ``Engine.load`` makes it larger, in tokens per layer."""

    option = "cache_tokens"

    def __init__(self, pool: PagePool, *, n_layers: int) -> None:
        self.pool = pool
        self.n_layers = n_layers

    @property
    def n_free(self) -> int:
        return self.pool.n_free

    def needed(self, requests: Sequence[Request]) -> int:
        """See ``Demand``."""
        raise NotImplementedError

    def owned(self, requests: Sequence[Request]) -> int:
        return sum(len(request.sequence.pages_in(self.pool)) for request in requests)

    def refusal(self, needed: int, available: int) -> CapacityError:
        return CapacityError(
            f"{self.pool.name} is too small for this request",
            got=f"room for {self._tokens(available)} more tokens per layer",
            expected=f"room for {self._tokens(needed)}",
            fix=f"load the engine with {self.option}={self._tokens(self.pool.n_pages + needed - available)} or more, "
            "or send shorter or fewer prompts at once",
        )

    def _tokens(self, n_pages: int) -> int:
        """Tokens in every layer that ``n_pages`` are enough for."""
        return -(-n_pages // self.n_layers) * self.pool.page_size


class CacheDemand(PageDemand):
    """Whole caches in one pool: a prompt is read whole in every layer, then each layer shrinks to its budget and grows."""

    def __init__(self, pool: PagePool, *, budgets: Sequence[LayerBudget | None], n_protected: int) -> None:
        """``budgets``: of each layer, None where it is found from the input, which may turn out to need everything.

        ``n_protected`` tokens of each layer are kept whatever its budget.
        """
        super().__init__(pool, n_layers=len(budgets))
        self._budgets = budgets
        self._n_protected = n_protected

    def needed(self, requests: Sequence[Request]) -> int:
        settled = most = 0
        for request in requests:
            n_prompt = len(request.prompt_ids)
            most = max(most, settled + self.n_layers * _pages(n_prompt, self.pool))
            settled += sum(_pages(self._kept_at_most(n_prompt, budget) + request.limit, self.pool) for budget in self._budgets)
        return max(most, settled)

    def kept_in_any_layer(self, n_prompt: int) -> int:
        """The most tokens of a prompt that a layer keeps once it has been read."""
        return max(self._kept_at_most(n_prompt, budget) for budget in self._budgets)

    def _kept_at_most(self, n_prompt: int, budget: LayerBudget | None) -> int:
        return n_prompt if budget is None else min(budget.of(n_prompt) + self._n_protected, n_prompt)


class HostDemand(PageDemand):
    """The host tier: every token of the layers whose cache stays there."""

    option = "host_tokens"

    def needed(self, requests: Sequence[Request]) -> int:
        return sum(self.n_layers * _pages(len(request.prompt_ids) + request.limit, self.pool) for request in requests)


class WorkingSetDemand(PageDemand):
    """The device beside a host tier: working sets, and whole caches of the layers that stay on the device."""

    def __init__(self, pool: PagePool, *, limits: Sequence[PageLimits | None], budgets: Sequence[LayerBudget | None]) -> None:
        """``limits``: of each layer, None where its cache stays on the device; ``budgets`` as the graph has them."""
        super().__init__(pool, n_layers=len(limits))
        self._layers = list(zip(limits, budgets, strict=True))

    def needed(self, requests: Sequence[Request]) -> int:
        return sum(self._of_layer(request, *layer) for request in requests for layer in self._layers)

    def _of_layer(self, request: Request, limits: PageLimits | None, budget: LayerBudget | None) -> int:
        n_prompt = len(request.prompt_ids)
        n_most = _pages(n_prompt + request.limit, self.pool)
        if limits is None:
            return n_most
        n_tokens = n_prompt if budget is None else budget.of_prompt(n_prompt)
        n_chosen = min(limits.n_chosen(n_tokens), n_most)
        return limits.n_sinks + limits.n_newest + n_chosen + staging_slots(n_chosen)


def _pages(n_tokens: int, pool: PagePool) -> int:
    return -(-n_tokens // pool.page_size)
