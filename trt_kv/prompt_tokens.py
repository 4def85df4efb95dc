"""Text of a prompt to token ids, with the special tokens that a tokenizer puts in front of it: once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def prompt_tokens(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of ``text`` as the tokenizer encodes it, special tokens included.

    A text that was rendered with a chat template begins with the token that the tokenizer puts in front, such as <bos>. It is
    then not put there a second time, as no model was trained on two.
    """
    ids = list(tokenizer.encode(text).ids)
    n_added = tokenizer.num_special_tokens_to_add(is_pair=False)
    if not ids or ids[0] not in ids[1 : n_added + 1]:
        return ids
    plain = list(tokenizer.encode(text, add_special_tokens=False).ids)
    in_front = next((n for n in range(1, n_added + 1) if ids[n : n + len(plain)] == plain), 0)
    return ids[in_front:] if plain[:in_front] == ids[:in_front] else ids
