"""Text of names and files, for terminals: it must not be able to move the cursor, or colour or reorder what follows."""

import unicodedata

_BIDIRECTIONAL = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reorder the text around them."""


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with control characters as escapes such as \\x1b; with ``lines`` except line ends."""
    return "".join(
        _shown(character) if _controls(character) and not (lines and character == "\n") else character for character in text
    )


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode()
