"""The output tensors of a response: the text that is new, and what was asked for besides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trt_kv.runtime.generation import TokenLogprob
from trt_kv.runtime.request import Request


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is new of one sample. ``finish_reason`` None: it goes on. ``cumulative_logprob``: of all its tokens so far."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    cumulative_logprob: float
    finish_reason: str | None


@dataclass(kw_only=True)
class Progress:
    """Takes from a request what it has made since the last time. Used by one thread; another one runs the request's steps."""

    request: Request
    n_tokens: int = field(default=0, init=False)
    n_logprobs: int = field(default=0, init=False)
    total: float = field(default=0.0, init=False)

    def has_news(self, *, tokens: bool) -> bool:
        """Whether there is new text, or a new token if ``tokens`` count."""
        return bool(self.request.pieces) or (tokens and len(self.request.token_ids) > self.n_tokens)

    def take(self) -> Part:
        """All that is new. The end is seen first: nothing is added after it."""
        request = self.request
        reason = request.finish_reason
        pieces = []
        while request.pieces:
            pieces.append(request.pieces.popleft())
        token_ids, logprobs = request.token_ids[self.n_tokens :], request.logprobs[self.n_logprobs :]
        self.n_tokens += len(token_ids)
        self.n_logprobs += len(logprobs)
        self.total += sum(one.logprob for one in logprobs)
        return Part(
            text="".join(pieces),
            token_ids=token_ids,
            logprobs=logprobs,
            cumulative_logprob=self.total,
            finish_reason=reason,
        )


def output_arrays(
    parts: Sequence[Part], returned: frozenset[str], *, prefix: str, n_prompt_tokens: int, tokenizer: Tokenizer
) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs by name. ``parts``: of each sample. ``prefix`` is put in front of their texts.

    Counts are those of this response, so that the sum over responses is the request's. Why a sample ended is always told, and
    before its end "null", as vLLM's backend has it, where it is asked for.
    """
    arrays = {"text_output": _texts([prefix + part.text for part in parts])}
    reasons = [part.finish_reason or "null" for part in parts]
    if "finish_reason" in returned or "null" not in reasons:
        arrays["finish_reason"] = _texts(reasons)
    if "output_ids" in returned:
        arrays["output_ids"] = np.array(parts[0].token_ids, np.int32)
    if "num_input_tokens" in returned:
        arrays["num_input_tokens"] = np.array([n_prompt_tokens], np.uint32)
    if "num_output_tokens" in returned:
        arrays["num_output_tokens"] = np.array([len(part.token_ids) for part in parts], np.uint32)
    if "cumulative_logprob" in returned:
        arrays["cumulative_logprob"] = np.array([part.cumulative_logprob for part in parts], np.float32)
    if "logprobs" in returned:
        arrays["logprobs"] = _texts([json.dumps([_logprobs_of(one, tokenizer) for one in part.logprobs]) for part in parts])
    return arrays


def _logprobs_of(token: TokenLogprob, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """By token id: the likeliest tokens by rank, and the generated one; its rank is null if it is not among them."""
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(token.top, 1)}
    ranked.setdefault(token.token_id, (token.logprob, None))  # type: ignore[arg-type]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.decode([token_id])}
        for token_id, (logprob, rank) in ranked.items()
    }


def _texts(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([text.encode() for text in texts], np.object_)
