"""Incremental detokenization."""

import os
from collections.abc import Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 sequence to."""
CHARACTER_BYTES = 4
"""Most bytes, and so tokens, of a character."""
MOST_PENDING = 4 * CHARACTER_BYTES
"""Tokens after which undecodable bytes are no unfinished character, which bounds the cost of a token."""
CONTEXT = 8
"""Tokens of the prompt that the first new tokens are decoded with, if their text is enough; else twice as many, and so on."""


class Detokenizer:
    """Decodes the tokens after a prompt; text is returned as soon as no later token can change it.

    The text continues the prompt's: new tokens are decoded together with the tokens before them, because decoders treat the
    first token of a text differently, and drop a space there. A character whose bytes are spread over several tokens is
    returned with the last of them, whole, even if the first ones end the prompt. (``tokenizers.DecodeStream`` raises an error
    if a byte-fallback tokenizer retracts text that it had decoded.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._context, self._pending = self._end_of(prompt_ids)
        self._in_prompt = ""
        self._in_prompt = self._pending_text()
        """What the prompt shows for the tokens that are pending at its end."""

    def step(self, token_id: int) -> str:
        """The text that becomes final with ``token_id``; empty for special tokens, if they are skipped."""
        self._pending.append(token_id)
        text = self._pending_text()
        if not text and self._is_special(token_id):
            self._pending.pop()
            return ""
        if (not text or text.endswith(INCOMPLETE)) and len(self._pending) < MOST_PENDING:
            return ""
        self._context, self._pending, self._in_prompt = self._pending, [], ""
        return text

    def finish(self) -> str:
        """The text still pending after the last token, without an incomplete character at its end."""
        text = self._pending_text().rstrip(INCOMPLETE)
        self._context, self._pending, self._in_prompt = self._pending or self._context, [], ""
        return text

    def _end_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The last tokens of a prompt, and apart from them those of the character in which it ends, if that is not whole.

        They are enough to have a text, which special tokens have not, that begins with a whole character.
        """
        n_tokens = CONTEXT
        context = list(prompt_ids[-n_tokens:])
        while n_tokens < len(prompt_ids) and self._decode(context)[:1] in ("", INCOMPLETE):
            n_tokens *= 2
            context = list(prompt_ids[-n_tokens:])
        if self._decode(context).endswith(INCOMPLETE):
            for end in range(len(context) - 1, max(0, len(context) - CHARACTER_BYTES), -1):
                if not self._decode(context[:end]).endswith(INCOMPLETE):
                    return context[:end], context[end:]
        return context, []

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
        return text[len(os.path.commonprefix([text, self._in_prompt])) :]  # noqa: RUF071  (of texts, character by character)

    def _is_special(self, token_id: int) -> bool:
        """Whether a token has text, but not for readers."""
        return not self._decode([token_id]) and bool(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special)
