"""Who owns which page: a free list, and the accounting that proves nothing is lost."""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

from trt_kv.errors import CapacityError


class Holder(Protocol):
    """Somebody who owns pages."""

    def pages_in(self, pool: "PagePool") -> list[int]:
        """The pages of ``pool`` that this holder owns."""
        ...


class PagePool:
    """``n_pages`` pages of ``page_size`` tokens, numbered from 0. What a page holds is a subclass's business."""

    name = "the KV pool"
    how_to_enlarge = "raise cache_tokens when loading the engine, send fewer sequences at once, or build with a smaller budget"

    def __init__(self, *, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders: WeakSet[Holder] = WeakSet()

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        return (self.n_pages - self.n_free) * self.page_bytes

    def check_room(self, n_pages: int) -> None:
        """``CapacityError`` unless ``allocate`` can give that many pages."""
        if n_pages > self.n_free:
            raise CapacityError(
                f"{self.name} is full",
                got=f"{n_pages} pages of {self.page_size} tokens needed, {self.n_free} of {self.n_pages} free",
                fix=self.how_to_enlarge,
            )

    def allocate(self, n_pages: int) -> list[int]:
        """Take pages from the free list; ``CapacityError`` before anything is taken if there are not enough."""
        self.check_room(n_pages)
        taken = self._free[len(self._free) - n_pages :]
        del self._free[len(self._free) - n_pages :]
        return taken[::-1]

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; the most recently used are handed out first, while they are warm."""
        self._free.extend(pages)

    def register(self, holder: Holder) -> None:
        """Let ``reclaim`` know of somebody who may own pages."""
        self._holders.add(holder)

    def reclaim(self) -> None:
        """After Ctrl-C in the middle of the bookkeeping: free is again every page that no living holder owns."""
        held = set(self.held_pages())
        self._free = [page for page in range(self.n_pages - 1, -1, -1) if page not in held]

    def held_pages(self) -> list[int]:
        """The pages of all living holders."""
        return [page for holder in self._holders for page in holder.pages_in(self)]

    def check_integrity(self, owned: Iterable[int] | None = None) -> None:
        """Raise ``CapacityError`` unless every page is either free or ``owned`` (None: by a living holder), exactly once."""
        if owned is None:
            owned = self.held_pages()
        counts = Counter([*self._free, *owned])
        wrong = {page: counts[page] for page in range(self.n_pages) if counts[page] != 1}
        if wrong or len(counts) != self.n_pages:
            raise CapacityError(
                f"{self.name} lost track of its pages", got=f"pages by number of owners: {wrong}", expected="1 each"
            )
