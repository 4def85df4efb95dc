"""Which requests may start: those that can be served to their end, whatever else is running."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from trt_kv.errors import CapacityError
from trt_kv.layer_budget import LayerBudget
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.page_pool import PagePool
from trt_kv.runtime.recall.layer_streams import staging_slots
from trt_kv.runtime.request import Request


class Demand(Protocol):
    """What requests need of one pool at their worst moment."""

    pool: PagePool
    n_layers: int
    """Layers whose pages come from the pool."""
    option: str
    """The option of ``Engine.load`` that makes the pool larger; it counts tokens per layer."""

    def pages(self, requests: Sequence[Request]) -> int:
        """Pages at the worst moment, prompts being read one after the other, then all decoded together."""
        ...


class Admission:
    """Promises pages of pools to groups of requests; a promise counts at its largest until the group ends."""

    def __init__(self, demands: Sequence[Demand]) -> None:
        self._demands = demands
        self._promised: list[Sequence[Request]] = []

    def check(self, requests: Sequence[Request]) -> None:
        """``CapacityError`` unless ``requests`` can be served to their end beside everything that is running."""
        for demand in self._demands:
            pool = demand.pool
            needed = demand.pages(requests)
            outstanding = sum(demand.pages(group) - _pages_owned(group, pool) for group in self._promised)
            available = pool.n_free - outstanding
            if needed > available:
                raise CapacityError(
                    f"{pool.name} is too small for this request",
                    got=f"room for {_tokens(demand, available)} more tokens per layer",
                    expected=f"room for {_tokens(demand, needed)}",
                    fix=f"load the engine with {demand.option}={_tokens(demand, pool.n_pages + needed - available)} or more, "
                    "or send shorter or fewer prompts at once",
                )

    @contextlib.contextmanager
    def promise(self, requests: Sequence[Request]) -> Iterator[None]:
        """Keep pages for ``requests`` inside the block; ``CapacityError`` where ``check`` raises it."""
        self.check(requests)
        try:
            self._promised.append(requests)
            yield
        finally:
            self._promised = [other for other in self._promised if other is not requests]


class CacheDemand:
    """Whole caches in one pool: a prompt is read whole in every layer, then each layer shrinks to its budget and grows."""

    option = "cache_tokens"

    def __init__(self, pool: PagePool, *, budgets: Sequence[LayerBudget | None], n_protected: int) -> None:
        """``budgets``: of each layer, None where it is found from the input, which may turn out to need everything.

        ``n_protected`` tokens of each layer are kept whatever its budget.
        """
        self.pool = pool
        self.n_layers = len(budgets)
        self._budgets = budgets
        self._n_protected = n_protected

    def pages(self, requests: Sequence[Request]) -> int:
        settled = most = 0
        for request in requests:
            n_prompt = len(request.prompt_ids)
            most = max(most, settled + self.n_layers * _pages(n_prompt, self.pool))
            settled += sum(_pages(self._kept_at_most(n_prompt, budget) + request.limit, self.pool) for budget in self._budgets)
        return max(most, settled)

    def _kept_at_most(self, n_prompt: int, budget: LayerBudget | None) -> int:
        return n_prompt if budget is None else min(budget.of(n_prompt) + self._n_protected, n_prompt)


class HostDemand:
    """The host tier: every token of the layers whose cache stays there."""

    option = "host_tokens"

    def __init__(self, pool: PagePool, *, n_layers: int) -> None:
        self.pool = pool
        self.n_layers = n_layers

    def pages(self, requests: Sequence[Request]) -> int:
        return sum(self.n_layers * _pages(len(request.prompt_ids) + request.limit, self.pool) for request in requests)


class WorkingSetDemand:
    """The device beside a host tier: working sets, and whole caches of the layers that stay on the device."""

    option = "cache_tokens"

    def __init__(self, pool: PagePool, *, limits: Sequence[PageLimits | None], budgets: Sequence[LayerBudget | None]) -> None:
        """``limits``: of each layer, None where its cache stays on the device; ``budgets`` as the graph has them."""
        self.pool = pool
        self.n_layers = len(limits)
        self._layers = list(zip(limits, budgets, strict=True))

    def pages(self, requests: Sequence[Request]) -> int:
        return sum(self._of_layer(request, *layer) for request in requests for layer in self._layers)

    def _of_layer(self, request: Request, limits: PageLimits | None, budget: LayerBudget | None) -> int:
        n_prompt = len(request.prompt_ids)
        n_most = _pages(n_prompt + request.limit, self.pool)
        if limits is None:
            return n_most
        n_tokens = n_prompt if budget is None else budget.of_prompt(n_prompt)
        n_chosen = min(limits.n_chosen(n_tokens), n_most)
        return limits.n_sinks + limits.n_newest + n_chosen + staging_slots(n_chosen)


def _pages_owned(requests: Sequence[Request], pool: PagePool) -> int:
    return sum(len(request.sequence.pages_in(pool)) for request in requests)


def _pages(n_tokens: int, pool: PagePool) -> int:
    return -(-n_tokens // pool.page_size)


def _tokens(demand: Demand, n_pages: int) -> int:
    """Tokens in every layer that ``n_pages`` are enough for."""
    return -(-n_pages // demand.n_layers) * demand.pool.page_size
