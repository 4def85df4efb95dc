"""The state of one request: its sequence, random number generator, detokenizer, text and finish reason."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from trt_kv.errors import LogitsError, NoTokenLeftError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.step import Choice, Chosen
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.cache.states import SequenceState
from trt_kv.runtime.generation import FinishReason, Generation, RequestRecall, RequestTimes, TokenLogprob
from trt_kv.runtime.prefix.cache import PrefixCache, PromptKeys
from trt_kv.runtime.reservation import RequestSize
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import log_probability, log_total, next_token, top_log_probabilities
from trt_kv.runtime.sampling.processors import LogitsProcessor
from trt_kv.runtime.sampling.structure import Structure
from trt_kv.runtime.text.detokenizer import Detokenizer
from trt_kv.runtime.text.prompts import token_ids_of_words
from trt_kv.runtime.text.stops import Stops


@dataclass(kw_only=True, eq=False)
class Request:
    """State of one request. Only the thread that runs steps changes it, except ``pieces``, which clients pop from the left, and
    ``cancelled``, which they set.

    ``limit``: the most tokens it may generate, given the model's positions. ``tokenizer`` None: token ids only, no text.
    ``forced``: tokens that are fed instead of sampled ones; ``log_probabilities`` then holds the model's log-probability of
    each. ``structure``: what the output must conform to, in the state of this request. ``forks``: requests with the same
    prompt, which is computed once; each fork continues on a copy of its KV cache.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    eos_token_ids: Sequence[int]
    limit: int
    forced: Sequence[int] | None = None
    structure: Structure | None = None
    forks: Sequence["Request"] = ()
    begins_with: SequenceState | None = None
    """What it goes on from, of which ``prompt_ids`` is the continuation."""
    keeps_state: bool = False
    """Whether what it holds at its end becomes ``state``."""
    on_update: Callable[[], None] | None = None
    """Called by the thread that runs steps, on new pieces and at the end. Must not block, raise or call the engine."""
    name: str = "the request"
    token_ids: list[int] = field(default_factory=list, init=False)
    log_probabilities: list[float] = field(default_factory=list, init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    pieces: deque[str] = field(default_factory=deque, init=False)
    """Final text that the client has not taken yet."""
    cancelled: bool = field(default=False, init=False)
    n_prompt_read: int = field(default=0, init=False)
    """Prompt tokens computed so far."""
    n_cached: int = field(default=0, init=False)
    """Those of them that were found in the prefix cache."""
    n_shared: int = field(default=0, init=False)
    """Prompt tokens at the beginning that are in pages of shared blocks (runtime/prefix/sharing.py)."""
    prompt_kv_tokens: tuple[int, ...] = field(default=(), init=False)
    """Tokens held per layer after prefill and its eviction."""
    times: RequestTimes = field(default_factory=RequestTimes, init=False)
    state: SequenceState | None = field(default=None, init=False)
    """What it held when it ended, if it ``keeps_state`` and did not fail."""
    held_sequence: SequenceCache | None = field(default=None, init=False)
    """Its KV cache, from admission to the end."""

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(32) if self.params.seed is None else self.params.seed
        self._rng = np.random.default_rng(self.seed)
        # Special tokens that are shown are found as text.
        self._stops = Stops(self.params.stop_texts, self.tokenizer if self.params.skip_special_tokens else None)
        own_ends = () if self.params.ignore_eos else self.eos_token_ids
        bad_words = token_ids_of_words(self.params.bad_words, self.tokenizer)
        self._processor = LogitsProcessor(
            self.params,
            self.prompt_ids,
            end_ids=[*own_ends, *self.params.stop_token_ids],
            bad_words=bad_words,
            structure=self.structure,
        )
        self._detokenizer = (
            None
            if self.tokenizer is None
            else Detokenizer(self.tokenizer, self.prompt_ids, skip_special_tokens=self.params.skip_special_tokens)
        )
        self._text = ""
        """All text, with the stand-ins of special tokens that are searched for."""
        self._n_emitted = 0
        self._held: tuple[int, tuple[int, ...], RequestRecall | None] | None = None
        self._prefix_keys: PromptKeys | None = None

    def prefix_keys(self, prefixes: PrefixCache) -> PromptKeys:
        """The keys of its prompt's blocks, for the thread that runs steps."""
        if self._prefix_keys is None:
            self._prefix_keys = prefixes.keys_of(self.prompt_ids, self.params.cache_salt)
        return self._prefix_keys

    @property
    def size(self) -> RequestSize:
        longest = max(self.limit, *(fork.limit for fork in self.forks), 0)
        before = self.begins_with
        return RequestSize(
            n_prompt=len(self.prompt_ids),
            max_new_tokens=longest,
            n_sequences=1 + len(self.forks),
            n_before=0 if before is None else before.num_computed_tokens,
            held=() if before is None else before.kv_len,
            n_shared=self.n_shared,
        )

    @property
    def family(self) -> tuple["Request", ...]:
        """The request and its forks."""
        return (self, *self.forks)

    @property
    def priority(self) -> int:
        return self.params.priority

    @property
    def deadline(self) -> float | None:
        """Latest end, in seconds of ``time.monotonic``; None: no timeout."""
        return None if self.params.timeout_s is None else self.times.arrived + self.params.timeout_s

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def sequence(self) -> SequenceCache:
        """Its KV cache. The request must have been admitted and not ended."""
        assert self.held_sequence is not None
        return self.held_sequence

    @property
    def needs_logits(self) -> bool:
        """Whether its tokens can only be chosen on the host, given all logits."""
        params = self.params
        changes = self._processor.is_needed or params.typical_p < 1.0
        return changes or self.forced is not None or params.top_logprobs is not None

    def choice(self) -> Choice:
        """How an executor is to choose its next token; takes the random number for it."""
        params = self.params
        if params.temperature == 0.0:
            return Choice()
        return Choice(
            temperature=float(params.temperature),
            top_k=int(params.top_k),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            uniform=self._rng.random(),
        )

    def accept(self, row: Floats | Chosen) -> None:
        """Append the next token, sampled from logits [V], chosen already or forced, and append text that is final by now to
        ``pieces``.

        Text that could be the beginning of a stop string is held back until it is known not to be one. ``LogitsError`` if the
        largest logit is not a finite number.
        """
        largest = row.largest if isinstance(row, Chosen) else float(row.max())
        if not np.isfinite(largest):
            raise LogitsError(
                f"{self.name} cannot continue: the model's logits are not finite numbers",
                got=f"{largest} after {len(self.prompt_ids)} prompt tokens and {len(self.token_ids)} generated ones",
                fix="build the engine in a wider type (float32, or bfloat16 instead of float16), or check the checkpoint",
            )
        if isinstance(row, Chosen):
            token_id = row.token_id
        elif self.forced is None:
            token_id = self._next_token(row)
        else:
            token_id = self.forced[len(self.token_ids)]
            self.log_probabilities.append(log_probability(row, token_id, log_total(row)))
        reason: FinishReason | None = None
        if self.forced is None and self._ends(token_id):
            reason = "stop"
        else:
            self.token_ids.append(token_id)
            self._processor.accept(token_id)
            if self.params.top_logprobs is not None and not isinstance(row, Chosen):
                total = log_total(row)
                top = top_log_probabilities(row, self.params.top_logprobs, total)
                logprob = log_probability(row, token_id, total)
                self.logprobs.append(TokenLogprob(token_id=token_id, logprob=logprob, top=top))
            self.times.tokens.append(time.monotonic())
            self._text += self._text_of(token_id)
            if self._processor.is_complete and len(self.token_ids) >= self.params.min_tokens:
                reason = "stop"
            elif len(self.token_ids) >= self.limit:
                reason = "length"
        self._say(reason)

    def _ends(self, token_id: int) -> bool:
        own_end = token_id in self.eos_token_ids and not self.params.ignore_eos
        return own_end or token_id in self.params.stop_token_ids

    def _next_token(self, logits_V: Floats) -> int:
        if not self._processor.is_needed:
            return next_token(logits_V, self.params, self._rng)
        changed_V = self._processor.process(logits_V)
        if not np.isfinite(changed_V.max()):
            raise NoTokenLeftError(
                f"{self.name} cannot continue: its parameters leave no token",
                got=f"{changed_V.max()} as the largest logit",
                fix="lower penalties and biases, shorten bad_words, or lower min_tokens if the output has a structure",
            )
        return next_token(changed_V, self.params, self._rng)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request if it has not ended. The tokens generated so far are its result.

        Raises no error: if the tokenizer cannot decode the last tokens, the request ends with "error" and the tokenizer's.
        """
        if not self.is_finished:
            self.error = error
            try:
                self._say(reason)
            except Exception as broken:  # noqa: BLE001  (ends this request only)
                self.error, self.finish_reason = error or broken, "error"

    def close(self) -> None:
        """Free the sequence's pages, after recording how many tokens it held. May be called again."""
        if self.held_sequence is not None:
            self._held = self._held or self._holding(self.held_sequence)
            self.held_sequence.release()
            self.held_sequence = None

    def result(self) -> Generation:
        """The result so far. May be called from any thread."""
        sequence = self.held_sequence
        holding = (0, (), None) if sequence is None else self._holding(sequence)
        held = self._held or holding  # read last: it is set before pages are freed
        return Generation(
            text=self._stops.shown(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "length",
            n_prompt_tokens=len(self.prompt_ids),
            n_cached_tokens=self.n_cached,
            num_computed_tokens=held[0],
            kv_tokens=held[1],
            error=self.error,
            seed=self.seed,
            times=self.times,
            logprobs=tuple(self.logprobs),
            recall=held[2],
            others=tuple(fork.result() for fork in self.forks) if self.params.n > 1 else (),
        )

    def _text_of(self, token_id: int) -> str:
        """The text that becomes final with a token, or the stand-in of a special token that a stop text names."""
        if self._detokenizer is None:
            return ""
        stand_in = self._stops.stand_ins.get(token_id)
        return self._detokenizer.step(token_id) if stand_in is None else self._detokenizer.finish() + stand_in

    @staticmethod
    def _holding(sequence: SequenceCache) -> tuple[int, tuple[int, ...], RequestRecall | None]:
        """(computed tokens, held tokens per layer, what was recalled) of a sequence."""
        return sequence.num_computed_tokens, tuple(int(n) for n in sequence.held_tokens), sequence.recalled

    def _say(self, reason: FinishReason | None) -> None:
        """Append the text that is final by now to ``pieces``. ``reason``: why the request ends here, if it does; set last,
        because other threads read the result as soon as ``is_finished``.
        """
        if reason is not None and self._detokenizer is not None:
            self._text += self._detokenizer.finish()
        found = self._stops.first_in(self._text) if len(self.token_ids) >= self.params.min_tokens else None
        if found is not None:
            reason = "stop" if self.error is None else reason
            self._text = self._text[:found]
        end = len(self._text) if reason is not None else len(self._text) - self._stops.n_begun(self._text)
        if end > self._n_emitted:
            if shown := self._stops.shown(self._text[self._n_emitted : end]):
                self.pieces.append(shown)
            self._n_emitted = end
        self.finish_reason = reason
