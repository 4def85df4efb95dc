"""What a prompt may be, which tokens it becomes, and how a mistake in it is told; stop texts that name special tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from tests.engines import Run, assert_nothing_leaked
from tests.sample_tokenizers import BOS, EOS, EOT, TOKENIZERS, USER, unigram_tokenizer
from trt_kv.errors import CapacityError, LogitsError, UsageError
from trt_kv.prompt_tokens import prompt_tokens
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.text.prompts import PromptEncoder

DRAWN: dict[str, Any] = {"temperature": 1.0}
NO_PROMPTS: dict[str, Any] = {
    "bytes": b"the old man",
    "bytearray": bytearray(b"the"),
    "memoryview": memoryview(b"the"),
    "a number": 3,
    "None": None,
    "a dict": {1: 2},
    "a set": {1, 2},
    "an iterator": iter([1, 2]),
    "floats": [1.7, 179.9],
    "an array of floats": np.array([1.0, 2.0]),
    "bools": [True, False],
    "texts": ["the", "old"],
    "lists": [[1, 2], [3]],
    "a matrix": np.ones((2, 2), np.int64),
    "half a surrogate pair": "a\ud800",
}


def asks(engine: Engine) -> list[Callable[[Any], object]]:
    return [
        engine.encode,
        lambda prompt: engine.generate(prompt, max_new_tokens=1),
        lambda prompt: engine.stream(prompt, max_new_tokens=1),
        lambda prompt: engine.submit(prompt, max_new_tokens=1),
    ]


@pytest.mark.parametrize("what", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_and_named(what: str, small_engine: Engine) -> None:
    for ask in asks(small_engine):
        with pytest.raises(UsageError, match="the prompt") as caught:
            ask(NO_PROMPTS[what])
        assert caught.value.got is not None
        assert caught.value.expected is not None
    with pytest.raises(UsageError, match=r"prompts\[1\]"):
        small_engine.generate_batch([[1, 2], NO_PROMPTS[what], [3]], max_new_tokens=1)
    assert_nothing_leaked(small_engine)


@pytest.mark.parametrize("prompt", [[5, 6, 7], (5, 6, 7), np.array([5, 6, 7], np.int32), [np.int64(5), 6, 7], range(5, 8)])
def test_token_ids_may_come_in_any_sequence_of_integers(prompt: Any, small_engine: Engine) -> None:
    assert small_engine.encode(prompt) == [5, 6, 7]
    assert small_engine.generate(prompt, max_new_tokens=2) == small_engine.generate([5, 6, 7], max_new_tokens=2)


def test_the_prompt_of_a_batch_that_is_wrong_is_named(small_engine: Engine) -> None:
    n = small_engine.manifest.config.max_positions
    for wrong, what in (
        ([1] * (n + 1), "longer than the model's"),
        ([10**6], "outside the vocabulary"),
        ("", "empty"),
    ):
        with pytest.raises(UsageError, match=rf"^prompts\[2\] .*{what}"):
            small_engine.generate_batch([[1], [2], wrong, [3]])
        with pytest.raises(UsageError, match=rf"^the prompt .*{what}"):
            small_engine.generate(wrong)


def test_the_request_of_a_batch_that_never_fits_is_named(small_folder: Path) -> None:
    with Engine.load(small_folder, cache_tokens=60, chunk=16, n_threads=1) as engine:
        with pytest.raises(CapacityError, match="request 1 of 2"):
            engine.generate_batch([[1] * 4, [1] * 90], max_new_tokens=1)
        with pytest.raises(CapacityError, match=r"^the KV pool is too small"):
            engine.generate([1] * 90, max_new_tokens=1)


@pytest.mark.parametrize("prompts", ["the", b"the", 3, None, {1: 2}, iter(["the"])])
def test_a_batch_is_a_list(prompts: Any, small_engine: Engine) -> None:
    with pytest.raises(UsageError, match="a batch is a list of prompts"):
        small_engine.generate_batch(prompts)


@pytest.mark.parametrize("params", [{"max_new_tokens": 3}, [None], ["greedy"], 3])
def test_params_of_another_kind_are_refused(params: Any, small_engine: Engine) -> None:
    with pytest.raises(UsageError, match="params are not SamplingParams"):
        small_engine.generate_batch([[1]], params)


@pytest.mark.parametrize("name", ["cache_tokens", "host_tokens", "chunk", "token_budget", "max_sequences", "n_threads"])
@pytest.mark.parametrize("value", [2.5, "8", True, -1, float("nan"), b"1"])
def test_sizes_that_are_no_integers_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"bad {name}") as caught:
        LoadOptions(**{name: value})
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
@given(text=st.text("aehlo é日🎉", max_size=20))
def test_a_text_that_begins_with_bos_gets_no_second_one(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    rendered = "<s><|user|>" + text + "<|eot|>"
    assert prompt_tokens(tokenizer, rendered) == tokenizer.encode(rendered, add_special_tokens=False).ids
    assert prompt_tokens(tokenizer, "<|user|>" + text)[:2] == [BOS, USER]
    assert prompt_tokens(tokenizer, "<s><s>" + text)[:2] == [BOS, BOS], "what the text says"
    assert prompt_tokens(tokenizer, text) == tokenizer.encode(text).ids


def test_two_tokens_in_front_are_not_put_there_twice() -> None:
    """As ChatGLM's tokenizer has them; and one at the end is no matter of the front."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["byte-level"].to_str())
    for single, special in (
        ("<s> <|user|> $A", [("<s>", BOS), ("<|user|>", USER)]),
        ("$A </s>", [("</s>", EOS)]),
        ("<s> $A </s>", [("<s>", BOS), ("</s>", EOS)]),
    ):
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        front, _, end = single.replace(" ", "").partition("$A")
        expected = tokenizer.encode(front + "aa" + end, add_special_tokens=False).ids
        assert prompt_tokens(tokenizer, front + "aa") == expected
        assert prompt_tokens(tokenizer, "aa") == expected


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace", "unigram"])
@given(parts=st.lists(st.sampled_from(["<s>", "</s>", "<|eot|>", "<|user|>", "a", " ", "hello"]), min_size=1, max_size=8))
def test_users_text_makes_no_control_tokens(kind: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS.get(kind) or unigram_tokenizer()
    encoder = PromptEncoder(tokenizer, max_positions=1000, vocab_size=1000)
    text = "".join(parts)
    literal = encoder.encode(text, parse_special_tokens=False)
    assert set(literal[1:]).isdisjoint({BOS, EOS, EOT, USER})
    assert tokenizer.decode(encoder.encode(text)[1:]) != text or not any(part.startswith("<") for part in parts)
    assert encoder.encode(text) == prompt_tokens(tokenizer, text), "the other setting is not changed"
    if kind in ("byte-level", "unigram"):
        assert tokenizer.decode(literal) == text


def test_words_that_are_special_tokens_become_unknown_ones(small_engine: Engine) -> None:
    tokenizer = small_engine.tokenizer
    names = ["<bos>", "the", "<eos>", "old", "<pad>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    assert small_engine.encode(" ".join(names)) == ids
    bos, the, _, old, _ = ids
    unknown = tokenizer.token_to_id("<unk>")
    assert small_engine.encode(" ".join(names), parse_special_tokens=False) == [bos, unknown, the, unknown, old, unknown]


def test_how_special_tokens_are_read_is_a_parameter_of_the_request(small_engine: Engine) -> None:
    prompt = "the <eos> old"
    ids = small_engine.encode(prompt)
    literal = small_engine.encode(prompt, parse_special_tokens=False)
    assert small_engine.tokenizer.token_to_id("<eos>") in ids
    assert small_engine.tokenizer.token_to_id("<eos>") not in literal
    for of_prompt, expected in ((True, ids), (False, literal)):
        params = SamplingParams(max_new_tokens=3, parse_special_tokens=of_prompt)
        whole = small_engine.generate(expected, max_new_tokens=3)
        assert small_engine.generate(prompt, params) == whole
        assert small_engine.generate_batch([prompt], params) == [whole]
        stream = small_engine.stream(prompt, params)
        list(stream)
        assert stream.result == whole


def test_parts_of_a_prompt_are_encoded_apart(small_engine: Engine) -> None:
    whole = small_engine.encode("the old <eos>")
    assert small_engine.encode("the") + small_engine.encode_part("old <eos>") == whole
    unknown = small_engine.tokenizer.token_to_id("<unk>")
    assert small_engine.encode_part("old <eos>", parse_special_tokens=False) == [*small_engine.encode_part("old"), unknown]


def test_the_command_line_reads_special_tokens_as_told(small_folder: Path, run: Run) -> None:
    words = ("generate", small_folder, "<bos> the <eos> old", "--max-new-tokens", "1")
    code, _, err = run(*words)
    assert code == 0
    assert "[4 prompt tokens" in err
    assert "no second one was put in front" in err
    _, _, err = run(*words, "--no-special-tokens")
    assert "no second one" not in err
    assert "[5 prompt tokens" in err


def ended(
    token_ids: Sequence[int], *, stop: Sequence[str], kind: str = "byte-level", limit: int = 1000
) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens of a request that a model answers with ``token_ids``."""
    request = Request(
        prompt_ids=[BOS],
        params=SamplingParams(stop=stop),
        tokenizer=TOKENIZERS[kind],
        eos_token_ids=[EOS],
        limit=limit,
    )
    for token_id in [*token_ids, EOS]:
        if not request.is_finished:
            request.accept(np.eye(400, dtype=np.float32)[token_id])
    assert "".join(request.pieces) == request.result().text
    assert all(request.pieces)
    return request.result().text, str(request.finish_reason), len(request.token_ids)


def tokens(text: str, kind: str = "byte-level") -> list[int]:
    return list(TOKENIZERS[kind].encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
def test_a_special_token_stops(kind: str) -> None:
    ids = [*tokens("hello", kind), EOT, *tokens("hello", kind)]
    n = len(ids) // 2
    assert ended(ids, stop=["<|eot|>"], kind=kind) == ("hello", "stop", n + 1)
    assert ended(ids, stop=["o<|eot|>"], kind=kind) == ("hell", "stop", n + 1)
    assert ended(ids, stop=["nothing", "<|eot|>"], kind=kind) == ("hello", "stop", n + 1)


def test_stops_that_name_special_tokens_match_nothing_else() -> None:
    ids = [*tokens("he"), EOT, *tokens("he"), USER, *tokens("la")]
    for stop in ("<|user|>o", "a<|user|>", "<|eot|><|user|>", "<s>"):
        assert ended(ids, stop=[stop])[:2] == ("hehela", "stop")
        assert ended(ids, stop=[stop], limit=len(ids))[:2] == ("hehela", "length")
    assert ended(ids, stop=["<|user|>la", "<|eot|>e"])[0] == "hehe"
    assert ended(ids, stop=["he<|user|>"])[0] == "he"
    assert ended(tokens("he <|eot|> lo".replace("<|eot|>", "<|eo")), stop=["<|eot|>"])[0] == "he <|eo lo"


def test_the_spelled_out_name_of_a_special_token_stops_too() -> None:
    encoder = PromptEncoder(TOKENIZERS["byte-level"], max_positions=1000, vocab_size=1000)
    ids = encoder.encode("he <|eot|> lo", parse_special_tokens=False)[1:]
    assert ended(ids, stop=["<|eot|>"])[:2] == ("he ", "stop")


def test_special_tokens_whose_names_overlap_are_told_apart() -> None:
    description = json.loads(TOKENIZERS["byte-level"].to_str())
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.add_special_tokens(["<|eot|><|eot|>"])
    request = Request(
        prompt_ids=[BOS], params=SamplingParams(stop="<|eot|><|eot|>"), tokenizer=tokenizer, eos_token_ids=[EOS], limit=9
    )
    longer = tokenizer.token_to_id("<|eot|><|eot|>")
    for token_id in (EOT, *tokens("h"), longer):
        assert not request.is_finished
        request.accept(np.eye(400, dtype=np.float32)[token_id])
    assert (request.finish_reason, request.result().text) == ("stop", "h")


@pytest.mark.parametrize("sampling", [{}, DRAWN, DRAWN | {"top_k": 3}, DRAWN | {"top_p": 0.9}])
@pytest.mark.parametrize("logits", [[1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf], [np.nan, np.nan], [np.inf, -np.inf]])
def test_logits_that_are_no_numbers_end_the_request(logits: list[float], sampling: dict[str, Any]) -> None:
    request = Request(
        prompt_ids=[BOS], params=SamplingParams(**sampling), tokenizer=TOKENIZERS["words"], eos_token_ids=[], limit=9
    )
    with pytest.raises(LogitsError, match="not finite numbers"):
        request.accept(np.array(logits, np.float32))
    assert request.token_ids == []


@pytest.mark.parametrize("sampling", [{}, DRAWN])
def test_a_token_that_is_ruled_out_is_never_chosen(sampling: dict[str, Any]) -> None:
    """Logits of minus infinity are fine beside others."""
    request = Request(
        prompt_ids=[BOS], params=SamplingParams(**sampling), tokenizer=TOKENIZERS["words"], eos_token_ids=[], limit=50
    )
    for _ in range(20):
        request.accept(np.array([-np.inf, 0.0, -np.inf, 1.0], np.float32))
    assert set(request.token_ids) <= {1, 3}


def test_a_special_token_that_merges_make_is_text_too() -> None:
    """Byte-pair tokenizers may be able to put a special token together from its letters."""
    vocab = {piece: index for index, piece in enumerate(["<", "s", ">", "<s", "<s>", "<s>s"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">"), ("<s>", "s")]))
    tokenizer.add_special_tokens(["<s>"])
    encoder = PromptEncoder(tokenizer, max_positions=99, vocab_size=6)
    assert encoder.encode("<s>s") == [4, 1]
    assert encoder.encode("<s>s", parse_special_tokens=False) == [3, 2, 1]
