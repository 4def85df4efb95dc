"""Prompts as callers pass them to token ids of a model, checked."""

import functools
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from trt_kv.errors import UsageError
from trt_kv.prompt_tokens import prompt_tokens
from trt_kv.runtime.arguments import is_integer
from trt_kv.runtime.text.tokenizer import literal_tokenizer
from trt_kv.text_file import check_whole_characters

Prompt = str | Sequence[int]
"""Text, or token ids that are used as they are."""


class PromptEncoder:
    """Turns prompts into token ids for a model. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, *, max_positions: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._vocab_size = vocab_size

    def encode(
        self, prompt: Prompt, *, parse_special_tokens: bool = True, is_whole: bool = True, name: str = "the prompt"
    ) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts in front of a whole one, once; ids as they are.

        ``parse_special_tokens``: whether special tokens written in the text become control tokens, or are text like any other.
        ``UsageError``, which calls the prompt ``name``, for anything but a text or integers.
        """
        if not isinstance(prompt, str):
            return _checked_ids(prompt, name)
        check_whole_characters(prompt, what=name, fix="decode the bytes that it comes from with their encoding")
        tokenizer = self._tokenizer if parse_special_tokens else self._literal
        return prompt_tokens(tokenizer, prompt) if is_whole else list(tokenizer.encode(prompt, add_special_tokens=False).ids)

    def encode_fitting(self, prompt: Prompt, *, parse_special_tokens: bool, name: str) -> list[int]:
        """The same, for a prompt that the model can read; ``UsageError`` for any other."""
        ids = self.encode(prompt, parse_special_tokens=parse_special_tokens, name=name)
        if not ids or (isinstance(prompt, str) and not prompt.strip()):
            raise UsageError(f"{name} is empty", expected="at least one token", fix="pass some text")
        if len(ids) > self._max_positions:
            raise UsageError(
                f"{name} is longer than the model's positions",
                got=f"{len(ids)} tokens",
                expected=f"at most {self._max_positions}",
                fix="shorten the prompt or use a checkpoint with a longer context",
            )
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise UsageError(
                f"{name} has token ids outside the vocabulary",
                got=[min(ids), max(ids)],
                expected=f"0 .. {self._vocab_size - 1}",
            )
        return ids

    @functools.cached_property
    def _literal(self) -> Tokenizer:
        """A tokenizer that reads special tokens as text. A copy: changing the other would affect threads that use it."""
        return literal_tokenizer(self._tokenizer)


def _checked_ids(prompt: Any, name: str) -> list[int]:
    """Token ids from a sequence or array of integers."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview) else prompt
    if not isinstance(ids, Sequence) or isinstance(ids, bytes | bytearray | memoryview):
        is_bytes = isinstance(prompt, bytes | bytearray | memoryview)
        raise UsageError(
            f"{name} is neither text nor token ids",
            got=f"{type(prompt).__name__}: {str(prompt)[:40]}",
            expected="a text, or a list of integers",
            fix="decode it, as in prompt.decode()" if is_bytes else None,
        )
    for at, token in enumerate(ids):
        if not is_integer(token):
            raise UsageError(
                f"{name} has token ids that are no integers",
                got=f"{type(token).__name__} {str(token)[:40]!r} at index {at}",
                expected="a text, or a list of integers",
                fix="call generate_batch() for several prompts" if not isinstance(token, int | float) else None,
            )
    return [int(token) for token in ids]


def prompt_name(index: int, n_prompts: int) -> str:
    """What errors call a prompt."""
    return "the prompt" if n_prompts == 1 else f"prompts[{index}]"


def token_ids_of_words(words: Sequence[str | Sequence[int]], tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """Token ids of ``words``; a text gives those at the beginning of a line and those after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not isinstance(word, str):
            found[tuple(word)] = None
            continue
        if tokenizer is None:
            raise UsageError("bad_words are texts, but there is no tokenizer", got=repr(word), expected="lists of token ids")
        for text in (word, f" {word}"):
            found[tuple(tokenizer.encode(text, add_special_tokens=False).ids)] = None
    return [ids for ids in found if ids]
