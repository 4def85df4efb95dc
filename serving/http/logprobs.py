"""Log-probabilities of tokens, in the forms of chats and of completions."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from trt_kv.runtime.generation import TokenLogprob

_LEAST = -9999.0
"""Stands for minus infinity, which JSON has not."""
_INCOMPLETE = "\ufffd"


def text_of_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token in the middle of a text: decoders drop a space in front of the first one."""
    alone = tokenizer.decode([token_id], skip_special_tokens=False)
    return tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat."""
    content = [
        {
            **_entry(tokenizer, one.token_id, one.logprob),
            "top_logprobs": [_entry(tokenizer, token_id, logprob) for token_id, logprob in one.top],
        }
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, offset: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion, whose text so far has ``offset`` characters."""
    tokens = [text_of_token(tokenizer, one.token_id) for one in logprobs]
    offsets = [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, _LEAST) for one in logprobs],
        "top_logprobs": [
            {text_of_token(tokenizer, token_id): max(logprob, _LEAST) for token_id, logprob in one.top} for one in logprobs
        ],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = text_of_token(tokenizer, token_id)
    whole = _INCOMPLETE not in text  # a token may be a part of a character, which has no text
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode()) if whole else None}
