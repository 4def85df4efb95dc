"""The text of a continuation: what the tokens of prompt and continuation say together, less the prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.sample_tokenizers import BOS, EOS, EOT, TOKENIZERS, USER
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.text import detokenizer as detokenizer_module
from trt_kv.runtime.text.detokenizer import MOST_PENDING, Detokenizer

texts = st.text("aehlo  ,é日🎉\n", max_size=40)
specials = st.lists(st.sampled_from([BOS, USER, EOT]), max_size=30)


def pieces_after(tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.step(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
@given(text=texts, cut=st.integers(0, 60), after=specials)
def test_prompt_and_text_are_what_the_tokens_say(kind: str, text: str, cut: int, after: list[int]) -> None:
    """Wherever the prompt ends, except inside a character, and with any special tokens at its end."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    prompt, rest = ids[: cut + 1] + after, ids[cut + 1 :]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    if not before.endswith("\ufffd"):
        assert before + "".join(pieces_after(tokenizer, prompt, rest)) == whole


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
@given(text=texts, cut=st.integers(0, 60), special=specials)
def test_special_tokens_between_change_no_text(kind: str, text: str, cut: int, special: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    first, *ids = tokenizer.encode(text).ids
    pieces = pieces_after(tokenizer, [first], ids[:cut] + special + ids[cut:])
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
def test_a_character_that_begins_in_the_prompt_is_shown_whole(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("ah 🎉🎊🎉 oh").ids
    inside = [cut for cut in range(len(ids)) if tokenizer.decode(ids[:cut]).endswith("\ufffd")]
    assert len(inside) >= 2
    for cut in inside:
        before = max((tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(cut + 1)), key=len)
        assert before + "".join(pieces_after(tokenizer, ids[:cut], ids[cut:])) == tokenizer.decode(ids)


@given(text=texts)
def test_a_replacement_character_at_the_end_of_the_prompt_is_a_character(text: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prompt, rest = tokenizer.encode("hello\ufffd").ids, tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces_after(tokenizer, prompt, rest)) == text


@pytest.mark.parametrize("kind", ["byte-fallback", "metaspace"])
def test_an_indent_keeps_its_spaces(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("hello\n").ids
    rest = tokenizer.encode("hello\n    a").ids[len(prompt) :]
    assert "".join(pieces_after(tokenizer, prompt, rest)) == "    a"


def test_a_stop_text_that_begins_with_a_space_is_found_at_the_start() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    prompt = tokenizer.encode("hello").ids
    rest = tokenizer.encode("hello a hello").ids[len(prompt) :]
    request = Request(
        prompt_ids=prompt,
        params=SamplingParams(stop=" a"),
        tokenizer=tokenizer,
        eos_token_ids=[EOS],
        limit=100,
    )
    for token_id in rest:
        if not request.is_finished:
            request.accept(np.eye(400, dtype=np.float32)[token_id])
    assert (request.finish_reason, request.result().text) == ("stop", "")


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.n_decoded = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.n_decoded += len(ids)
        text: str = self._tokenizer.decode(ids, **options)
        return text


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("what", ["text", "special tokens", "bytes that are no text"])
def test_what_a_token_costs_does_not_grow(kind: str, what: str) -> None:
    tokenizer = TOKENIZERS[kind]
    half_a_character = tokenizer.encode("🎉", add_special_tokens=False).ids[:1]
    ids = {
        "text": tokenizer.encode("hello 🎉 " * 50, add_special_tokens=False).ids,
        "special tokens": [EOT] * 300,
        "bytes that are no text": half_a_character * 300,
    }[what]
    counting = CountingTokenizer(tokenizer)
    detokenizer = Detokenizer(counting, tokenizer.encode("hello " * 1000).ids)  # type: ignore[arg-type]
    assert counting.n_decoded <= 6 * detokenizer_module.CONTEXT
    for token_id in ids:
        counting.n_decoded = 0
        detokenizer.step(token_id)
        assert counting.n_decoded <= 3 * MOST_PENDING + 2
