"""Outputs that conform to a JSON schema, a regular expression or a grammar, by masking logits with llguidance.

Why this package: docs/decisions/0061-structured-output.md.
"""

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from trt_kv.errors import UsageError
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.require import require
from trt_kv.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_BITS = 32
_READERS = {"json_schema": "grammar_from_json_schema", "regex": "grammar_from_regex", "grammar": "grammar_from_lark"}
"""Methods of ``LLMatcher``."""


class Structure:
    """The state of one output: which tokens may come next."""

    def __init__(self, matcher: "LLMatcher", *, vocab_size: int, own_ends: Sequence[int], parameter: str) -> None:
        """``own_ends``: the tokens that the matcher takes for the end of an output."""
        self._matcher = matcher
        self._own_ends = np.asarray(own_ends, np.int64)
        self._parameter = parameter
        self._bits: np.ndarray[Any, np.dtype[np.int32]] = np.zeros(-(-vocab_size // _BITS), np.int32)

    def mask(self, logits_V: Floats, end_ids: Ints) -> None:
        """Set the logits of tokens that may not come next to ``-inf``, in place. ``end_ids`` may, where the output is complete.

        ``UsageError`` if the next tokens take too long to compute.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed_V = np.unpackbits(self._bits.view(np.uint8), count=len(logits_V), bitorder="little").view(np.bool_)
        allowed_V[self._own_ends] = False
        allowed_V[end_ids] = self._matcher.is_accepting()
        logits_V[~allowed_V] = -np.inf

    def accept(self, token_id: int) -> None:
        """Record a generated token, which the last mask allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the output conforms and nothing can be added to it."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._parameter, self._matcher.get_error())


class Structures:
    """Makes the structures of the requests of one engine. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._compiled: LLTokenizer | None = None

    def of(self, params: SamplingParams) -> Structure | None:
        """The structure that ``params`` ask for, at its beginning; None if they ask for none. ``UsageError`` for a schema,
        expression or grammar that cannot be used, ``MissingDependencyError`` without llguidance.
        """
        for name, given in params.structures.items():
            matcher_class = require("llguidance", extra="structured").LLMatcher
            try:
                text = given if isinstance(given, str) else json.dumps(given)
                grammar = getattr(matcher_class, _READERS[name])(text)
            except (TypeError, ValueError, RecursionError) as error:
                raise _refusal(name, str(error)) from error
            matcher = matcher_class(self._vocabulary(), grammar, log_level=0)
            if matcher.is_error():
                raise _refusal(name, matcher.get_error())
            return Structure(matcher, vocab_size=self._vocab_size, own_ends=self._end_ids, parameter=name)
        return None

    def _vocabulary(self) -> "LLTokenizer":
        """The tokenizer as llguidance reads it; takes a second for a large vocabulary, once."""
        with self._lock:
            if self._compiled is None:
                try:
                    self._compiled = require("llguidance", extra="structured").LLTokenizer(
                        self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._end_ids or None
                    )
                except ValueError as error:
                    raise UsageError(
                        "outputs of this engine cannot be given a structure",
                        got=f"a tokenizer that llguidance does not read: {str(error)[:200]}",
                        expected="a byte-level tokenizer, or one with byte fallback",
                    ) from error
            return self._compiled


def _refusal(parameter: str, reason: str) -> UsageError:
    what = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}[parameter]
    return UsageError(f"the {what} cannot be used", got=reason[:400], parameter=parameter)
