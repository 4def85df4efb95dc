"""One request on its way from prompt to text: its sequence, its random numbers, its detokenizer, its end."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from trt_kv.errors import LogitsError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.reservation import RequestSize
from trt_kv.runtime.sampling import SamplingParams, log_probability, next_token
from trt_kv.runtime.text.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "error", "timeout", "cancelled"]


@dataclass(kw_only=True)
class RequestTimes:
    """When things happened, in seconds of ``time.monotonic``; None: not yet. ``prompt_s`` and ``decode_s``: its share of the
    steps that read its prompt, and of those that decoded it, in seconds.
    """

    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    tokens: list[float] = field(default_factory=list)
    """Of each generated token."""
    prompt_s: float = 0.0
    decode_s: float = 0.0

    @property
    def to_first_token_s(self) -> float | None:
        return self.tokens[0] - self.arrived if self.tokens else None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a request produced. ``kv_tokens``: per layer, how many of its ``num_computed_tokens`` were held at the end: in the
    cache, or in the working set where the cache stays on the host. ``error``: why the request could not go on, if it could
    not. ``seed``: draws the same tokens again.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    num_computed_tokens: int
    kv_tokens: tuple[int, ...]
    error: Exception | None = None
    seed: int = field(default=0, compare=False)
    times: RequestTimes = field(default_factory=RequestTimes, compare=False)


@dataclass(kw_only=True, eq=False)
class Request:
    """State of one request. Only the thread that runs steps changes it, but for ``pieces``, which clients take from the left,
    and ``cancelled``, which they set.

    ``limit`` is how many tokens it may generate, model positions considered. ``tokenizer`` None: token ids only, no text.
    ``forced``: tokens that are fed instead of chosen ones; ``log_probabilities`` then tells what the model gave each of them.
    ``forks`` go on from this request's prompt, which is read once, each with a copy of what was kept of it.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    eos_token_ids: Sequence[int]
    limit: int
    forced: Sequence[int] | None = None
    forks: Sequence["Request"] = ()
    on_update: Callable[[], None] | None = None
    """Called by whoever runs steps when there are new pieces, or the end. Must not block, raise or call the engine."""
    name: str = "the request"
    token_ids: list[int] = field(default_factory=list, init=False)
    log_probabilities: list[float] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    pieces: deque[str] = field(default_factory=deque, init=False)
    """Text that is certain and that the client has not taken yet."""
    cancelled: bool = field(default=False, init=False)
    n_prompt_read: int = field(default=0, init=False)
    """Tokens of the prompt that have been read."""
    prompt_kv_tokens: tuple[int, ...] = field(default=(), init=False)
    """Tokens held per layer once the prompt had been read and evicted from."""
    times: RequestTimes = field(default_factory=RequestTimes, init=False)
    held_sequence: SequenceCache | None = field(default=None, init=False)
    """Its cache, from its admission to its end."""

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(32) if self.params.seed is None else self.params.seed
        self._rng = np.random.default_rng(self.seed)
        self._detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer)
        self._text = ""
        self._n_emitted = 0
        self._held: tuple[int, tuple[int, ...]] | None = None

    @property
    def size(self) -> RequestSize:
        longest = max(self.limit, *(fork.limit for fork in self.forks), 0)
        return RequestSize(n_prompt=len(self.prompt_ids), max_new_tokens=longest, n_sequences=1 + len(self.forks))

    @property
    def priority(self) -> int:
        return self.params.priority

    @property
    def deadline(self) -> float | None:
        """When it ends at the latest, in seconds of ``time.monotonic``."""
        return None if self.params.timeout_s is None else self.times.arrived + self.params.timeout_s

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def sequence(self) -> SequenceCache:
        """Its cache; it has been admitted and has not ended."""
        assert self.held_sequence is not None
        return self.held_sequence

    def accept(self, logits_V: Floats) -> None:
        """Go on with the next token, chosen from logits [V] or forced; text that is certain by now goes to ``pieces``.

        Text that could be the beginning of a stop string is held back until it is known not to be one. ``LogitsError`` where
        the largest logit is not a finite number.
        """
        largest = float(logits_V.max())
        if not np.isfinite(largest):
            raise LogitsError(
                f"{self.name} cannot go on: the model's logits are not finite numbers",
                got=f"{largest} after {len(self.prompt_ids)} prompt tokens and {len(self.token_ids)} generated ones",
                fix="build the engine in a wider type (float32, or bfloat16 instead of float16), or check the checkpoint",
            )
        if self.forced is None:
            token_id = next_token(logits_V, self.params, self._rng)
        else:
            token_id = self.forced[len(self.token_ids)]
            self.log_probabilities.append(log_probability(logits_V, token_id))
        reason: FinishReason | None = None
        if token_id in self.eos_token_ids and self.forced is None:
            reason = "stop"
        else:
            self.token_ids.append(token_id)
            self.times.tokens.append(time.monotonic())
            self._text += "" if self._detokenizer is None else self._detokenizer.step(token_id)
            if len(self.token_ids) >= self.limit:
                reason = "length"
        self._say(reason)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End here, where it has not ended: what was generated so far is the result. Raises nothing: where a tokenizer fails
        at the last tokens, that is how the request ends.
        """
        if not self.is_finished:
            self.error = error
            try:
                self._say(reason)
            except Exception as broken:  # noqa: BLE001  (whoever ends a request of somebody else cannot do anything about it)
                self.error, self.finish_reason = error or broken, "error"

    def close(self) -> None:
        """Give the sequence's memory back, remembering what it held. May be called again."""
        if self.held_sequence is not None:
            self._held = self._held or self._holding(self.held_sequence)
            self.held_sequence.release()
            self.held_sequence = None

    def result(self) -> Generation:
        """What has been generated by now. May be asked from any thread."""
        sequence = self.held_sequence
        holding = (0, ()) if sequence is None else self._holding(sequence)
        held = self._held or holding  # looked at last: it is there before anything is given back
        return Generation(
            text=self._text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "length",
            n_prompt_tokens=len(self.prompt_ids),
            num_computed_tokens=held[0],
            kv_tokens=held[1],
            error=self.error,
            seed=self.seed,
            times=self.times,
        )

    @staticmethod
    def _holding(sequence: SequenceCache) -> tuple[int, tuple[int, ...]]:
        """(tokens seen, tokens cached per layer) of a sequence."""
        return sequence.num_computed_tokens, tuple(int(n) for n in sequence.held_tokens)

    def _say(self, reason: FinishReason | None) -> None:
        """Hand out the text that is certain; ``reason``: why it ends here, if it does. Clients in other threads look at
        ``is_finished`` first, so it is told last.
        """
        if reason is not None and self._detokenizer is not None:
            self._text += self._detokenizer.finish()
        found = [at for at in (self._text.find(stop) for stop in self.params.stop_texts) if at >= 0]
        if found:
            reason = "stop" if self.error is None else reason
            self._text = self._text[: min(found)]
        end = len(self._text) if reason is not None else len(self._text) - self._n_held_back()
        if end > self._n_emitted:
            self.pieces.append(self._text[self._n_emitted : end])
            self._n_emitted = end
        self.finish_reason = reason

    def _n_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (n for stop in self.params.stop_texts for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0
        )
