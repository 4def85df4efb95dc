"""Incremental detokenization."""

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 sequence to."""


class Detokenizer:
    """Decodes a growing list of tokens; text is returned as soon as no later token can change it.

    New tokens are decoded together with the tokens before them, because decoders treat the first token of a text differently. A
    character whose bytes are spread over several tokens is returned with the last of them. (``tokenizers.DecodeStream`` raises
    an error if a byte-fallback tokenizer retracts text that it had decoded.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that becomes final with ``token_id``; empty for special tokens."""
        self._pending.append(token_id)
        text = self._pending_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text still pending after the last token, without an incomplete character at its end."""
        text = self._pending_text().rstrip(INCOMPLETE)
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=True)[len(before) :]
