"""Prefixes that stay in memory because a program says so."""

from collections.abc import Callable

from trt_kv.errors import CapacityError, UsageError, load_option
from trt_kv.manifest import Manifest
from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.prefix.cache import PrefixCache
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.text.prompts import Prompt


class EnginePins:
    """The methods of ``Engine`` that pin prefixes."""

    core: EngineCore
    manifest: Manifest
    encode: Callable[..., list[int]]
    generate: Callable[..., Generation]

    def pin(self, prompt: Prompt, *, cache_salt: str = "") -> int:
        """Keep the beginning of a prompt in the prefix cache until ``unpin``, whatever else is read; what is not there is read
        now. Returns its tokens: only whole chunks are kept, so 0 for a prompt that is shorter.

        ``UsageError`` without a prefix cache, ``CapacityError`` if there is no room for it beside what is pinned already.
        """
        prefixes, ids = self._prefixes(), self.encode(prompt)
        n_wanted = len(ids) // prefixes.block_tokens * prefixes.block_tokens
        try:
            if prefixes.pin(ids, cache_salt) < n_wanted:
                # One token more, because the last chunk of a prompt is not kept.
                longer = [*ids[:n_wanted], ids[0]][: self.manifest.config.max_positions]
                self.generate(longer, SamplingParams(max_new_tokens=1, cache_salt=cache_salt))
            self._check_pinned(prefixes, ids, cache_salt, n_wanted)
        except BaseException:
            prefixes.unpin(ids, cache_salt)
            raise
        return n_wanted

    def unpin(self, prompt: Prompt, *, cache_salt: str = "") -> int:
        """Undo one ``pin`` of the same prompt. Returns the tokens that were pinned; 0 if it was not."""
        return self._prefixes().unpin(self.encode(prompt), cache_salt)

    def _prefixes(self) -> PrefixCache:
        if self.core.prefixes is None:
            raise UsageError("the prefix cache is off", got="prefix_cache=False", expected="an engine with a prefix cache")
        return self.core.prefixes

    def _check_pinned(self, prefixes: PrefixCache, ids: list[int], salt: str, n_wanted: int) -> None:
        n_pinned = prefixes.n_cached(ids, salt)
        if n_pinned < n_wanted:
            counts = prefixes.statistics
            raise CapacityError(
                "the prompt does not fit into the prefix cache, beside what is pinned",
                got=f"{n_wanted} tokens, of which {n_pinned} fit; {counts.used_bytes} bytes are used",
                expected=f"at most {counts.capacity_bytes} bytes",
                fix=f"raise {load_option('prefix_bytes')}, unpin others, or pin a shorter prompt",
            )
