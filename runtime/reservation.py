"""Reservations: before it starts, a request reserves the most that it will need of every pool and other limited resource.

So an admitted request never runs out of memory, and none has to be preempted. This is arithmetic on sizes alone: pools are not
inspected, because all of their pages are allocated under reservations.
"""

import dataclasses
import sys
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trt_kv.errors import CapacityError, load_option
from trt_kv.layer_budget import LayerBudget
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.cache.page_pool import PagePool


@dataclass(frozen=True, kw_only=True)
class RequestSize:
    """Tokens of a prompt, the most tokens generated after it, and the number of sequences: the request and its forks.

    Of a turn of a conversation also the tokens seen before it, and how many of them each layer holds. ``n_shared``: tokens at
    the prompt's beginning, whole pages, that are in pages of others, but for the first page.
    """

    n_prompt: int
    max_new_tokens: int
    n_sequences: int = 1
    n_before: int = 0
    held: tuple[int, ...] = ()
    n_shared: int = 0

    @property
    def n_seen(self) -> int:
        """Tokens before the answer."""
        return self.n_before + self.n_prompt

    def n_read(self, layer: int) -> int:
        """Tokens that ``layer`` holds when the prompt has been read, if nothing is evicted."""
        return self.n_prompt + (self.held[layer] if self.held else 0)


class Resource(Protocol):
    """A limited resource: pages of a pool, working sets, places in a decode batch."""

    @property
    def name(self) -> str:
        """Name in statistics."""
        ...

    @property
    def total(self) -> int: ...

    def while_reading(self, size: RequestSize) -> int:
        """The most that a request needs from its first step to its end, given that one prompt is prefilled at a time."""
        ...

    def after_reading(self, size: RequestSize) -> int:
        """The most that it needs after prefill."""
        ...

    def refusal(self, needed: int) -> CapacityError:
        """The error for a request that needs more than ``total``."""
        ...

    def secure(self, reserved: int) -> None:
        """Obtain what is reserved, if it is not there from the start. ``CapacityError`` if that is impossible."""
        ...


class Limit(Protocol):
    """A limit that a single request must not exceed, however much is free."""

    def check(self, size: RequestSize) -> None:
        """``CapacityError`` if the request exceeds the limit."""
        ...


class Reservation:
    """How much of each resource is reserved by each request, which is identified by a key."""

    def __init__(self, resources: Sequence[Resource], limits: Sequence[Limit] = ()) -> None:
        self.resources = tuple(resources)
        self._limits = tuple(limits)
        self._reserved: dict[Hashable, tuple[RequestSize | None, tuple[int, ...]]] = {}

    def check(self, size: RequestSize) -> None:
        """``CapacityError`` for a request that can never be served, with what to change."""
        for limit in self._limits:
            limit.check(size)
        for resource in self.resources:
            if (needed := resource.while_reading(size)) > resource.total:
                raise resource.refusal(needed)

    def reserve(self, key: Hashable, size: RequestSize) -> bool:
        """Reserve the most that a request will need. Returns False, reserving nothing, if that is not free now."""
        self.release(key)
        needed = tuple(resource.while_reading(size) for resource in self.resources)
        if any(n > free for n, free in zip(needed, self.free, strict=True)):
            return False
        self._reserved[key] = size, needed
        return True

    def secure(self) -> None:
        """Obtain what has been reserved. ``CapacityError`` if there is less than was thought, as on a disk that others fill."""
        for resource, reserved in zip(self.resources, self.used, strict=True):
            resource.secure(reserved)

    def finish_reading(self, key: Hashable) -> None:
        """Release what a request needed for its prefill only."""
        size, _ = self._reserved[key]
        assert size is not None
        self._reserved[key] = size, tuple(resource.after_reading(size) for resource in self.resources)

    def move(self, key: Hashable, to: Hashable, n_shared: int) -> None:
        """Reserve for ``to`` what a request that reads its prompt needs no longer once ``n_shared`` more of its tokens are in
        pages of others. The sum stays.
        """
        size, needed = self._reserved[key]
        assert size is not None
        size = dataclasses.replace(size, n_shared=size.n_shared + n_shared)
        still = tuple(resource.while_reading(size) for resource in self.resources)
        moved = tuple(before - after for before, after in zip(needed, still, strict=True))
        self._reserved |= {key: (size, still), to: (None, moved)}

    def release(self, key: Hashable) -> None:
        """Release all that a request has reserved, if anything."""
        self._reserved.pop(key, None)

    @property
    def used(self) -> list[int]:
        """How much of each resource is reserved. May be asked from any thread."""
        reserved = list(self._reserved.values())
        return [sum(needed[at] for _, needed in reserved) for at in range(len(self.resources))]

    @property
    def free(self) -> list[int]:
        """How much of each resource is not reserved."""
        return [resource.total - used for resource, used in zip(self.resources, self.used, strict=True)]


