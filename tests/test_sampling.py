"""Choosing the next token: greedy, temperature, top-k, top-p, seeds, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.engines import Run, random_ids
from trt_kv.errors import LogitsError, UsageError
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import next_token

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = (
    *("max_new_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "priority", "timeout_s", "top_logprobs"),
)
BAD_WORDS: tuple[Any, ...] = (None, "word", [""], [[]], [[1.5]], [b"a"], ["\ud800"])
logits_lists = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


def draw(logits_V: Any, n: int = 1, seed: int = 0, **params: Any) -> list[int]:
    rng = np.random.default_rng(seed)
    sampling = SamplingParams(**params)
    return [next_token(np.asarray(logits_V, np.float32), sampling, rng) for _ in range(n)]


@given(logits_lists, st.integers(0, 5))
def test_every_way_to_be_greedy_takes_the_likeliest_token(logits: list[float], seed: int) -> None:
    """Temperature 0, top-k of 1, a tiny nucleus, a tiny temperature; of equal logits the first."""
    best = int(np.argmax(logits))
    assert draw(logits) == [best]
    assert draw(logits, seed=seed, temperature=1.7, top_k=1) == [best]
    assert draw(logits, seed=seed, temperature=1.7, top_p=1e-9) == [best]
    assert logits[draw(logits, seed=seed, temperature=1e-300)[0]] == logits[best]


@given(logits_lists, st.floats(0.1, 5.0), st.floats(0.01, 1.0), st.integers(0, 45))
def test_only_tokens_inside_both_filters_are_drawn(logits: list[float], temperature: float, top_p: float, top_k: int) -> None:
    """Against a slow definition: sort, keep k, add up until the mass is reached."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = np.exp((np.array([logits[i] for i in ranked]) - logits[ranked[0]]) / temperature)
    weights /= weights.sum()
    allowed, mass = set(), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass >= top_p - 1e-6 and mass >= top_p + 1e-6:
            break
        allowed.add(token)
        mass += weight
    assert set(draw(logits, n=20, temperature=temperature, top_p=top_p, top_k=top_k)) <= allowed


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    counts = np.bincount(draw(np.log(probabilities), n=8000, temperature=1.0), minlength=4)
    assert np.abs(counts / 8000 - probabilities).max() < 0.02


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.log([0.6, 0.3, 0.1])
    for temperature in (0.5, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        counts = np.bincount(draw(logits, n=8000, temperature=temperature), minlength=3)
        assert np.abs(counts / 8000 - expected).max() < 0.02


def test_filters_leave_the_ratios_of_what_they_keep() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    for params in ({"top_k": 2}, {"top_p": 0.5}):
        counts = np.bincount(draw(logits, n=8000, temperature=1.0, **params), minlength=4)
        assert np.abs(counts / 8000 - np.array([4 / 7, 3 / 7, 0, 0])).max() < 0.02


def test_the_nucleus_is_the_smallest_that_has_the_mass() -> None:
    assert set(draw([0.0, 0.0], n=50, temperature=1.0, top_p=0.5)) == {0}
    assert set(draw([0.0, 0.0], n=50, temperature=1.0, top_p=0.51)) == {0, 1}


def test_the_same_seed_gives_the_same_text(full_engine: Engine) -> None:
    prompt = random_ids(full_engine, 20, seed=1)
    texts = [full_engine.generate(prompt, max_new_tokens=15, temperature=1.5, seed=seed).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_of_1_is_greedy_in_an_engine(full_engine: Engine) -> None:
    prompt = random_ids(full_engine, 20, seed=1)
    greedy = full_engine.generate(prompt, max_new_tokens=15)
    assert full_engine.generate(prompt, max_new_tokens=15, temperature=1.5, top_k=1) == greedy
    assert full_engine.generate(prompt, max_new_tokens=15, temperature=1.5, top_p=1e-6, seed=9) == greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", -1),
        ("stop", ""),
        ("stop", ("a", "")),
        ("stop", None),
        ("stop", 3),
        ("stop", b"."),
        ("stop", [b"."]),
        ("stop", {".": 1}),
        ("stop", iter(["."])),
        *((name, value) for name in NUMBERS for value in ("4", [1], b"1", 1j, True)),
        *((name, None) for name in NUMBERS if name not in ("seed", "timeout_s", "top_logprobs")),
        *((name, 2.5) for name in ("max_new_tokens", "min_tokens", "top_k", "seed", "priority", "top_logprobs")),
        *((name, value) for name in ("min_p", "typical_p") for value in (-0.1, 1.1, float("nan"))),
        ("typical_p", 0.0),
        *((name, float("inf")) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("presence_penalty", 1e300),
        ("logit_bias", {1: -1e300}),
        *(("logit_bias", bias) for bias in ({"a": 1.0}, {1: None}, {1: float("nan")}, {-1: 1.0}, [(1, 1.0)])),
        *(("bad_words", words) for words in BAD_WORDS),
        *(("stop_token_ids", ids) for ids in (None, 3, "3", [1.0], [-1], {1})),
        ("ignore_eos", 1),
        ("max_new_tokens", float("inf")),
        ("priority", float("nan")),
        ("timeout_s", float("nan")),
        ("parse_special_tokens", None),
        ("parse_special_tokens", "no"),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"bad {name}") as caught:
        SamplingParams(**{name: value})
    assert caught.value.got == repr(value)
    assert caught.value.expected


def test_numpys_numbers_are_numbers() -> None:
    numbers: Any = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.uint32(7), "top_k": np.int8(2)}
    params = SamplingParams(**numbers)
    assert params == SamplingParams(max_new_tokens=3, temperature=0.5, seed=7, top_k=2)
    assert draw([1.0, 2.0, 3.0], temperature=np.float32(0.5), top_k=np.int8(1)) == [2]


def test_stop_may_be_one_text_or_several() -> None:
    assert SamplingParams(stop="abc").stop_texts == ("abc",)
    assert SamplingParams(stop=["a", "b"]).stop_texts == ("a", "b")
    assert SamplingParams().stop_texts == ()


EOS = 7
WORDS = Tokenizer(models.WordLevel({f"w{n}": n for n in range(10)} | {"[UNK]": 10}, unk_token="[UNK]"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def ended(ids: list[int], **params: Any) -> tuple[list[int], str | None]:
    """Tokens and finish reason of a request whose model wants ``ids`` one after the other, and then the end of the sequence."""
    sampling = SamplingParams(max_new_tokens=20, **params)
    request = Request(prompt_ids=[1, 2], params=sampling, tokenizer=WORDS, eos_token_ids=[EOS], limit=20)
    for token_id in [*ids, *[EOS] * 20]:
        if request.is_finished:
            break
        logits_V = np.zeros(11, np.float32)
        logits_V[token_id], logits_V[9] = 2.0, 1.0  # 9 is the second best
        request.accept(logits_V)
    return request.token_ids, request.finish_reason


def test_what_ends_an_answer() -> None:
    assert ended([3, 4]) == ([3, 4], "stop")
    assert ended([3, 4, 5], stop_token_ids=[5, 8]) == ([3, 4], "stop")
    assert ended([3, 4], ignore_eos=True) == ([3, 4, *[EOS] * 18], "length")
    assert ended([3, 4, 5], ignore_eos=True, stop_token_ids=(5,)) == ([3, 4], "stop")
    assert ended([3], min_tokens=4) == ([3, 9, 9, 9], "stop")
    assert ended([3, 5], min_tokens=3, stop_token_ids=[5]) == ([3, 9, 9], "stop")
    assert ended([3, 4, 5, 6], stop="w4") == ([3, 4], "stop")
    assert ended([3, 4, 5, 6], stop="w4", min_tokens=3) == ([3, 4, 5], "stop")


def test_greedy_decoding_obeys_penalties_biases_and_bad_words() -> None:
    assert ended([3, 3, 3], presence_penalty=1.5)[0][:2] == [3, 9]
    assert ended([3, 3, 3], frequency_penalty=0.6)[0][:3] == [3, 3, 9]
    assert ended([4], logit_bias={4: -5.0, 6: 9.0})[0][0] == 6
    assert ended([3, 4, 4], bad_words=[[3, 4]]) == ([3, 9, 4], "stop")
    assert ended([3, 4, 5], bad_words=["w4"]) == ([3, 9, 5], "stop")
    assert ended([1, 3], repetition_penalty=4.0)[0][0] == 9, "token 1 is in the prompt"


def test_parameters_that_leave_no_token_end_the_request_with_the_reason() -> None:
    with pytest.raises(LogitsError, match="leave no token"):
        ended([3], bad_words=[[n] for n in range(11)])


def test_log_probabilities_are_the_models() -> None:
    params = SamplingParams(temperature=2.0, presence_penalty=1.0, logit_bias={0: 3.0}, top_logprobs=2, seed=0)
    request = Request(prompt_ids=[1], params=params, tokenizer=WORDS, eos_token_ids=[], limit=3)
    logits_V = np.log(np.array([0.05, 0.3, 0.4, 0.05, 0.2, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9], np.float32))
    while not request.is_finished:
        request.accept(logits_V)
    for found in request.result().logprobs:
        assert found.logprob == pytest.approx(logits_V[found.token_id], abs=1e-5)
        assert [token_id for token_id, _ in found.top] == [2, 1]
        assert [value for _, value in found.top] == pytest.approx(np.log([0.4, 0.3]), abs=1e-5)
    assert len(request.result().logprobs) == 3


@pytest.mark.parametrize(
    "params", [{"logit_bias": {500_000: 1.0}}, {"stop_token_ids": [500_000]}, {"bad_words": [[1, 500_000]]}]
)
def test_token_ids_that_the_model_does_not_have_are_refused(params: dict[str, Any], small_engine: Engine) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(params))} has token ids outside the vocabulary"):
        small_engine.generate("the", **params)


def test_min_tokens_is_at_most_max_new_tokens() -> None:
    with pytest.raises(UsageError, match="min_tokens exceeds"):
        SamplingParams(min_tokens=9, max_new_tokens=8)


def test_the_command_line_hands_sampling_over(small_folder: Path, run: Run) -> None:
    words = ("generate", small_folder, "the old man", "--max-new-tokens", "6", "--ignore-eos")
    _, greedy, _ = run(*words)
    assert run(*words)[:2] == (0, greedy)
    code, out, err = run(*words, "--logit-bias", "5=1e9")
    assert (code, len(set(out.split()))) == (0, 1), err
    assert out != greedy
    code, out, err = run(*words, "--logit-bias", "five")
    assert code == 2
    assert "a logit bias is ID=X" in err
