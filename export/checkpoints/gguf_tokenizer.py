"""A GGUF file's tokenizer as the files of Hugging Face's: ``tokenizer.json``, ``tokenizer_config.json`` and chat templates.

Byte-level BPE is put together here. SentencePiece vocabularies go through transformers' converter, which derives the merges.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kv.errors import CheckpointError, TrtKvError
from trt_kv.export.checkpoints.gguf_config import CONTROL
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts
from trt_kv.require import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_USER_DEFINED = 4
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*%s"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama3": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "tekken": rf"{_WORDS % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    "gpt-4o": rf"{_WORDS % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}
"""How text is cut before the merges: the patterns that the models' own tokenizers publish."""
_GPT2, _DIGITS = "gpt-2", "digits"
"""GPT-2's pattern, which is that of ``ByteLevel``; and the same after each digit was cut off."""
_CUT_LIKE = {
    _GPT2: ("default", "gpt-2", "olmo", "mpt", "phi-2", "exaone4"),
    _DIGITS: ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone"),
    "llama3": ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "dbrx", "smaug-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"),
    "tekken": ("tekken",),
    "gpt-4o": ("gpt-4o", "llama4", "kanana2"),
}
_CUT_OF = {name: cut for cut, names in _CUT_LIKE.items() for name in names}
"""``tokenizer.ggml.pre`` to how it cuts."""
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")
"""Names whose words that are tokens stay whole whatever the merges, and which begin with BOS unless the file says otherwise."""
_TEMPLATE_NAME = re.compile(r"[\w-]{1,64}")
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """``kinds``: of each token, ``tokenizer.ggml.token_type``; ``named``: the tokens for ``bos`` and its like."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    named: dict[str, str]
    adds_bos: bool
    adds_eos: bool
    pre: str

    def added(self, kind: int) -> list[str]:
        return [token for token, known in zip(self.tokens, self.kinds, strict=True) if known == kind and token]


def write_tokenizer(facts: ModelFacts, config: dict[str, Any], folder: Path) -> None:
    """Write ``config``, the tokenizer and the chat templates into ``folder``, named as in a Hugging Face checkpoint.

    Raises ``CheckpointError`` for a kind of tokenizer that is not supported or is incomplete.
    """
    vocabulary = _vocabulary(facts)
    tokenizer = _tokenizer(facts, vocabulary)
    _write_json(folder / "config.json", config)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", ends)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        **{f"{name}_token": text for name, text in vocabulary.named.items()},
    }
    _write_json(folder / "tokenizer_config.json", settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_templates(facts, folder)


def check_tokenizer(facts: ModelFacts) -> None:
    """Raise ``CheckpointError`` for a kind of tokenizer that ``write_tokenizer`` would refuse."""
    kind, pre = facts.text("tokenizer.ggml.model", prefixed=False), _pre(facts)
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"{facts.path} has a tokenizer that trt-kv does not read from GGUF",
            got=f"tokenizer.ggml.model {kind!r}",
            expected="one of " + ", ".join(_BUILDERS),
            fix="pass the original checkpoint's folder, which has a tokenizer.json",
        )
    if kind == "gpt2" and pre not in _CUT_OF:
        raise CheckpointError(
            f"{facts.path} cuts text into words in a way that trt-kv does not know",
            got=f"tokenizer.ggml.pre {pre!r}",
            expected="one of " + ", ".join(sorted(_CUT_OF)),
            fix="pass the original checkpoint's folder, which has a tokenizer.json",
        )
    _vocabulary(facts)


def _pre(facts: ModelFacts) -> str:
    return facts.text("tokenizer.ggml.pre", prefixed=False) or "default"


def _vocabulary(facts: ModelFacts) -> _Vocabulary:
    tokens = facts.metadata["tokenizer.ggml.tokens"]
    kinds = facts.metadata.get("tokenizer.ggml.token_type")
    kinds = [1] * len(tokens) if kinds is None else kinds
    if not isinstance(kinds, np.ndarray | list) or len(kinds) != len(tokens) or any(isinstance(kind, str) for kind in kinds):
        raise facts.contradiction(
            "the vocabulary", f"{len(tokens)} tokens, another number of token types", "one type per token"
        )
    named = {}
    for name, key in _NAMED_TOKENS.items():
        token = facts.integer(f"tokenizer.ggml.{key}_token_id", prefixed=False)
        if token is not None:
            if token >= len(tokens):
                raise facts.contradiction("a special token", f"{key}_token_id {token!r}", f"an id below {len(tokens)}")
            named[name] = tokens[token]
    is_sentencepiece = facts.metadata.get("tokenizer.ggml.model") == "llama"
    adds_bos = facts.flag("tokenizer.ggml.add_bos_token", prefixed=False)
    return _Vocabulary(
        tokens=tokens,
        kinds=[int(kind) for kind in kinds],
        named=named,
        adds_bos=bool((is_sentencepiece or _pre(facts) in _WHOLE_WORDS) if adds_bos is None else adds_bos) and "bos" in named,
        adds_eos=bool(facts.flag("tokenizer.ggml.add_eos_token", prefixed=False)) and "eos" in named,
        pre=_pre(facts),
    )


def _tokenizer(facts: ModelFacts, vocabulary: _Vocabulary) -> "Tokenizer":
    from tokenizers import AddedToken, processors

    check_tokenizer(facts)
    try:
        tokenizer = _BUILDERS[facts.metadata["tokenizer.ggml.model"]](facts, vocabulary)
    except TrtKvError:
        raise
    except Exception as cause:  # the packages raise no more specific class
        raise facts.contradiction("the tokenizer", str(cause), "a vocabulary and its merges or scores") from cause
    special = [*vocabulary.added(CONTROL), *vocabulary.named.values()]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in dict.fromkeys(special) if text])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.added(_USER_DEFINED)])
    begin = [vocabulary.named["bos"]] if vocabulary.adds_bos else []
    end = [vocabulary.named["eos"]] if vocabulary.adds_eos else []
    if begin or end:
        ids = {text: tokenizer.token_to_id(text) for text in (*begin, *end)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *(f"{text}:1" for text in begin), "$B:1", *(f"{text}:1" for text in end)],
            special_tokens=list(ids.items()),
        )
    return tokenizer


def _byte_level(facts: ModelFacts, vocabulary: _Vocabulary) -> "Tokenizer":
    """BPE over bytes spelled as letters; tokens that are no such spelling are added tokens' texts."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = facts.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(
            f"{facts.path} has no merges", got="no tokenizer.ggml.merges", expected="the merges of its byte-level BPE"
        )
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise facts.contradiction("the tokenizer", f"a merge of {merge!r}", "merges of tokens that make a token")
        pairs.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=ids, merges=pairs, ignore_merges=vocabulary.pre in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _cut(_CUT_OF[vocabulary.pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _cut(name: str) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    if name == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(facts: ModelFacts, vocabulary: _Vocabulary) -> "Tokenizer":
    """Through transformers, without a space before the text if the file says so."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    scores = facts.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(vocabulary.tokens):
        raise facts.contradiction(
            "the vocabulary", "not one score per token", f"{len(vocabulary.tokens)} tokenizer.ggml.scores"
        )
    known = {"tokenizer_type": "llama", "tokens": list(vocabulary.tokens), "scores": scores.tolist()}
    known["token_type"] = list(vocabulary.kinds)
    if isinstance(facts.metadata.get("tokenizer.ggml.merges"), list):
        known["merges"] = facts.metadata["tokenizer.ggml.merges"]
    converter = require("transformers.integrations.gguf", extra="gguf")
    tokenizer: Tokenizer = converter.convert_gguf_tokenizer(facts.architecture, known)[0]
    tokenizer.post_processor = None
    adds_space = facts.flag("tokenizer.ggml.add_space_prefix", prefixed=False)
    if adds_space is False and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _write_templates(facts: ModelFacts, folder: Path) -> None:
    """The chat template, and others by name, e.g. ``tokenizer.chat_template.tool_use``."""
    prefix = "tokenizer.chat_template"
    for key, text in facts.metadata.items():
        name = key.removeprefix(f"{prefix}.")
        if key == prefix and isinstance(text, str):
            (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        elif name != key and isinstance(text, str) and _TEMPLATE_NAME.fullmatch(name):
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
