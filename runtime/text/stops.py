"""Stop texts, also those that name special tokens, which are not part of the text."""

import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

FIRST_STAND_IN = 0xD800
"""The first character that stands for a special token in searched text: a surrogate, as no tokenizer decodes to those."""


class Stops:
    """Searches a growing text for stop texts. The text has a character for each special token that a stop text names."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer | None) -> None:
        named = {} if tokenizer is None or not texts else _special_tokens_in(texts, tokenizer)
        stand_ins = {text: chr(FIRST_STAND_IN + n) for n, text in enumerate(named)}
        self.stand_ins: Mapping[int, str] = {token_id: stand_ins[text] for text, token_id in named.items()}
        """Characters by token id."""
        self._texts = [*texts, *dict.fromkeys(replaced for text in texts if (replaced := _replaced(text, stand_ins)) != text)]
        self._removed = dict.fromkeys(map(ord, stand_ins.values()))

    def first_in(self, text: str) -> int | None:
        """Where the first stop text in ``text`` begins; None if there is none."""
        return min((at for stop in self._texts if (at := text.find(stop)) >= 0), default=None)

    def n_begun(self, text: str) -> int:
        """Length of the longest end of ``text`` that may turn out to be the beginning of a stop text."""
        return max((_n_begun(stop, text) for stop in self._texts), default=0)

    def shown(self, text: str) -> str:
        """``text`` without the characters that stand for special tokens."""
        return text.translate(self._removed) if self._removed else text


def _n_begun(stop: str, text: str) -> int:
    """The longest end of ``text`` with which ``stop`` begins, and which is not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


def _special_tokens_in(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens that occur in ``texts``, by content, the longest first: one may be part of another."""
    added = tokenizer.get_added_tokens_decoder()
    found = {token.content: i for i, token in added.items() if token.special and any(token.content in text for text in texts)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _replaced(text: str, stand_ins: Mapping[str, str]) -> str:
    return re.sub("|".join(map(re.escape, stand_ins)), lambda match: stand_ins[match[0]], text) if stand_ins else text
