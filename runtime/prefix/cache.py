"""The prefix cache: blocks of prompt tokens whose keys and values were computed before, found by the tokens before them.

A request that begins with cached tokens continues from copies of them, and its result has the bits that it has without:

* a block ends where a chunk ends, counted from the start of the prompt, so all tokens are read in the same chunks as ever;
* it was copied before its prompt's last chunk, so it was neither evicted from nor finished;
* the end of a prompt is always read: its last token, and as many queries as the policy's scores are of.

Blocks are in memory of their own: a request reserves and uses the pool as if nothing had been cached. Besides, requests that
run at the same time may share pages of the pool (sharing.py).
"""

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from trt_kv.errors import RecallError
from trt_kv.runtime.cache.blocks import Block, CacheBlocks
from trt_kv.runtime.cache.sequence import SequenceCache, SharedPages
from trt_kv.runtime.prefix.block_file import About
from trt_kv.runtime.prefix.store import PrefixStore

Key = bytes
"""The SHA-256 digest of an engine, a salt, and all tokens up to the end of a block."""


@dataclass(kw_only=True)
class PrefixStatistics:
    """Counts since the engine was loaded. ``queried_tokens``: of all prompts that looked for a prefix; ``hit_tokens``: those
    that were not computed again. ``kept``, ``evicted``: blocks; ``blocks``, ``used_bytes``: those in memory now.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    stored_hit_tokens: int = 0
    """Those of ``hit_tokens`` that came from the store's files."""
    shared_hit_tokens: int = 0
    """Those of ``hit_tokens`` that were not copied, but read in pages of requests that ran at the time."""
    kept: int = 0
    evicted: int = 0
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PromptKeys:
    """The keys of a prompt's whole blocks. Each is computed once, when it is first asked for. Not for several threads."""

    def __init__(self, root: Key, prompt_ids: Sequence[int], block_tokens: int) -> None:
        """``root``: the digest that the chain begins with."""
        self.n_tokens = len(prompt_ids)
        self._chain = [root]
        self._ids = prompt_ids
        self._block_tokens = block_tokens

    def of_first(self, n_tokens: int) -> list[Key]:
        """The keys of the whole blocks among the first ``n_tokens``."""
        n_blocks = max(0, min(n_tokens, self.n_tokens)) // self._block_tokens
        for at in range(len(self._chain) - 1, n_blocks):
            block_ids = np.asarray(self._ids[at * self._block_tokens : (at + 1) * self._block_tokens], np.int64)
            self._chain.append(hashlib.sha256(self._chain[-1] + block_ids.tobytes()).digest())
        return self._chain[1 : n_blocks + 1]


@dataclass(kw_only=True, eq=False)
class _Entry:
    block: Block
    n_bytes: int


