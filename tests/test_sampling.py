"""Choosing the next token: greedy, temperature, top-k, top-p, seeds, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import random_ids
from trt_kv.errors import UsageError
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import next_token

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "priority", "timeout_s")
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
        *((name, None) for name in NUMBERS if name not in ("seed", "timeout_s")),
        *((name, 2.5) for name in ("max_new_tokens", "top_k", "seed", "priority")),
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
