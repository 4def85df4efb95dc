"""Text that comes piece by piece: nothing broken, nothing early, nothing late, nothing left behind."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.engines import CHUNK, assert_nothing_leaked, interrupted_at_line, random_ids
from tests.sample_tokenizers import EOS, TOKENIZERS
from trt_kv.runtime import engine_core, model_runner, scheduler
from trt_kv.runtime import request as request_module
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.cache import page_pool
from trt_kv.runtime.cache import sequence as sequence_cache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.text.detokenizer import Detokenizer
from trt_kv.runtime.text.stops import Stops

pytestmark = pytest.mark.usefixtures("one_thread")

texts = st.text("aehlo ,é日本🎉ü\n", max_size=24) | st.text(max_size=12)


def request_of(tokenizer: Tokenizer, *, stop: Sequence[str] = (), limit: int = 1000) -> Request:
    return Request(
        prompt_ids=[1],
        params=SamplingParams(stop=stop, max_new_tokens=limit),
        tokenizer=tokenizer,
        eos_token_ids=[EOS],
        limit=limit,
    )


def pieces_of(request: Request, token_ids: Sequence[int]) -> list[str]:
    """Feed a request logits that leave no choice, until it is finished."""
    pieces: list[str] = []
    for token_id in [*token_ids, EOS]:
        request.accept(np.eye(400, dtype=np.float32)[token_id])
        pieces.append("".join(request.pieces))
        request.pieces.clear()
        if request.is_finished:
            break
    return pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts)
def test_pieces_are_whole_characters_and_make_up_the_text(kind: str, text: str) -> None:
    """And each piece comes with the token that completes it. A U+FFFD at the end looks like a character that is cut off."""
    tokenizer = TOKENIZERS[kind]
    text = text.rstrip("\ufffd")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    request = request_of(tokenizer)
    pieces = pieces_of(request, ids)
    assert request.finish_reason == "stop"
    assert request.result().text == "".join(pieces) == tokenizer.decode(ids)
    for count in range(len(ids) + 1):
        complete = tokenizer.decode(ids[:count])
        if not complete.endswith("\ufffd"):
            assert "".join(pieces[:count]) == complete
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, n_tokens=st.integers(1, 20))
def test_a_character_that_is_cut_off_is_not_shown(kind: str, text: str, n_tokens: int) -> None:
    """The limit may fall between the bytes of a character: what stands before it is shown, no replacement character is."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    request = request_of(tokenizer, limit=n_tokens)
    shown = "".join(pieces_of(request, ids))
    if "\ufffd" not in text and kind in ("byte-level", "words"):  # a byte that is cut off makes the others of a run undecodable
        assert shown == tokenizer.decode(ids[:n_tokens]).rstrip("\ufffd")
    assert request.result().text == shown
    assert tokenizer.decode(ids).startswith(shown)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@given(ids=st.lists(st.integers(3, 255), max_size=30))
