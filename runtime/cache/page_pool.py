"""Page allocation with an owner per page. Ownership is recorded in one array, in one write, before a page is used."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from trt_kv.errors import CapacityError, load_option
from trt_kv.runtime.backends.step import Ints

NOBODY = 0


class PagePool:
    """``n_pages`` pages of ``page_size`` tokens, numbered from 0. Subclasses define what a page holds.

    ``allocate`` records the owner of each page that it returns; a page without an owner is free. After any interruption
    (Ctrl-C, an error), ``release_owner`` therefore frees everything that its owner holds: no page leaks, and none has two
    owners. Only the thread that runs steps may change the pool.
    """

    name = "the KV pool"
    how_to_enlarge = f"raise {load_option('cache_tokens')}, send fewer sequences at once, or build with a smaller budget"

    def __init__(self, *, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self._owner_M = np.full(n_pages, NOBODY, np.int64)
        self._first = 0
        """No page below this one is free."""
        self._owners = itertools.count(NOBODY + 1)

    @property
    def n_free(self) -> int:
        return self.n_pages - int(np.count_nonzero(self._owner_M))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        return (self.n_pages - self.n_free) * self.page_bytes

    def secure(self, n_pages: int) -> None:
        """Make sure that the first ``n_pages`` can be written, before a request relies on it. ``CapacityError`` if they cannot.

        As the lowest free pages are allocated first, these are all that are used while no more have been reserved.
        """

    def new_owner(self) -> int:
        """A new owner number."""
        return next(self._owners)

    def allocate(self, n_pages: int, owner: int) -> list[int]:
        """Allocate the lowest ``n_pages`` free pages to ``owner`` and return them in ascending order.

        Raises ``CapacityError``, without allocating any, if too few are free.
        """
        if n_pages == 0:
            return []
        pages = self._first + np.flatnonzero(self._owner_M[self._first :] == NOBODY)[:n_pages]
        if len(pages) < n_pages:
            raise CapacityError(
                f"{self.name} is full",
                got=f"{n_pages} pages of {self.page_size} tokens needed, {len(pages)} of {self.n_pages} free",
                fix=self.how_to_enlarge,
            )
        self._owner_M[pages] = owner
        self._first = int(pages[-1]) + 1
        return [int(page) for page in pages]

    def pages_of(self, owner: int) -> list[int]:
        """The pages of ``owner``, in ascending order."""
        return [int(page) for page in np.flatnonzero(self._owner_M == owner)]

    def give(self, pages: Sequence[int] | Ints, owner: int) -> None:
        """Make ``owner`` the owner of pages that have one."""
        self._owner_M[np.asarray(pages, np.int64)] = owner

    def release(self, pages: Sequence[int] | Ints) -> None:
        """Free some of an owner's pages."""
        if len(pages):
            self._first = min(self._first, int(np.min(pages)))
            self._owner_M[np.asarray(pages, np.int64)] = NOBODY

    def release_owner(self, owner: int) -> None:
        """Free all pages of ``owner``, if it has any."""
        self.release(np.flatnonzero(self._owner_M == owner))

    def check_integrity(self, used: Iterable[int]) -> None:
        """Raise ``CapacityError`` unless exactly the pages ``used`` have an owner, and each is used once."""
        counts = Counter(used)
        owned = {int(page) for page in np.flatnonzero(self._owner_M)}
        wrong = {
            page: (page in owned, counts[page]) for page in owned | set(counts) if (page in owned, counts[page]) != (True, 1)
        }
        if wrong or np.flatnonzero(self._owner_M[: self._first] == NOBODY).size:
            raise CapacityError(
                f"{self.name} lost track of its pages",
                got=f"pages by (has an owner, number of uses): {wrong}",
                expected="(True, 1) for each page in use, and no other page with an owner",
            )
