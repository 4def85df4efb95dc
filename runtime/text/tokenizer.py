"""The tokenizer of a checkpoint or an engine."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from trt_kv.errors import EngineError, TrtKvError
from trt_kv.manifest import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, Manifest
from trt_kv.prompt_tokens import with_renamed_tokens
from trt_kv.safe_path import check_size, safe_join


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
    unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special} - {unknown}
    literal, _ = with_renamed_tokens(tokenizer, special)
    literal.encode_special_tokens = True
    return literal
