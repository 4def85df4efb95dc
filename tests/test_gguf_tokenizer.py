"""The tokenizer of a GGUF file gives the tokens of the one that it was made from, in files that transformers reads too."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tests.gguf_files import write_sample
from tests.gguf_samples import BYTE_LEVEL, TEMPLATE, VOCAB_SIZE
from tests.sample_tokenizers import BOS, EOS, TOKENIZERS
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_file import open_gguf

TEXTS = ["hello world", " hello  there;\n\n\tGrüße", "日本語 🎉 família", "a<|eot|>b</s>", "I'LL pay 12345 of 7.5%", "", "▁ ▁▁"]


def tokenizer_of(path: Path) -> Tokenizer:
    checkpoint = open_gguf(path)  # its files live as long as it does
    return Tokenizer.from_file(str(checkpoint.tokenizer_file))


def test_a_byte_level_vocabulary_gives_the_tokens_of_the_original(tmp_path: Path) -> None:
    """The original cuts text as GPT-2 does, and puts BOS in front."""
    original = TOKENIZERS["byte-level"]
    got = tokenizer_of(
        write_sample(tmp_path / "a.gguf", changes={"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True})
    )
    for text in TEXTS:
        encoding, expected = got.encode(text), original.encode(text)
        assert encoding.ids == expected.ids, text
        assert got.decode(encoding.ids) == original.decode(expected.ids)


@pytest.fixture(scope="module")
def read_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """One file in transformers' own reader, and in ours."""
    path = write_sample(tmp_path_factory.mktemp("gguf") / "a.gguf", changes={"tokenizer.ggml.add_bos_token": True})
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), tokenizer_of(path)


@given(text=st.text(alphabet=st.sampled_from("helo wrd,;'Lü日🎉\n\t 0123<|eot>/s"), max_size=40))
def test_tokens_are_those_of_transformers_for_the_same_file(text: str, read_by_transformers: tuple[Any, Tokenizer]) -> None:
    theirs, ours = read_by_transformers
    assert ours.encode(text).ids == theirs(text).input_ids


