"""Which requests may start: those that can be served to their end, whatever else is running."""

import contextlib
from collections.abc import Iterator, Sequence

from trt_kv.errors import CapacityError
from trt_kv.layer_budget import LayerBudget
from trt_kv.runtime.kv_pool import KvPool
from trt_kv.runtime.request import Request


class Admission:
    """Promises pages of a pool to groups of requests; a promise counts at its largest until the group ends."""

    def __init__(self, pool: KvPool, *, budgets: Sequence[LayerBudget | None], n_protected: int) -> None:
        """``budgets``: of each layer, None where it is found from the input, which may turn out to need everything.

        ``n_protected`` tokens of each layer are kept whatever its budget.
        """
        self._pool = pool
        self._budgets = budgets
        self._n_protected = n_protected
        self._promised: list[tuple[int, Sequence[Request]]] = []

    def check(self, requests: Sequence[Request]) -> None:
        """``CapacityError`` unless ``requests`` can be served to their end beside everything that is running."""
        needed = self._pages_needed(requests)
        outstanding = sum(promised - _pages_owned(group) for promised, group in self._promised)
        available = self._pool.n_free - outstanding
        if needed > available:
            raise CapacityError(
                "the KV pool is too small for this request",
                got=f"room for {self._tokens(available)} more tokens per layer",
                expected=f"room for {self._tokens(needed)}",
                fix=f"load the engine with cache_tokens={self._tokens(self._pool.n_pages + needed - available)} or more, "
                "or send shorter or fewer prompts at once",
            )

    @contextlib.contextmanager
    def promise(self, requests: Sequence[Request]) -> Iterator[None]:
        """Keep pages for ``requests`` inside the block; ``CapacityError`` where ``check`` raises it."""
        self.check(requests)
        promise = (self._pages_needed(requests), requests)
        try:
            self._promised.append(promise)
            yield
        finally:
            self._promised = [other for other in self._promised if other is not promise]

    def _pages_needed(self, requests: Sequence[Request]) -> int:
        """Pages at the worst moment: prompts are read one after the other, each whole before it shrinks, then all decode."""
        settled = most = 0
        for request in requests:
            n_prompt = len(request.prompt_ids)
            most = max(most, settled + len(self._budgets) * self._pages(n_prompt))
            settled += sum(self._pages(self._kept_at_most(n_prompt, budget) + request.limit) for budget in self._budgets)
        return max(most, settled)

    def _kept_at_most(self, n_prompt: int, budget: LayerBudget | None) -> int:
        return n_prompt if budget is None else min(budget.of(n_prompt) + self._n_protected, n_prompt)

    def _tokens(self, n_pages: int) -> int:
        """Tokens in every layer that ``n_pages`` are enough for."""
        return -(-n_pages // len(self._budgets)) * self._pool.page_size

    def _pages(self, n_tokens: int) -> int:
        return -(-n_tokens // self._pool.page_size)


def _pages_owned(requests: Sequence[Request]) -> int:
    return sum(len(request.sequence.pages) for request in requests)
