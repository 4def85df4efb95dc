"""Requests whose prompts begin alike share pages while they run, where no page is changed once it is full.

That is so under policies that keep everything or recall; the others add to scores in every page, and compact. A prompt's whole
blocks (runtime/prefix/cache.py) are given away as they are read: from then on their pages belong to the block, which has a
reservation of its own until the last request that uses it has ended. The first page of each layer stays every request's own,
because recall tells sequences apart by it.
"""

from dataclasses import dataclass, field

import numpy as np

from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.blocks import Block, CacheBlocks
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.cache.sequence import SharedPages
from trt_kv.runtime.prefix.cache import Key, PrefixCache
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import Reservation


@dataclass(kw_only=True, eq=False)
class _SharedBlock:
    """One block of a prompt. ``pages_LN``: of each layer, without a prompt's first one, of which ``first`` has copies."""

    key: Key
    first: Block | None
    pages_LN: Ints
    owners: dict[PagePool, int]
    users: set[Request] = field(default_factory=set)


class PageSharing:
    """The shared blocks of one engine. Only the thread that runs steps may use it; after an interruption ``leave`` completes
    what was left undone.
    """

    def __init__(self, prefixes: PrefixCache, blocks: CacheBlocks, reservation: Reservation) -> None:
        self._prefixes = prefixes
        self._copies = blocks
        self._reservation = reservation
        self._blocks: dict[Key, _SharedBlock] = {}
        self._of: dict[Request, list[_SharedBlock]] = {}
        """Those that a request uses, in order."""

    @property
    def pages(self) -> list[tuple[PagePool, int]]:
        """Every shared page, once."""
        return [
            (pool, int(page))
            for block in self._blocks.values()
            for pool, owner in block.owners.items()
            for page in pool.pages_of(owner)
        ]

    def join(self, request: Request) -> None:
        """Let a request that is about to reserve memory use the shared blocks that its prompt begins with."""
        self.leave(request)
        if not self._blocks or request.begins_with is not None:
            return
        found = self._of[request] = []
        for key in self._prefixes.reusable(request.prefix_keys(self._prefixes)):
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
            block.users.add(request)
        request.n_shared = len(found) * self._prefixes.block_tokens

    def leave(self, request: Request) -> None:
        """Free the blocks that no other request uses. Does nothing for a request that uses none."""
        for block in self._of.get(request, ()):
            if block.users == {request}:
                self._blocks.pop(block.key, None)
                for pool, owner in block.owners.items():
                    pool.release_owner(owner)
                self._reservation.release(block)
            block.users.discard(request)
        self._of.pop(request, None)
        request.n_shared = 0

    def used_by(self, request: Request) -> SharedPages | None:
        """What a request begins with; None if it begins with nothing."""
        blocks = self._of.get(request)
        if not blocks:
            return None
        assert blocks[0].first is not None
        return SharedPages(first=blocks[0].first, pages_LN=np.concatenate([block.pages_LN for block in blocks], axis=1))

    def give(self, request: Request, n_tokens: int) -> None:
        """Share the whole blocks among the first ``n_tokens`` of a request's prompt, which it has read, up to one that others
        share.
        """
        size = self._prefixes.block_tokens
        if request.begins_with is not None or n_tokens - request.n_shared < size:
            return
        keys = request.prefix_keys(self._prefixes).of_first(n_tokens)
        for key in keys[request.n_shared // size :]:
            if key in self._blocks:
                return
            self._give(request, key, size)

    def _give(self, request: Request, key: Key, n_tokens: int) -> None:
        sequence = request.sequence
        is_first, begin = request.n_shared == 0, request.n_shared // sequence.pool.page_size
        pages_LN = sequence.page_table[:, max(1, begin) : begin + n_tokens // sequence.pool.page_size].copy()
        block = _SharedBlock(
            key=key,
            first=self._copies.read_first(sequence) if is_first else None,
            pages_LN=pages_LN,
            owners=sequence.new_owners(),
            users={request},
        )
        self._of.setdefault(request, []).append(block)
        self._reservation.move(id(request), block, n_tokens)
        request.n_shared += n_tokens
        sequence.give(pages_LN, block.owners)
        self._blocks[key] = block  # as the last step: from now on others may join
