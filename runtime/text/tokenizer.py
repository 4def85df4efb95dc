"""The tokenizer of a checkpoint or an engine."""

import json
import secrets
from pathlib import Path

from tokenizers import Tokenizer

from trt_kv.errors import EngineError, TrtKvError
from trt_kv.manifest import TOKENIZER_FILE, Manifest
from trt_kv.safe_path import check_size, safe_join

MAX_TOKENIZER_BYTES = 128 * 2**20
"""Four times the largest that are published."""


def load_tokenizer(path: Path, *, error: type[TrtKvError]) -> Tokenizer:
    """The tokenizer in ``path``, without the truncation and padding that some files configure.

    Raises ``error`` if it is missing, too large or cannot be read.
    """
    if not path.is_file():
        raise error(
            f"{path} is missing",
            expected="the tokenizer as one tokenizer.json",
            fix="save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    check_size(path, MAX_TOKENIZER_BYTES, error=error)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as cause:  # the package raises no more specific class
        raise error(f"cannot read the tokenizer {path}", got=str(cause), expected="a tokenizers file") from cause
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_of_engine(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of an engine; ``EngineError`` if it cannot be read, or has tokens that the model does not have."""
    path = safe_join(folder, TOKENIZER_FILE, error=EngineError)
    tokenizer = load_tokenizer(path, error=EngineError)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= manifest.config.vocab_size:
        raise EngineError(
            f"{path} belongs to another model",
            got=f"token ids up to {largest}",
            expected=f"ids below {manifest.config.vocab_size}",
            fix="build the engine again",
        )
    return tokenizer


def literal_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer to which special tokens in a text, such as <eos>, are text like any other.

    ``encode_special_tokens`` alone is not enough: models of words and of unigrams may have the token among their words. So it
    is renamed, to something that nobody writes.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    unknown = model.get("unk_token")
    special = {token["content"] for token in description["added_tokens"] if token["special"]} - {unknown}
    names = {content: f"{content}{secrets.token_hex(8)}" for content in special}
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): index for word, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if model.get("merges"):
        pairs = map(_pair, model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    literal = Tokenizer.from_str(json.dumps(description))
    literal.encode_special_tokens = True
    return literal


def _pair(merge: str | list[str]) -> list[str]:
    """The two tokens of a merge, which older files write as one text."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge
