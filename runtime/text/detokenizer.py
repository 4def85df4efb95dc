"""Token ids to text, piece by piece."""

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 sequence to."""


class Detokenizer:
    """Decodes a growing list of tokens; text comes out as soon as no later token can change it.

    Each piece is what a few tokens say after the tokens before them, because decoders treat the first token of a text in their
    own way. A character whose bytes are spread over tokens comes out whole, with its last token. (``tokenizers.DecodeStream``
    raises where a byte-fallback tokenizer takes back text it had decoded.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain; special tokens have none."""
        self._pending.append(token_id)
        text = self._pending_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text still pending after the last token, without a character that has remained incomplete."""
        text = self._pending_text().rstrip(INCOMPLETE)
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=True)[len(before) :]
