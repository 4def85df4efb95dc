"""Text of a prompt to token ids, with the special tokens that a tokenizer puts in front of it: once."""

import json
import secrets
from collections.abc import Collection
from typing import Any, Protocol, TypeVar


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


class RenamableTokenizer(Tokenizer, Protocol):
    """The part of ``tokenizers.Tokenizer`` that describes itself."""

    def to_str(self) -> str:
        """The tokenizer as JSON."""
        ...

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Tokens beside those of the model, by id; each has ``content`` and ``special``."""
        ...


Renamed = TypeVar("Renamed", bound=RenamableTokenizer)


def with_renamed_tokens(tokenizer: Renamed, contents: Collection[str]) -> tuple[Renamed, dict[str, str]]:
    """A copy of a tokenizer in which added tokens have names that nobody writes, and these names by the old ones.

    The old names are text like any other, also to models of words and of unigrams that have them among their words.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    names = {content: f"{content}{secrets.token_hex(8)}" for content in contents}
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): index for word, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if model.get("merges"):
        pairs = map(_pair, model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    renamed: Renamed = type(tokenizer).from_str(json.dumps(description))  # type: ignore[attr-defined]
    return renamed, names


def _pair(merge: str | list[str]) -> list[str]:
    """The two tokens of a merge, which older files write as one text."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge
