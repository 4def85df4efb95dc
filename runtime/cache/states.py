"""What a sequence has kept, copied out of the pool: a conversation continues from it (docs/decisions/0066-conversations.md).

Between two turns a conversation holds no pages, so requests reserve what they need as always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.program import Program, recalling_layers
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.cache.tiered_sequence import CopyableTiers


@dataclass(frozen=True, kw_only=True)
class SequenceState:
    """What a sequence has cached: ``num_computed_tokens`` tokens seen, ``n_prompt`` of them before the last answer, and in
    layer l ``kv_len[l]`` of them held.

    ``arrays``: by name and layer, the layer's pages in order: kv.L [n, 2, K, P, W] as stored, token_positions.L [n, K, P],
    scores.L [n, K, P] fp32; of layers that recall kv.L and summaries.L [n, K, R, W].
    """

    num_computed_tokens: int
    n_prompt: int
    kv_len: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def n_bytes(self) -> int:
        return sum(values.nbytes for values in self.arrays.values())


class SequenceStates:
    """Reads and writes the states of sequences of one ``ModelRunner``."""

    def __init__(self, pool: KvPool[Any], tiers: CopyableTiers | None, program: Program) -> None:
        """``program``: of phase "prefill"."""
        self._pool = pool
        self._tiers = tiers
        self._recalls = frozenset(recalling_layers(program))
        self._scores = [next((node.attributes for node in nodes if node.op == "TokenScores"), None) for nodes in program]

    def check(self, state: SequenceState | None = None) -> None:
        """``UsageError`` if the cache is not in the memory of the host, or if ``state``, from elsewhere, does not fit it."""
        if not self._pool.on_host or not (self._tiers is None or self._tiers.in_memory):
            raise UsageError(
                "a conversation can only go on with what was kept if the cache is in memory",
                got="a cache on a GPU, or in a file",
                fix="use the device cpu and host_tier ram, or read the whole history again (mode exact)",
            )

        if state is not None and not self._accepts(state):
            raise UsageError(
                "what was kept does not fit this engine", got="other layers or pages", expected="the state of a session of it"
            )

    def _accepts(self, state: SequenceState) -> bool:
        """Whether it has the arrays that ``place`` reads, for pages like those here."""
        n_seen = state.num_computed_tokens
        if len(state.kv_len) != len(self._scores) or not 0 <= state.n_prompt <= n_seen:
            return False
        for layer, n_held in enumerate(state.kv_len):
            if not 0 <= n_held <= n_seen or (layer in self._recalls and n_held != n_seen):
                return False
            is_host = layer in self._recalls and self._tiers is not None
            of_page = (
                self._tiers.read_pages(0, np.arange(1))
                if is_host and self._tiers is not None
                else {name: self._pool.read_pages(name, np.arange(1)) for name in self._names(layer)}
            )
            n_pages = -(-n_held // self._pool.page_size)
            for name, page in of_page.items():
                values = state.arrays.get(f"{name}.{layer}")
                if values is None or values.dtype != page.dtype or values.shape != (n_pages, *page.shape[1:]):
                    return False
                if name == "token_positions" and not _are_positions(values, n_held, n_seen):
                    return False
        return True

    def read(self, sequence: SequenceCache) -> SequenceState:
        """A copy of all that a sequence holds."""
        arrays: dict[str, np.ndarray] = {}
        for layer in range(sequence.n_layers):
            for name, values in self._read_layer(layer, self._pages_of(sequence, layer)).items():
                arrays[f"{name}.{layer}"] = values
        return SequenceState(
            num_computed_tokens=sequence.num_computed_tokens,
            n_prompt=sequence.n_prompt,
            kv_len=tuple(int(n) for n in sequence.kv_len),
            arrays=arrays,
        )

    def place(self, sequence: SequenceCache, state: SequenceState) -> None:
        """Give an empty sequence what another one held, to read more tokens behind it. ``CapacityError`` if too few pages are
        free.

        Scores that are sums over all queries go on; those of the last queries begin again.
        """
        sequence.begin_with(state.kv_len, state.num_computed_tokens)
        for layer in range(sequence.n_layers):
            pages = self._pages_of(sequence, layer)
            if not len(pages):
                continue
            arrays = {name: state.arrays[f"{name}.{layer}"] for name in self._names(layer)}
            if layer in self._recalls and self._tiers is not None:
                self._tiers.write_pages(pages, arrays)
                positions_MP = np.arange(len(pages) * self._pool.page_size).reshape(len(pages), -1)
                self._tiers.begin_at(pages, positions_MP, None)
                continue
            if (scored := self._scores[layer]) is not None:
                scores, positions = arrays["scores"], arrays["token_positions"]
                arrays["scores"] = _continued(scores, positions, scored, n_prompt=state.n_prompt)
            for name, values in arrays.items():
                self._pool.write_pages(name, pages, values)

    def go_on(self, sequence: SequenceCache) -> None:
        """The same for a sequence that stays where it is: finished scores become those that the next chunk adds to."""
        for layer, scored in enumerate(self._scores):
            if scored is not None:
                pages = self._pages_of(sequence, layer)
                scores, positions = (self._pool.read_pages(name, pages) for name in ("scores", "token_positions"))
                self._pool.write_pages("scores", pages, _continued(scores, positions, scored, n_prompt=sequence.n_prompt))

    def _read_layer(self, layer: int, pages_M: Ints) -> Mapping[str, np.ndarray]:
        if layer in self._recalls and self._tiers is not None:
            return self._tiers.read_pages(int(pages_M[0]), pages_M)
        return {name: self._pool.read_pages(name, pages_M) for name in self._names(layer)}

    def _names(self, layer: int) -> Sequence[str]:
        if layer not in self._recalls:
            return ("kv", "token_positions", "scores")
        return ("kv", "summaries") if self._tiers is not None else ("kv", "token_positions", "summaries")

    def _pages_of(self, sequence: SequenceCache, layer: int) -> Ints:
        n_pages = -(-int(sequence.kv_len[layer]) // self._pool.page_size)
        pages: Ints = sequence.page_table[layer, :n_pages]
        return pages


def _are_positions(positions_MKP: np.ndarray, n_held: int, n_seen: int) -> bool:
    """Whether the first ``n_held`` slots have positions of ``n_seen`` tokens."""
    positions_KS = positions_MKP.swapaxes(0, 1).reshape(positions_MKP.shape[1], -1)[:, :n_held]
    return bool(np.all((positions_KS >= 0) & (positions_KS < n_seen)))


def _continued(scores_MKP: np.ndarray, positions_MKP: np.ndarray, scored: Mapping[str, Any], *, n_prompt: int) -> np.ndarray:
    """The scores that more of a prompt adds to, from those that were finished when ``n_prompt`` tokens had been read."""
    if int(scored["window"]):
        return np.zeros_like(scores_MKP)
    if int(scored["average"]):
        scores_MKP = scores_MKP * np.maximum(1, n_prompt - positions_MKP).astype(np.float32)
    if not int(scored["generated"]):  # then nothing has written the scores of generated tokens
        scores_MKP = np.where(positions_MKP < n_prompt, scores_MKP, np.float32(0.0))
    return scores_MKP
