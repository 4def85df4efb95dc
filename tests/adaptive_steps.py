"""Steps for AdaptiveBudget: sequences of cached tokens whose keys, positions and scores a test knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trt_kv.plugins.cases import POISON
from trt_kv.plugins.registry import op_specs

SPEC = op_specs()["AdaptiveBudget"]
DEFAULTS = {a.name: a.default for a in SPEC.attributes if a.default is not None}


@dataclass(frozen=True, kw_only=True)
class Cached:
    """One sequence in one layer: positions and scores [K, S], keys [K, S, D], and the query whose attention is measured: q
    [H, D], lse [H].
    """

    positions: np.ndarray
    scores: np.ndarray
    k: np.ndarray
    q: np.ndarray
    lse: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.positions[0])

    def in_slots(self, order_S: np.ndarray) -> "Cached":
        """The same tokens in other slots."""
        return self._with(lambda tensor: tensor[:, order_S])

    def with_repeated_heads(self, times: int) -> "Cached":
        """Each KV head several times."""
        return self._with(lambda tensor: np.repeat(tensor, times, axis=0))

    def _with(self, change: Callable[[np.ndarray], np.ndarray]) -> "Cached":
        return replace(self, positions=change(self.positions), scores=change(self.scores), k=change(self.k))


def draw(rng: np.random.Generator, n_tokens: int, *, n_heads: int = 6, n_kv_heads: int = 3, own_tokens: bool = False) -> Cached:
    """Random tokens with a sink that draws attention; ``own_tokens``: each KV head holds other ones."""
    head_size = 7
    k_KSD = rng.standard_normal((n_kv_heads, n_tokens, head_size), np.float32)
    q_HD = rng.standard_normal((n_heads, head_size), np.float32) * rng.uniform(0.5, 4)
    rows = [rng.choice(3 * n_tokens + 1, n_tokens, replace=False) for _ in range(n_kv_heads if own_tokens else 1)]
    positions_KS = np.broadcast_to(np.stack(rows), (n_kv_heads, n_tokens)).astype(np.int64)
    k_KSD[positions_KS == positions_KS.min(axis=1, keepdims=True)] *= 3
    logits_HS = np.einsum("hd,hsd->hs", q_HD, np.repeat(k_KSD, n_heads // n_kv_heads, axis=0)) * head_size**-0.5
    scores_KS = rng.random((n_kv_heads, n_tokens), np.float32) ** 4
    lse_H = np.log(np.exp(logits_HS.astype(np.float64)).sum(axis=1)).astype(np.float32)
    return Cached(positions=positions_KS, scores=scores_KS, k=k_KSD, q=q_HD, lse=lse_H)


def step_of(sequences: Sequence[Cached], *, n_new: int = 1, evict: Sequence[int] | None = None) -> dict[str, Any]:
    """The op's inputs for a step of ``n_new`` tokens of each sequence; what the op must not read is poison, values too."""
    page_size, layer = 5, 1
    n_kv_heads, _, head_size = sequences[0].k.shape
    n_heads = len(sequences[0].q)
    n_pages_B = [-(-sequence.n_tokens // page_size) for sequence in sequences]
    pages = list(np.random.default_rng(sum(n_pages_B)).permutation(sum(n_pages_B) + 2))
    inputs: dict[str, Any] = {
        "q": np.full((n_new * len(sequences), n_heads, head_size), np.nan, np.float32),
        "lse": np.full((n_new * len(sequences), n_heads), np.nan, np.float32),
        "cu_tokens": np.arange(len(sequences) + 1) * n_new,
        "evict": np.array([1] * len(sequences) if evict is None else evict),
        "page_table": np.full((layer + 1, len(sequences), max(n_pages_B) + 1), -1),
        "kv_len": np.array([[POISON] * len(sequences), [sequence.n_tokens for sequence in sequences]]),
        "kv": np.full((len(pages), 2, n_kv_heads, page_size, head_size), np.nan, np.float32),
        "token_positions": np.full((len(pages), n_kv_heads, page_size), POISON),
        "scores": np.full((len(pages), n_kv_heads, page_size), np.nan, np.float32),
    }
    for b, sequence in enumerate(sequences):
        own_pages = np.array([pages.pop() for _ in range(n_pages_B[b])])
        inputs["page_table"][layer, b, : n_pages_B[b]] = own_pages
        t, offset = np.divmod(np.arange(sequence.n_tokens), page_size)
        inputs["kv"][own_pages[t], 0, :, offset] = sequence.k.transpose(1, 0, 2)
        inputs["token_positions"][own_pages[t], :, offset] = sequence.positions.T
        inputs["scores"][own_pages[t], :, offset] = sequence.scores.T
        last = (b + 1) * n_new - 1
        inputs["q"][last], inputs["lse"][last] = sequence.q, sequence.lse
    return inputs | DEFAULTS | {"layer": layer, "page_size": page_size, "scale": head_size**-0.5, "threshold": 0.01}
