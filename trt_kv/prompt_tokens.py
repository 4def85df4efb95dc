"""Text of a prompt to token ids, with the special tokens that a tokenizer puts in front of it: once."""

from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` that encodes."""

    def encode(self, sequence: str, /, *, add_special_tokens: bool = True) -> Any:
        """An encoding, whose ``ids`` are the token ids."""
        ...

    def num_special_tokens_to_add(self, is_pair: bool, /) -> int:
        """Number of special tokens that are added to a text."""
        ...


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` as the tokenizer encodes it, special tokens included.

    A text that was rendered with a chat template begins with the token that the tokenizer puts in front, such as <bos>. It is
    then not put there a second time, as no model was trained on two.
    """
    ids = list(tokenizer.encode(text).ids)
    n_added = tokenizer.num_special_tokens_to_add(False)
    if not ids or ids[0] not in ids[1 : n_added + 1]:
        return ids
    plain = list(tokenizer.encode(text, add_special_tokens=False).ids)
    in_front = next((n for n in range(1, n_added + 1) if ids[n : n + len(plain)] == plain), 0)
    return ids[in_front:] if plain[:in_front] == ids[:in_front] else ids
