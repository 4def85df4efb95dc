"""Changes of a request's logits before a token is chosen: penalties, biases, and tokens that may not come next."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.sampling.params import SamplingParams
from trt_kv.runtime.sampling.structure import Structure


class LogitsProcessor:
    """Applies the parameters of one request in the order of transformers and vLLM: repetition, frequency and presence penalty,
    ``logit_bias``, ``bad_words``, ``min_tokens``; and then the tokens that its structure has no place for. The cost depends on
    the tokens concerned, besides one copy of the logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        end_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        structure: Structure | None = None,
    ) -> None:
        """``end_ids``: tokens that end the request, which ``min_tokens`` defers; ``bad_words``: token ids of each."""
        self._params = params
        self._structure = structure
        self._end_ids = np.unique(np.asarray(end_ids, np.int64))
        self._bad_words = [tuple(word) for word in bad_words]
        self._longest = max((len(word) for word in self._bad_words), default=1) - 1
        self._recent = list(prompt_ids[len(prompt_ids) - self._longest :]) if self._longest else []
        self._bias_ids, self._biases = _arrays(params.logit_bias or {})
        repeats = params.repetition_penalty != 1.0
        self._seen = _GrowingSet(prompt_ids if repeats else ())
        self._generated = _GrowingSet(())
        self._n_generated = 0
        self.is_needed = bool(
            repeats
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or self._bad_words
            or (params.min_tokens and len(self._end_ids))
            or structure is not None
        )
        """Whether logits are changed at all."""

    def accept(self, token_id: int) -> None:
        """Record a generated token."""
        if not self.is_needed:
            return
        if self._structure is not None:
            self._structure.accept(token_id)
        self._generated.add(token_id)
        self._n_generated += 1
        self._seen.add(token_id)
        if self._longest:
            self._recent = [*self._recent, token_id][-self._longest :]

    def process(self, logits_V: Floats) -> Floats:
        """Changed logits [V], in an array of their own; ``-inf`` for tokens that may not come next."""
        params, changed_V = self._params, logits_V.copy()
        if params.repetition_penalty != 1.0:
            _penalise(changed_V, self._seen.ids, np.float32(params.repetition_penalty))
        if params.frequency_penalty or params.presence_penalty:
            frequency, presence = np.float32(params.frequency_penalty), np.float32(params.presence_penalty)
            _subtract(changed_V, self._generated.ids, self._generated.counts, frequency, presence)
        if len(self._bias_ids):
            changed_V[self._bias_ids] += self._biases
        for word in self._bad_words:
            if word[:-1] == tuple(self._recent[len(self._recent) - len(word) + 1 :]):
                changed_V[word[-1]] = -np.inf
        if params.min_tokens and self._n_generated < params.min_tokens:
            changed_V[self._end_ids] = -np.inf
        if self._structure is not None:
            self._structure.mask(changed_V, self._end_ids)
        return changed_V

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end can follow, because the output's structure is complete."""
        return self._structure is not None and self._structure.is_complete


@njit(nogil=True)
def _penalise(logits_V: Floats, ids_S: Ints, penalty: np.float32) -> None:
    """Make the tokens ``ids`` less likely, in place: divide logits above 0, multiply those below."""
    for token_id in ids_S:
        logit = logits_V[token_id]
        logits_V[token_id] = logit * penalty if logit < 0 else logit / penalty


@njit(nogil=True)
def _subtract(logits_V: Floats, ids_S: Ints, counts_S: Floats, frequency: np.float32, presence: np.float32) -> None:
    """Subtract ``frequency * count + presence`` from the logits of the tokens ``ids``, in place."""
    for at, token_id in enumerate(ids_S):
        logits_V[token_id] -= frequency * counts_S[at] + presence


class _GrowingSet:
    """Distinct token ids and how often each was added, as arrays."""

    def __init__(self, ids: Sequence[int]) -> None:
        counted = Counter(ids)
        self._at = {token_id: at for at, token_id in enumerate(counted)}
        self._ids, self._counts = _arrays(counted)

    def add(self, token_id: int) -> None:
        at = self._at.setdefault(token_id, len(self._at))
        if at == len(self._ids):
            more = max(64, at)
            self._ids = np.concatenate([self._ids, np.empty(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._ids[at] = token_id
        self._counts[at] += 1.0

    @property
    def ids(self) -> Ints:
        """[S] int64, in the order in which they were first added."""
        return self._ids[: len(self._at)]

    @property
    def counts(self) -> Floats:
        """[S] fp32, of each of ``ids``."""
        return self._counts[: len(self._at)]


def _arrays(values: Mapping[int, float]) -> tuple[Ints, Floats]:
    """Keys [N] int64 and values [N] fp32."""
    return np.fromiter(values.keys(), np.int64, len(values)), np.fromiter(values.values(), np.float32, len(values))