def test_transformers_loads_the_files_that_are_written(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "a.gguf"))
    loaded = transformers.AutoTokenizer.from_pretrained(checkpoint.tokenizer_file.parent)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (BOS, EOS)
    assert loaded.chat_template == TEMPLATE
    ours = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    for text in TEXTS:
        assert loaded(text).input_ids == ours.encode(text).ids
    rendered = loaded.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "<|user|>hello<|eot|>"


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, BOS, None),  # Llama 3's files do not say that it begins with BOS
        ({"tokenizer.ggml.add_bos_token": False}, None, None),
        ({"tokenizer.ggml.pre": "qwen2"}, None, None),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}, BOS, None),
        ({"tokenizer.ggml.add_eos_token": True}, BOS, EOS),
        ({"tokenizer.ggml.bos_token_id": ...}, None, None),
    ],
    ids=str,
)
def test_bos_and_eos_are_added_as_the_file_says(
    changes: dict[str, Any], first: int | None, last: int | None, tmp_path: Path
) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "a.gguf", changes=changes))
    ids = Tokenizer.from_file(str(checkpoint.tokenizer_file)).encode("hello").ids
    bare = Tokenizer.from_file(str(checkpoint.tokenizer_file)).encode("hello", add_special_tokens=False).ids
    assert ids == [*([first] if first else []), *bare, *([last] if last else [])]
    settings = json.loads(checkpoint.tokenizer_files["tokenizer_config.json"].read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (first is not None, last is not None)


def test_control_tokens_are_special_whatever_their_letters(tmp_path: Path) -> None:
    """DeepSeek's are written with letters that no byte is spelled with; the added token is the one of the vocabulary."""
    tokens = list(BYTE_LEVEL["tokenizer.ggml.tokens"])
    tokens[BOS] = "<｜begin▁of▁text｜>"
    kinds = list(BYTE_LEVEL["tokenizer.ggml.token_type"])
    kinds[290] = 4
    tokens[290] = "<think>"
    merges = [merge for merge in BYTE_LEVEL["tokenizer.ggml.merges"] if "".join(merge.split()) in tokens]
    merges = [merge for merge in merges if set(merge.split()) <= set(tokens)]
    path = write_sample(
        tmp_path / "a.gguf",
        changes={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": kinds},
    )
    tokenizer = tokenizer_of(path)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    ids = tokenizer.encode("<｜begin▁of▁text｜>hello<think>", add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (BOS, 290)
    assert tokenizer.decode(ids) == "hello<think>"


CUTS = {
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", " of", " ", "7", ".", "5", "%\n\n", "ÜberGröße", "  ", " x"],
    "qwen2": ["I", "'ll", " pay", " ", *"12345", " of", " ", "7", ".", "5", "%\n\n", "ÜberGröße", "  ", " x"],
    "tekken": ["I", "'ll", " pay", " ", *"12345", " of", " ", "7", ".", "5", "%\n\n", "Über", "Größe", "  ", " x"],
    "gpt-4o": ["I'll", " pay", " ", "123", "45", " of", " ", "7", ".", "5", "%\n\n", "Über", "Größe", "  ", " x"],
    "smollm": ["I", "'ll", " pay", " ", *"12345", " of", " ", "7", ".", "5", "%", "\n", "\n", "ÜberGröße", "  ", " x"],
    "gpt-2": ["I", "'ll", " pay", " 12345", " of", " 7", ".", "5", "%", "\n", "\n", "ÜberGröße", "  ", " x"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_model_was_trained(pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(write_sample(tmp_path / "a.gguf", changes={"tokenizer.ggml.pre": pre}))
    assert tokenizer.pre_tokenizer is not None
    text = "I'll pay 12345 of 7.5%\n\nÜberGröße   x"
    pieces = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert pieces == CUTS[pre]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
@given(text=st.text(alphabet=st.sampled_from("aBéÉ 's'LL日12\r\n\t.%-/ "), max_size=30))
def test_cuts_are_those_of_transformers_patterns(pre: str, text: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    from trt_kv.export.checkpoints.gguf_tokenizer import _CUT_OF, _cut

    theirs = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated").pre_tokenize_str(text)
    ours = _cut(_CUT_OF[pre]).pre_tokenize_str(text)
    assert [place for _, place in ours] == [place for _, place in theirs]


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary with byte tokens and scores, of as many tokens as the sample model has."""
    words = ["▁", "e", "h", "l", "o", "t", "r", "▁h", "he", "ll", "▁he", "llo", "▁hello", "▁t", "re", "▁the", "he", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", "<|eot|>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    kinds = [2, 3, 3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 261)]
    tokens += [f"[PAD{number}]" for number in range(VOCAB_SIZE - len(tokens))]
    kinds += [5] * (VOCAB_SIZE - len(kinds))
    assert len(tokens) == VOCAB_SIZE
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(number) for number in range(VOCAB_SIZE)],
        "tokenizer.ggml.merges": ...,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "phi3"])
def test_a_sentencepiece_vocabulary_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    """Which depend on the architecture: where a space is put in front, and how spaces are spelled."""
    changes = {**sentencepiece_metadata(), "tokenizer.ggml.add_bos_token": True}
    path = write_sample(tmp_path / "a.gguf", name, changes=changes)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    ours = tokenizer_of(path)
    for text in ["hello the tree", " hello", "  x", "日本 hello<|eot|>", ""]:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert ours.encode("hello").tokens[:2] == (["<s>", "he"] if name.startswith("gemma") else ["<s>", "▁hello"])


def test_without_a_prefix_space_text_begins_as_it_is(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "a.gguf", changes={**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": False})
    tokenizer = tokenizer_of(path)
    assert tokenizer.encode("hello", add_special_tokens=False).tokens[0] != "▁hello"
    for text in ("hello", " hello", "the hello"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.merges": ...}, "no merges"),
        ({"tokenizer.ggml.merges": ["h nonsense"]}, "a merge of 'h nonsense'"),
        ({"tokenizer.ggml.merges": ["h"]}, "a merge of 'h'"),
        ({**sentencepiece_metadata(), "tokenizer.ggml.scores": ...}, "one score per token"),
        ({**sentencepiece_metadata(), "tokenizer.ggml.scores": [1.0]}, "one score per token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_a_tokenizer_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "a.gguf", changes=changes))
    with pytest.raises(CheckpointError) as caught:
        assert checkpoint.tokenizer_files
    assert words in str(caught.value)


def test_named_chat_templates_keep_their_names(tmp_path: Path) -> None:
    changes = {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_template.../evil": "x"}
    checkpoint = open_gguf(write_sample(tmp_path / "a.gguf", changes=changes))
    names = {name for name in checkpoint.tokenizer_files if name.endswith(".jinja")}
    assert names == {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert not list(checkpoint.tokenizer_file.parent.parent.glob("evil*"))


def test_whole_words_are_tokens_before_any_merge(tmp_path: Path) -> None:
    """As in Llama 3's tokenizer: a word that is a token needs no merges that lead to it."""
    tokens = list(BYTE_LEVEL["tokenizer.ggml.tokens"])
    tokens[-1] = "zqz"
    merges = [merge for merge in BYTE_LEVEL["tokenizer.ggml.merges"] if "".join(merge.split()) in tokens]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    tokenizer = tokenizer_of(write_sample(tmp_path / "a.gguf", changes=changes))
    assert tokenizer.encode("zqz", add_special_tokens=False).tokens == ["zqz"]
    tokenizer = tokenizer_of(write_sample(tmp_path / "b.gguf", changes={**changes, "tokenizer.ggml.pre": "qwen2"}))
    assert tokenizer.encode("zqz", add_special_tokens=False).tokens == ["z", "q", "z"]
