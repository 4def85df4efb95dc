"""One request on its way from prompt to text: its sequence, its random numbers, its detokenizer, its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from trt_kv.errors import TrtKvError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.sampling import SamplingParams, next_token
from trt_kv.runtime.text.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a request produced. ``kv_tokens`` are the tokens held per layer at the end, of ``n_seen`` that went by: cached ones,
    or the working set's where the cache stays on the host. ``error``: why the request could not go on, where it could not.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_seen: int
    kv_tokens: tuple[int, ...]
    error: TrtKvError | None = None


@dataclass(kw_only=True)
class Request:
    """State of one running request. ``limit`` is how many tokens it may generate, model positions considered."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer
    eos_token_ids: Sequence[int]
    limit: int
    sequence: SequenceCache
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: TrtKvError | None = None

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.params.seed)
        self._detokenizer = Detokenizer(self.tokenizer)
        self._text = ""
        self._n_emitted = 0
        self._held: tuple[int, tuple[int, ...]] | None = None

    def accept(self, logits_V: Floats) -> str:
        """Choose the next token from logits [V] and return the text that is certain by now (possibly none).

        Text that could be the beginning of a stop string is held back until it is known not to be one.
        """
        token_id = next_token(logits_V, self.params, self._rng)
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token_id)
            self._text += self._detokenizer.step(token_id)
            if len(self.token_ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._text += self._detokenizer.finish()
        found = [at for at in (self._text.find(stop) for stop in self.params.stop_texts) if at >= 0]
        if found:
            self.finish_reason = "stop"
            self._text = self._text[: min(found)]
        return self._emit(len(self._text) if self.finish_reason else len(self._text) - self._n_held_back())

    def fail(self, error: TrtKvError) -> str:
        """End here: what was generated so far is the result. Returns the text that was held back."""
        self.error, self.finish_reason = error, "error"
        self._text += self._detokenizer.finish()
        self.close()
        return self._emit(len(self._text))

    def close(self) -> None:
        """Give the sequence's memory back, remembering what it held."""
        self._held = self._held or self._holding()
        self.sequence.release()

    def _holding(self) -> tuple[int, tuple[int, ...]]:
        """(tokens seen, tokens cached per layer) of the sequence."""
        return self.sequence.n_seen, tuple(int(n) for n in self.sequence.held_tokens)

    def result(self) -> Generation:
        """The finished (or abandoned) request's product."""
        n_seen, kv_tokens = self._held or self._holding()
        return Generation(
            text=self._text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "length",
            n_prompt_tokens=len(self.prompt_ids),
            n_seen=n_seen,
            kv_tokens=kv_tokens,
            error=self.error,
        )

    def _emit(self, end: int) -> str:
        piece = self._text[self._n_emitted : end]
        self._n_emitted = max(self._n_emitted, end)
        return piece

    def _n_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (n for stop in self.params.stop_texts for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0
        )
