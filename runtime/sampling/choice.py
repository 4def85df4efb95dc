"""The choice of the next token from its logits: greedy, or drawn from what the filters leave.

Filters in transformers' order: temperature, top-k, nucleus (top-p, arXiv 1904.09751), min-p (arXiv 2407.01082), locally typical
(arXiv 2202.00666). Each sees the probabilities that the filters before it leave, renormalised. Nothing sorts the vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.sampling.params import SamplingParams
from trt_kv.runtime.sampling.selection import drawn, drop_below, keep_best, negated_distance, scaled_exp, sums

_COLDEST = 1e-30
"""Below it, a temperature has no fp32 reciprocal; any other token has long lost its probability there."""
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Tokens ``ids`` [S] in ascending order, None for the whole vocabulary, and their ``weights`` [S], proportional to their
    probabilities; fp32, at most 1, and 0 for those that a filter has removed.
    """

    ids: Ints | None
    weights: Floats

    def draw(self, rng: np.random.Generator) -> int:
        """One of the tokens, by its weight."""
        index = drawn(self.weights, rng.random())
        return index if self.ids is None else int(self.ids[index])


def next_token(logits_V: Floats, params: SamplingParams, rng: np.random.Generator) -> int:
    """One token id for logits [V]; one random number unless greedy. Greedy takes the lowest id among equal logits."""
    if params.temperature == 0.0:
        return int(np.argmax(logits_V))
    return candidates_of(logits_V, params).draw(rng)


def candidates_of(logits_V: Floats, params: SamplingParams) -> Candidates:
    """What the filters of ``params`` leave of logits [V] fp32, of which at least one is finite."""
    ids = _best(logits_V, params.top_k) if 0 < params.top_k < len(logits_V) else None
    kept = logits_V if ids is None else logits_V[ids]
    x, weights = scaled_exp(kept, kept.max(), np.float32(1.0 / max(params.temperature, _COLDEST)))
    if params.top_p < 1.0:
        keep_best(x, weights, params.top_p * sums(weights, x)[0])
    if params.min_p > 0.0:
        drop_below(weights, weights, np.float32(params.min_p))
    if params.typical_p < 1.0:
        _keep_typical(x, weights, params.typical_p)
    return Candidates(ids=ids, weights=weights)


def log_total(logits_V: Floats) -> float:
    """log of the sum of exp(logits), which turns logits into log-probabilities."""
    largest = float(logits_V.max())
    return largest + float(np.log(np.exp(logits_V - np.float32(largest)).sum(dtype=np.float64)))


def log_probability(logits_V: Floats, token_id: int, total: float) -> float:
    """Log-probability of a token under logits [V] with ``log_total`` ``total``."""
    return float(logits_V[token_id]) - total


def top_log_probabilities(logits_V: Floats, n: int, total: float) -> tuple[tuple[int, float], ...]:
    """The ``n`` likeliest tokens under logits [V] with ``log_total`` ``total``, with their log-probabilities, likeliest first,
    equal ones by id.
    """
    ids = _best(logits_V, min(n, len(logits_V))) if n else np.empty(0, np.int64)
    ids = ids[np.argsort(-logits_V[ids], kind="stable")]
    return tuple((int(i), log_probability(logits_V, i, total)) for i in ids)


def _best(logits_V: Floats, k: int) -> Ints:
    """The ``k`` tokens with the largest logits, in ascending order; of equal ones the first."""
    n_blocks = len(logits_V) // _BLOCK
    if k <= n_blocks:  # the k-th largest of the blocks' maxima is at most the k-th largest logit
        maxima = logits_V[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        likely = np.flatnonzero(logits_V >= np.partition(maxima, n_blocks - k)[n_blocks - k])
    else:
        likely = np.arange(len(logits_V))
    counted = np.isfinite(logits_V[likely]).astype(np.float32)
    keep_best(logits_V[likely], counted, float(k))
    chosen: Ints = likely[counted > 0.0]
    if len(chosen) < k:  # the others may not come next
        hidden = likely[np.isneginf(logits_V[likely])]
        chosen = np.sort(np.concatenate([chosen, hidden[: k - len(chosen)]]))
    return chosen


def _keep_typical(x_S: Floats, weights_S: Floats, mass: float) -> None:
    """Set all weights to 0 but those of the tokens whose information is closest to the distribution's entropy, until they have
    ``mass`` of it. Information is ``log(total) - x``, its mean is the entropy. ``x`` [S] is overwritten.
    """
    total, of_products = sums(weights_S, x_S)
    negated_distance(x_S, np.float32(of_products / total))
    keep_best(x_S, weights_S, mass * total)