class PrefixCache:
    """Blocks of one engine, least recently used first. Only the thread that runs steps may call ``begin`` and ``keep``; the
    others may be called from any thread.
    """

    def __init__(
        self,
        blocks: CacheBlocks,
        *,
        block_tokens: int,
        capacity_bytes: int,
        fingerprint: str = "",
        store: PrefixStore | None = None,
        engine: str = "",
        policy: str = "",
    ) -> None:
        """``block_tokens``: a multiple of the chunk and of the page size. ``fingerprint``: of all that the bits in a block
        depend on but tokens, so that ``store`` can be shared. ``store``: files that blocks are also written to, which tell the
        digest of their ``engine`` and the name of its ``policy``.
        """
        self.block_tokens = block_tokens
        self.statistics = PrefixStatistics(capacity_bytes=capacity_bytes)
        self._blocks = blocks
        self._fingerprint = fingerprint
        self._store = store
        self._of = {"engine": engine, "policy": policy}
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._pins: Counter[Key] = Counter()
        self._lock = threading.RLock()

    def begin(self, sequence: SequenceCache, keys: PromptKeys, shared: SharedPages | None = None) -> int:
        """Give an empty sequence the longest prefix of a prompt that is cached or ``shared``; returns its tokens, 0 if there is
        none.

        Errors as for ``CacheBlocks.place``.
        """
        n_shared = 0 if shared is None else (1 + shared.pages_LN.shape[1]) * sequence.pool.page_size
        with self._lock:
            self.statistics.queried_tokens += keys.n_tokens
            found = self._longest(self.reusable(keys))
        copied = found[n_shared // self.block_tokens :]
        n_tokens = n_shared + len(copied) * self.block_tokens
        if n_tokens:
            self._blocks.place(sequence, copied, n_tokens, shared)
            self.statistics.hit_tokens += n_tokens
            self.statistics.shared_hit_tokens += n_shared
        return n_tokens

    def keep(self, sequence: SequenceCache, keys: PromptKeys, n_read: int) -> None:
        """Keep the block that ends after ``n_read`` tokens of a prompt, if one does, the sequence having read just these."""
        n_blocks, rest = divmod(n_read, self.block_tokens)
        if rest or not n_blocks or sequence.failure is not None:
            return
        with self._lock:
            *before, key = keys.of_first(n_read)
            if key in self._entries or not all(earlier in self._entries for earlier in before):
                return
            try:
                block = self._blocks.read(sequence, self.block_tokens)
            except (MemoryError, RecallError):  # the request goes on, and finds out by itself if it cannot
                return
            if self._insert(before, key, block) and self._store is not None:
                after = before[-1].hex() if before else ""
                about = About(tokens=n_read, own_tokens=self.block_tokens, after=after, **self._of)
                self._store.put(key, block, about)
                self._store.touch([*before, key])

    def pin(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Keep the whole blocks of a prompt, those in memory and those to come, until ``unpin``. Returns the tokens of those in
        memory that begin it.
        """
        with self._lock:
            self._pins.update(self.keys(prompt_ids, salt))
            return self.n_cached(prompt_ids, salt)

    def unpin(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Undo one ``pin`` of the same prompt. Returns the tokens of the blocks that were pinned; 0 if it was not."""
        with self._lock:
            pinned = [key for key in self.keys(prompt_ids, salt) if self._pins[key]]
            self._pins.subtract(pinned)
            self._pins = +self._pins
            return self.block_tokens * len(pinned)

    def n_cached(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Tokens of the blocks in memory that begin a prompt."""
        with self._lock:
            keys = self.keys(prompt_ids, salt)
            return self.block_tokens * next((at for at, key in enumerate(keys) if key not in self._entries), len(keys))

    def n_stored(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Tokens of the blocks in files that begin a prompt."""
        keys, store = self.keys(prompt_ids, salt), self._store
        missing = (at for at, key in enumerate(keys) if store is None or key not in store)
        return self.block_tokens * next(missing, len(keys))

    def clear(self) -> None:
        """Drop all blocks in memory that are not pinned."""
        with self._lock:
            for key in [key for key in self._entries if not self._pins[key]]:
                self._drop(key)

    def keys_of(self, prompt_ids: Sequence[int], salt: str) -> PromptKeys:
        """The keys of a prompt, for its request to keep."""
        root = hashlib.sha256(f"{self._fingerprint}\n{salt}".encode()).digest()
        return PromptKeys(root, prompt_ids, self.block_tokens)

    def keys(self, prompt_ids: Sequence[int], salt: str) -> list[Key]:
        """The keys of the whole blocks of a prompt."""
        return self.keys_of(prompt_ids, salt).of_first(len(prompt_ids))

    def reusable(self, keys: PromptKeys) -> list[Key]:
        """Those of the blocks that need not be read: not so late that one of the last queries would be missing."""
        return keys.of_first(keys.n_tokens - self._blocks.n_last_queries)

    def _longest(self, keys: Sequence[Key]) -> list[Block]:
        """The blocks of the longest cached prefix, read from the store if they are only there. They become the last to be
        dropped, the first block last of all: a block is of no use without those before it.
        """
        found: list[Block] = []
        for at, key in enumerate(keys):
            entry = self._entries.get(key)
            block = None if entry is None else entry.block
            if block is None and self._store is not None:
                end = (at + 1) * self.block_tokens
                block = self._store.get(key, partial(self._blocks.accepts, end=end, n_tokens=self.block_tokens))
                if block is not None:
                    self._insert(keys[:at], key, block)
                    self.statistics.stored_hit_tokens += self.block_tokens
            if block is None:
                break
            found.append(block)
        self._touch(keys[: len(found)])
        if self._store is not None:
            self._store.touch(keys[: len(found)])
        return found

    def _touch(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def _insert(self, before: Sequence[Key], key: Key, block: Block) -> bool:
        """Add a block, in place of the least recently used ones if there is no room; not of those ``before`` it, nor of pinned
        ones. False, adding nothing, if that is not enough.
        """
        n_bytes = sum(values.nbytes for values in block.values())
        victims = self._victims(n_bytes, set(before))
        if victims is None:
            return False
        for victim in victims:
            self._drop(victim)
            self.statistics.evicted += 1
        self._entries[key] = _Entry(block=block, n_bytes=n_bytes)
        self._touch(before)
        self.statistics.kept += 1
        self.statistics.blocks += 1
        self.statistics.used_bytes += n_bytes
        return True

    def _victims(self, n_bytes: int, spared: Collection[Key]) -> list[Key] | None:
        """The blocks to drop for ``n_bytes`` more; None if these cannot be had."""
        over = self.statistics.used_bytes + n_bytes - self.statistics.capacity_bytes
        victims = []
        for key, entry in self._entries.items():
            if over <= 0:
                break
            if not self._pins[key] and key not in spared:
                victims.append(key)
                over -= entry.n_bytes
        return victims if over <= 0 else None

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self.statistics.blocks -= 1
        self.statistics.used_bytes -= entry.n_bytes