class Places:
    """Sequences that may run at once. ``how_to_enlarge``: the fix in the error for more."""

    name = "sequences"

    def __init__(self, total: int, how_to_enlarge: str = "send fewer at once") -> None:
        self.total = total
        self._how_to_enlarge = how_to_enlarge

    def while_reading(self, size: RequestSize) -> int:
        return size.n_sequences

    def after_reading(self, size: RequestSize) -> int:
        return size.n_sequences

    def refusal(self, needed: int) -> CapacityError:
        return CapacityError(
            "more sequences of one request than run at once",
            got=f"{needed} sequences",
            expected=f"at most {self.total}",
            fix=self._how_to_enlarge,
        )

    def secure(self, reserved: int) -> None:
        """Places need nothing."""


class _Pages:
    """Pages of one pool, used by ``n_layers`` layers; ``option`` of ``Engine.load`` sizes it, in tokens per layer."""

    option = "cache_tokens"

    def __init__(self, pool: PagePool, *, n_layers: int, most: Sequence[int] = ()) -> None:
        """``most``: for each layer, the pages that it adds to the pool at most, however large the option; empty: no bound."""
        self.pool = pool
        self.n_layers = n_layers
        self._most = most

    @property
    def name(self) -> str:
        return f"pages of {self.pool.name}"

    @property
    def total(self) -> int:
        return self.pool.n_pages

    def refusal(self, needed: int) -> CapacityError:
        return CapacityError(
            f"{self.pool.name} is too small for this request",
            got=f"room for {self._tokens(self.pool.n_pages)} tokens per layer",
            expected=f"room for {self._tokens(needed)}",
            fix=f"load the engine with {load_option(self.option, self._tokens(needed))} or more, or send a shorter prompt",
        )

    def secure(self, reserved: int) -> None:
        self.pool.secure(reserved)

    def _shared(self, size: RequestSize) -> int:
        """Pages of one layer that others hold."""
        return max(0, size.n_shared // self.pool.page_size - 1)

    def _tokens(self, n_pages: int) -> int:
        """The least number of tokens per layer for which a pool has ``n_pages``."""
        most = self._most or [n_pages] * self.n_layers
        per_layer = bisect_left(range(n_pages), n_pages, key=lambda n: sum(min(n, limit) for limit in most))
        return per_layer * self.pool.page_size


class CachePages(_Pages):
    """Whole caches in one pool: prefill caches the prompt in every layer, then each layer shrinks to its budget and grows."""

    def __init__(
        self,
        pool: PagePool,
        *,
        budgets: Sequence[LayerBudget | None],
        n_protected: int,
        windows: Sequence[int] = (),
        chunk: int = 1,
        most: Sequence[int] = (),
        n_layers: int | None = None,
        layers: Sequence[int] = (),
        reserve: int | None = None,
        most_generated: int | None = None,
    ) -> None:
        """``budgets``: of each layer; None if it depends on the prompt, and so may be the whole prompt. ``n_layers``: that the
        pool was sized for; None: those that have a budget here. ``layers``: their numbers, if these are not all of the model's.
        ``reserve``: tokens that a layer holds beyond its budget between two chunks of a prompt; None: it holds all of it.

        ``n_protected`` tokens of each layer are kept whatever its budget. ``windows``: each layer's attention window in tokens,
        0 for none; empty: no layer has one. ``chunk``: prompt tokens that are read in one step. ``most``: for each layer, the
        pages that it adds to the pool at most, however many tokens it is sized for; empty: no bound. ``most_generated``: tokens
        generated after the prompt that a layer ever holds; None: all of them.
        """
        super().__init__(pool, n_layers=n_layers or len(budgets), most=most)
        self._most_generated = sys.maxsize if most_generated is None else most_generated
        self._layers = list(zip(layers or range(len(budgets)), budgets, windows or [0] * len(budgets), strict=True))
        self._n_protected = n_protected
        self._reserve = reserve
        self._chunk = chunk

    def while_reading(self, size: RequestSize) -> int:
        reading = sum(self._of_prompt(self._most_read(size, layer, budget), window) for layer, budget, window in self._layers)
        return max(reading - len(self._layers) * self._shared(size), self.after_reading(size))

    def after_reading(self, size: RequestSize) -> int:
        n_pages = size.n_sequences * sum(self._while_decoding(size, *layer) for layer in self._layers)
        return n_pages - len(self._layers) * self._shared(size)

    def most_in_any_layer(self, size: RequestSize) -> int:
        """The most tokens that any layer of one of the request's sequences holds."""
        return max(self._most_tokens(size, *layer) for layer in self._layers)

    def _most_tokens(self, size: RequestSize, layer: int, budget: LayerBudget | None, window: int) -> int:
        # The last token is never attended to.
        n_decoding = self._kept_at_most(size, layer, budget) + min(size.max_new_tokens - 1, self._most_generated)
        n_tokens, page_size = max(self._most_read(size, layer, budget), n_decoding), self.pool.page_size
        return min(n_tokens, window_pages(window, self._chunk, page_size) * page_size)

    def _most_read(self, size: RequestSize, layer: int, budget: LayerBudget | None) -> int:
        """The most tokens of one layer while the prompt is read."""
        n_read = size.n_read(layer)
        if self._reserve is None or budget is None:
            return n_read
        held = size.held[layer] if size.held else 0
        return min(n_read, max(held, self._kept_at_most(size, layer, budget) + self._reserve) + self._chunk)

    def _of_prompt(self, n_read: int, window: int) -> int:
        """The most pages of one layer while the prompt is read."""
        return min(_pages(n_read, self.pool), window_pages(window, self._chunk, self.pool.page_size))

    def _while_decoding(self, size: RequestSize, layer: int, budget: LayerBudget | None, window: int) -> int:
        """The most pages of one layer of a sequence afterwards."""
        n_generated = min(size.max_new_tokens, self._most_generated)
        n_pages = _pages(self._kept_at_most(size, layer, budget) + n_generated, self.pool)
        return min(n_pages, window_pages(window, 1, self.pool.page_size))

    def _kept_at_most(self, size: RequestSize, layer: int, budget: LayerBudget | None) -> int:
        n_read = size.n_read(layer)
        return n_read if budget is None else min(budget.of(size.n_seen) + self._n_protected, n_read)


class HostPages(_Pages):
    """The host tier: every token of the layers whose cache is on the host."""

    option = "host_tokens"

    def while_reading(self, size: RequestSize) -> int:
        return self.after_reading(size)

    def after_reading(self, size: RequestSize) -> int:
        n_pages = size.n_sequences * _pages(size.n_seen + size.max_new_tokens, self.pool) - self._shared(size)
        return self.n_layers * n_pages


class WorkingSetPages(_Pages):
    """The device pool of an engine with a host tier: working sets, and whole caches of the layers that do not recall."""

    def __init__(
        self,
        pool: PagePool,
        *,
        limits: Sequence[PageLimits | None],
        budgets: Sequence[LayerBudget | None],
        windows: Sequence[int] = (),
        chunk: int = 1,
    ) -> None:
        """``limits``: of each layer, None if its cache is on the device; ``budgets`` as in the graph; ``windows`` and ``chunk``
        as in ``CachePages``.
        """
        super().__init__(pool, n_layers=len(limits))
        self._layers = list(zip(limits, budgets, windows or [0] * len(limits), strict=True))
        self._chunk = chunk

    def refusal(self, needed: int) -> CapacityError:
        error = super().refusal(needed)
        smaller = "or build the engine with a smaller working set (--set tokens=N)"
        return CapacityError(error.what, got=error.got, expected=error.expected, fix=f"{error.fix}, {smaller}")

    def while_reading(self, size: RequestSize) -> int:
        reading = sum(self._of_layer(size, *layer, self._chunk) for layer in self._layers)
        return max(reading, self.after_reading(size))

    def after_reading(self, size: RequestSize) -> int:
        return size.n_sequences * sum(self._of_layer(size, *layer, 1) for layer in self._layers)

    def _of_layer(
        self, size: RequestSize, limits: PageLimits | None, budget: LayerBudget | None, window: int, n_new: int
    ) -> int:
        """The most pages of one layer of a sequence in steps of up to ``n_new`` tokens."""
        n_most = _pages(size.n_seen + size.max_new_tokens, self.pool)
        if limits is None:
            return min(n_most, window_pages(window, n_new, self.pool.page_size))
        n_tokens = size.n_seen if budget is None else budget.of_prompt(size.n_seen)
        n_chosen = min(limits.n_chosen(n_tokens), n_most)
        return limits.n_sinks + limits.n_newest + n_chosen + staging_slots(n_chosen)


def window_pages(window: int, n_new: int, page_size: int) -> int:
    """The most pages of a layer with a ``window`` in a step of ``n_new`` tokens; without one (0), more than any layer has.

    Between steps it holds the window - 1 tokens that the next query sees before itself, and at most page_size - 1 others that
    share a page with them (``SequenceCache.free_passed``).
    """
    return -(-(window - 1 + page_size - 1 + n_new) // page_size) if window else sys.maxsize


def _pages(n_tokens: int, pool: PagePool) -> int:
    return -(-n_tokens // pool.page_size)
