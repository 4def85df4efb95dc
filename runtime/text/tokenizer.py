"""The tokenizer of a checkpoint or an engine."""

from pathlib import Path

from tokenizers import Tokenizer

from trt_kv.errors import TrtKvError


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
