"""What a sequence has kept, copied out of the pool: a conversation continues from it (docs/decisions/0066-conversations.md).

Between two turns a conversation holds no pages, so requests reserve what they need as always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.plugins.recall_attention.page_counts import rows_of_layers
from trt_kv.program import Program, eviction_nodes, finds_budgets, recalling_layers
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.blocks import page_limits
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.cache.tiered_sequence import CopyableTiers


@dataclass(frozen=True, kw_only=True)
class SequenceState:
    """What a sequence has cached: ``num_computed_tokens`` tokens seen, ``n_prompt`` of them before the last answer, and in
    layer l ``kv_len[l]`` of them held.

    ``arrays``: by name and layer, the layer's pages in order: kv.L [n, 2, K, P, W] as stored, token_positions.L [n, K, P],
    scores.L [n, K, P] fp32 if the layer's scores are sums over all queries; of layers that recall kv.L and summaries.L
    [n, K, R, W]. Slots that no token is in are 0: a state may leave the process, and must not have what others wrote there.
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
        self._limits = page_limits(program, pool.page_size)
        self._summary_rows = rows_of_layers(program, pool.page_size, pool.kv_dtype)
        self._drops = finds_budgets(program) or any(node is not None for node in eviction_nodes(program))
        self._scores = [next((node.attributes for node in nodes if node.op == "TokenScores"), None) for nodes in program]

    def check(self, state: SequenceState | None = None) -> None:
        """``UsageError`` if the cache is on a GPU and the policy drops tokens, or if ``state``, from elsewhere, does not fit
        this engine.
        """
        if self._drops and not self._pool.on_host:
            raise UsageError(
                "on a GPU a conversation cannot go on from what was kept (mode compressed) if the policy drops tokens",
                got="a policy that drops tokens, whose kernels on GPUs have no budgets for single turns",
                fix="use mode exact, which reads the history again unless the prefix cache has it; or the device cpu",
                parameter="mode",
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
            n_pages = -(-n_held // self._pool.page_size)
            for name in self._names(layer):
                values, (dtype, shape) = state.arrays.get(f"{name}.{layer}"), self._page_of(name, layer)
                if values is None or values.dtype != dtype or values.shape != (n_pages, *shape):
                    return False
                if name == "token_positions" and not _are_positions(values, n_held, n_seen):
                    return False
        return True

    def read(self, sequence: SequenceCache) -> SequenceState:
        """A copy of all that a sequence holds."""
        arrays: dict[str, np.ndarray] = {}
        for layer in range(sequence.n_layers):
            n_full, n_open = divmod(int(sequence.kv_len[layer]), self._pool.page_size)
            for name, values in self._read_layer(layer, self._pages_of(sequence, layer), n_full).items():
                if n_open:  # behind its tokens there is what others had in this page before
                    _unused(name, values, n_open)[...] = 0
                arrays[f"{name}.{layer}"] = values
            if (scored := self._sums(layer)) is not None:
                at = f"scores.{layer}"
                arrays[at] = _written(arrays[at], arrays[f"token_positions.{layer}"], scored, n_prompt=sequence.n_prompt)
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
            if (limits := self._limits[layer]) is not None and self._tiers is not None:
                self._tiers.write_pages(pages, arrays)
                positions_MP = np.arange(len(pages) * self._pool.page_size).reshape(len(pages), -1)
                self._tiers.begin_at(pages, positions_MP, limits, n_tokens=state.kv_len[layer])
                continue
            if (scored := self._scores[layer]) is not None:
                positions = arrays["token_positions"]
                scores = arrays.get("scores", np.zeros(positions.shape, np.float32))
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

    def _read_layer(self, layer: int, pages_M: Ints, n_full: int) -> Mapping[str, np.ndarray]:
        """Copies of a layer's pages, of which ``n_full`` are full, and one more may not be."""
        limits = self._limits[layer]
        if limits is None or self._tiers is None:
            return {name: self._pool.read_pages(name, pages_M) for name in self._names(layer)}
        arrays = dict(self._tiers.read_pages(int(pages_M[0]), pages_M[:n_full]))
        if n_full < len(pages_M):
            page = self._tiers.read_open_page(int(pages_M[0]), int(pages_M[n_full]), n_full, limits)
            arrays["kv"] = np.concatenate([arrays["kv"], page[None]])
            arrays["summaries"] = np.pad(arrays["summaries"], [(0, 1), (0, 0), (0, 0), (0, 0)])
        return arrays

    def _page_of(self, name: str, layer: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The type and shape of one page of an array of a layer."""
        (kv,) = self._pool.read_pages("kv", np.arange(1))
        if name == "summaries":
            return kv.dtype, (kv.shape[1], self._summary_rows[layer], kv.shape[3])
        page = kv if name == "kv" else self._pool.read_pages(name, np.arange(1))[0]
        return page.dtype, page.shape

    def _names(self, layer: int) -> Sequence[str]:
        if layer not in self._recalls:
            return ("kv", "token_positions") if self._sums(layer) is None else ("kv", "token_positions", "scores")
        return ("kv", "summaries") if self._tiers is not None else ("kv", "token_positions", "summaries")

    def _sums(self, layer: int) -> Mapping[str, Any] | None:
        """The attributes of a layer's scores, if these go on over turns."""
        scored = self._scores[layer]
        return None if scored is None or int(scored["window"]) else scored

    def _pages_of(self, sequence: SequenceCache, layer: int) -> Ints:
        n_pages = -(-int(sequence.kv_len[layer]) // self._pool.page_size)
        pages: Ints = sequence.page_table[layer, :n_pages]
        return pages


def _unused(name: str, pages: np.ndarray, n_open: int) -> np.ndarray:
    """The part of an array's last page behind its first ``n_open`` tokens; a page that is not full has no summary."""
    last: np.ndarray = pages[-1]
    return {"kv": last[..., n_open:, :], "summaries": last}.get(name, last[..., n_open:])


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
    return _written(scores_MKP, positions_MKP, scored, n_prompt=n_prompt)


def _written(scores_MKP: np.ndarray, positions_MKP: np.ndarray, scored: Mapping[str, Any], *, n_prompt: int) -> np.ndarray:
    """The scores, with 0 in place of what there is where generated tokens have none."""
    return scores_MKP if int(scored["generated"]) else np.where(positions_MKP < n_prompt, scores_MKP, np.float32(0.0))
