"""Tokenizer loading and incremental detokenization."""

from pathlib import Path

from tokenizers import Tokenizer

from trt_kv.errors import TrtKvError

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 sequence to."""


def load_tokenizer(path: Path, *, error: type[TrtKvError]) -> Tokenizer:
    """The tokenizer in ``path``, without the truncation and padding that some files configure.

    Raises ``error`` if it is missing or cannot be read.
    """
    if not path.is_file():
        raise error(
            f"{path} is missing",
            expected="the tokenizer as one tokenizer.json",
            fix="save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as cause:  # the package raises no more specific class
        raise error(f"cannot read the tokenizer {path}", got=str(cause), expected="a tokenizers file") from cause
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