def test_any_tokens_can_be_decoded(kind: str, ids: list[int]) -> None:
    """Also bytes that are no text: nothing raises, and what was shown stays."""
    request = request_of(TOKENIZERS[kind])
    pieces = pieces_of(request, ids)
    assert "".join(pieces) == request.result().text
    assert list(request.result().token_ids) == ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, stops=st.lists(st.text("aehlo é日🎉", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop(kind: str, text: str, stops: list[str]) -> None:
    """Against a slow definition; nothing of a stop text is ever shown, however it is spread over tokens."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    request = request_of(tokenizer, stop=stops)
    shown = "".join(pieces_of(request, ids))
    whole = tokenizer.decode(ids)
    ends = [len(whole)]
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:count])
        so_far = whole[: len(so_far.rstrip("\ufffd"))] if so_far.endswith("\ufffd") else so_far
        found = [so_far.find(stop) for stop in stops if stop in so_far and not tokenizer.decode(ids[:count]).endswith("\ufffd")]
        if found:
            ends = [min(found)]
            break
    assert shown == request.result().text == whole[: ends[0]]


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.get_vocab()[token] for token in ("he", "l", "a", "!")]
    assert pieces_of(request_of(tokenizer, stop=["lo", "elf"]), ids) == ["h", "", "ela", "!", ""]


@given(st.text("ab", max_size=9), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_what_is_held_back_is_the_longest_end_that_may_begin_a_stop(text: str, stops: list[str]) -> None:
    ends = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    assert Stops(stops, None).n_begun(text) == max(ends, default=0)


def test_a_stop_text_may_be_long() -> None:
    """Each of its beginnings was compared with the text, at every token."""
    stops = Stops(["x" * 10**6 + "y"], None)
    assert [stops.n_begun("a" * 10**4), stops.n_begun("ax"), stops.n_begun("x" * 10**4)] == [0, 1, 10**4]


def test_what_is_held_back_comes_when_the_text_ends() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.get_vocab()[token] for token in ("he", "l")]
    assert pieces_of(request_of(tokenizer, stop=["elf"]), ids) == ["h", "", "el"]
    assert pieces_of(request_of(tokenizer, stop=["elf"], limit=2), ids) == ["h", "el"]


def test_special_tokens_are_not_text() -> None:
    detokenizer = Detokenizer(TOKENIZERS["words"])
    assert [detokenizer.step(token_id) for token_id in (1, 0, 1)] == ["", "", ""]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", ["full", "half"])
@pytest.mark.parametrize("stop", [[], ["storm", "tower ."], ["nothing like this"]], ids=["no stop", "stop", "other stop"])
def test_a_stream_is_what_generate_returns(kind: str, stop: list[str], request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    for prompt in ("the keeper of the tower", random_ids(engine, CHUNK + 5, seed=3)):
        whole = engine.generate(prompt, max_new_tokens=24, stop=stop)
        stream = engine.stream(prompt, max_new_tokens=24, stop=stop)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert stream.result == whole
        assert not any(text in whole.text for text in stop)
    assert_nothing_leaked(engine)


def test_a_stop_text_cuts_what_the_engine_would_have_said(full_engine: Engine) -> None:
    whole = full_engine.generate("the keeper of the tower", max_new_tokens=24)
    middle = whole.text[len(whole.text) // 2 :][:7]
    cut = full_engine.generate("the keeper of the tower", max_new_tokens=24, stop=middle)
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)


@pytest.mark.parametrize("n_new", [1, 2, 7])
def test_generation_ends_after_the_wanted_number_of_tokens(full_engine: Engine, n_new: int) -> None:
    generation = full_engine.generate("the old storm", max_new_tokens=n_new)
    assert len(generation.token_ids) == n_new
    assert generation.finish_reason == "length"
    assert generation.n_prompt_tokens == 4
    assert generation.num_computed_tokens == 4 + n_new - 1
    assert generation.kv_tokens == (generation.num_computed_tokens,) * 8


def test_an_end_token_at_once_is_an_empty_answer(full_engine: Engine) -> None:
    first = full_engine.generate("the old storm", max_new_tokens=1).token_ids[0]
    config = dataclasses.replace(full_engine.manifest.config, eos_token_ids=(EOS, first))
    manifest = dataclasses.replace(full_engine.manifest, config=config)
    engine = Engine(full_engine.folder, manifest, full_engine.loaded, full_engine.tokenizer)
    generation = engine.generate("the old storm")
    assert (generation.text, generation.token_ids, generation.finish_reason) == ("", (), "stop")
    assert list(engine.stream("the old storm")) == []


def test_progress_of_the_prompt_is_told_chunk_by_chunk(full_engine: Engine) -> None:
    done: list[int] = []
    prompt = random_ids(full_engine, 2 * CHUNK + 9, seed=1)
    next(full_engine.stream(prompt, on_prefill=done.append, cache_salt="of this test"))
    assert done == [CHUNK, 2 * CHUNK, 2 * CHUNK + 9]


def test_the_result_of_an_unfinished_stream_is_what_came_so_far(full_engine: Engine) -> None:
    stream = full_engine.stream("the old storm", max_new_tokens=30)
    pieces = [next(stream) for _ in range(5)]
    assert stream.result.text == "".join(pieces)
    assert len(stream.result.token_ids) == 5
    del stream
    assert_nothing_leaked(full_engine)


def test_an_abandoned_stream_gives_its_pages_back(full_engine: Engine) -> None:
    for _ in full_engine.stream("the old storm", max_new_tokens=30):
        break
    assert_nothing_leaked(full_engine)
    full_engine.stream("the old storm")
    assert_nothing_leaked(full_engine)


class FailingExecutor:
    """Passes everything on, but fails in the middle of the given step."""

    description = "fails"

    def __init__(self, executor: object, step: int, error: BaseException) -> None:
        self._executor, self._steps_left, self._error = executor, step, error

    def run(self, *arguments: object) -> object:
        *tensors, attend = arguments

        def failing(layer: int, *qkv: object) -> object:
            if self._steps_left == 0 and layer == 3:
                raise self._error
            return attend(layer, *qkv)  # type: ignore[operator]

        result = self._executor.run(*tensors, failing)  # type: ignore[attr-defined]
        self._steps_left -= 1
        return result


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError("none")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["full", "half"])
def test_a_failure_in_any_step_frees_everything(
    kind: str, step: int, error: BaseException, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While reading the first or second chunk of the prompt, or later: the pool is whole and the engine goes on working."""
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    prompts = [random_ids(engine, CHUNK + 30, seed=1), random_ids(engine, 20, seed=2)]
    before = engine.generate_batch(prompts, max_new_tokens=8)
    with monkeypatch.context() as patch:
        steps = engine.runner._executor
        assert isinstance(steps, SplitStepExecutor)
        patch.setattr(steps, "dense", FailingExecutor(steps.dense, step, error))
        with pytest.raises(type(error)):
            engine.generate_batch(prompts, max_new_tokens=8)
        assert_nothing_leaked(engine)
    assert engine.generate_batch(prompts, max_new_tokens=8) == before


def test_ctrl_c_at_any_line_of_a_step_frees_everything(small_engine: Engine) -> None:
    """Also in the middle of the bookkeeping of pages; every third line, so that the test stays quick."""
    prompt = random_ids(small_engine, CHUNK + 10, seed=1)
    expected = small_engine.generate(prompt, max_new_tokens=4)
    number = 0
    while interrupted_at_line(
        number,
        [model_runner, sequence_cache, page_pool, request_module, engine_core, scheduler],
        lambda: small_engine.generate(prompt, max_new_tokens=4),
        only="run _read_chunk _decode_step _step append shrink allocate release release_owner accept _grow_tables _slots "
        "_evicts_for_next _take_in _sweep schedule complete remove _finish_step _end_prompt _deliver _begin close",
    ):
        assert_nothing_leaked(small_engine)
        number += 3
    assert number > 300
    assert small_engine.generate(prompt, max_new_tokens=4) == expected


def test_streams_side_by_side_say_what_each_says_alone(half_engine: Engine) -> None:
    prompts = [random_ids(half_engine, n, seed=n) for n in (10, 80, 33)]
    alone = [half_engine.generate(prompt, max_new_tokens=15).text for prompt in prompts]
    streams = [half_engine.stream(prompt, max_new_tokens=15) for prompt in prompts]
    said = ["", "", ""]
    for _ in range(15):
        for index, stream in enumerate(streams):
            said[index] += next(stream, "")
    assert said == alone
    assert list(map(list, streams)) == [[], [], []]
    assert_nothing_leaked(half_engine)


@pytest.fixture
def engine_with_small_pool(small_folder: object) -> Callable[[int], Engine]:
    return lambda cache_tokens: Engine.load(str(small_folder), cache_tokens=cache_tokens, chunk=16, n_threads=1)


def test_a_running_stream_never_loses_its_place(engine_with_small_pool: Callable[[int], Engine]) -> None:
    """A second one that would not fit beside the first at its largest waits until the first has ended."""
    engine = engine_with_small_pool(60)
    prompt = random_ids(engine, 20, seed=1)
    alone = engine.generate(prompt, max_new_tokens=30)
    first = engine.stream(prompt, max_new_tokens=30)
    said = next(first)
    second = engine.stream(prompt, max_new_tokens=30)
    said_second = next(second)
    assert first.result == alone
    said += "".join(first)
    assert said == alone.text
    assert said_second + "".join(second) == alone.text
    assert second.result == alone
    assert_nothing_leaked(engine)
