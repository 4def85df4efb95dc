"""Changes of a request's logits before a token is chosen: penalties, biases, and tokens that may not come next."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.sampling.params import SamplingParams


class LogitsProcessor:
    """Applies the parameters of one request in the order of transformers and vLLM: repetition, frequency and presence penalty,
    ``logit_bias``, ``bad_words``, ``min_tokens``. The cost depends on the tokens concerned, besides one copy of the logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        end_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """``end_ids``: tokens that end the request, which ``min_tokens`` defers; ``bad_words``: token ids of each."""
        self._params = params
        self._end_ids = np.unique(np.asarray(end_ids, np.int64))
        self._bad_words = [tuple(word) for word in bad_words]
        self._longest = max((len(word) for word in self._bad_words), default=1) - 1
        self._recent = list(prompt_ids[len(prompt_ids) - self._longest :]) if self._longest else []
        self._bias_ids, self._biases = _arrays(params.logit_bias or {})
        self._generated: Counter[int] = Counter()
        repeats = params.repetition_penalty != 1.0
        self._seen = _GrowingSet(prompt_ids if repeats else ())
        self.is_needed = bool(
            repeats
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or self._bad_words
            or (params.min_tokens and len(self._end_ids))
        )
        """Whether logits are changed at all."""

    def accept(self, token_id: int) -> None:
        """Record a generated token."""
        if not self.is_needed:
            return
        self._generated[token_id] += 1
        self._seen.add(token_id)
        if self._longest:
            self._recent = [*self._recent, token_id][-self._longest :]

    def process(self, logits_V: Floats) -> Floats:
        """Changed logits [V], in an array of their own; ``-inf`` for tokens that may not come next."""
        params, changed_V = self._params, logits_V.copy()
        if params.repetition_penalty != 1.0:
            ids = self._seen.ids
            penalty, of_seen = np.float32(params.repetition_penalty), changed_V[ids]
            changed_V[ids] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        if self._generated and (params.frequency_penalty or params.presence_penalty):
            ids, counts = _arrays(self._generated)
            changed_V[ids] -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty)
        if len(self._bias_ids):
            changed_V[self._bias_ids] += self._biases
        for word in self._bad_words:
            if word[:-1] == tuple(self._recent[len(self._recent) - len(word) + 1 :]):
                changed_V[word[-1]] = -np.inf
        if params.min_tokens and self._generated.total() < params.min_tokens:
            changed_V[self._end_ids] = -np.inf
        return changed_V


class _GrowingSet:
    """Distinct token ids, as an array."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = set(ids)
        self._array: Ints = np.array(sorted(self._ids), np.int64)
        self._n = len(self._array)

    def add(self, token_id: int) -> None:
        if token_id in self._ids:
            return
        self._ids.add(token_id)
        if self._n == len(self._array):
            self._array = np.concatenate([self._array, np.empty(max(64, self._n), np.int64)])
        self._array[self._n] = token_id
        self._n += 1

    @property
    def ids(self) -> Ints:
        return self._array[: self._n]


def _arrays(values: Mapping[int, float]) -> tuple[Ints, Floats]:
    """Keys [N] int64 and values [N] fp32."""
    return np.fromiter(values.keys(), np.int64, len(values)), np.fromiter(values.values(), np.float32, len(values))
