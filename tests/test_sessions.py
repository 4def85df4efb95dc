"""Conversations that an engine remembers: the same tokens as the whole history, or going on from what was kept."""

import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from tests.chat_engines import chat_engine
from tests.engines import Run, random_ids
from tests.serving import assert_idle, engine_under, small_policy
from trt_kv import Engine
from trt_kv.errors import UsageError
from trt_kv.pipeline import Conversation

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"cache_tokens": 2500, "n_threads": 1, "chunk": 20}
N_NEW = 6
ANSWER: dict[str, Any] = {"max_new_tokens": N_NEW, "ignore_eos": True}
MESSAGES = ("tell me of the old man", "and of the sea", "why?")
TURNS = (41, 7, 1, 23)
"""Tokens of the prompts of a conversation."""
KEPT, PROTECTED = 0.34, 9


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.load(chat_engine(tmp_path_factory), **OPTIONS) as engine:
        yield engine


def prompts(engine: Engine) -> list[list[int]]:
    return [random_ids(engine, n_tokens, seed=n_tokens) for n_tokens in TURNS]


def by_steps(engine: Engine, turns: list[list[int]], n_new: int = N_NEW) -> list[list[int]]:
    """The greedy answers of turns that go on in one sequence, whose cache is never copied."""
    sequence, runner, answers, pending = engine.runner.new_sequence(), engine.runner, [], list[int]()
    for ids in turns:
        sequence.goes_on, sequence._growth = True, None
        runner.pool.scores[sequence.pages] = 0  # they are of the last queries of a turn
        answer = [int(runner.prefill(sequence, [*pending, *ids]).argmax())]
        while len(answer) < n_new:
            answer.append(int(runner.decode([sequence], [answer[-1]])[0].argmax()))
        answers.append(answer)
        pending = answer[-1:]
    sequence.release()
    return answers


def test_a_turn_has_the_tokens_of_the_whole_history_sent_anew(engine: Engine) -> None:
    session, messages = engine.session(system="be brief", **ANSWER), [{"role": "system", "content": "be brief"}]
    found = []
    for text in MESSAGES:
        found.append(session.chat(text))
        messages += [{"role": "user", "content": text}]
        expected = engine.chat(messages, cache_salt="another", **ANSWER)
        assert (found[-1].token_ids, expected.text) == (expected.token_ids, found[-1].text)
        messages += [{"role": "assistant", "content": expected.text}]
        assert session.messages == messages
    assert 0 == found[0].n_cached_tokens < found[1].n_cached_tokens < found[2].n_cached_tokens
    raw, history = engine.session(**ANSWER), list[int]()
    for ids in prompts(engine):
        history += ids
        history += engine.generate(history, **ANSWER).token_ids
        raw.generate(ids)
        assert raw.token_ids == history


def test_a_compressed_turn_goes_on_from_what_was_kept_whatever_else_runs(engine: Engine) -> None:
    expected = by_steps(engine, prompts(engine))
    alone, beside = (engine.session(mode="compressed", **ANSWER) for _ in range(2))
    n_seen = 0
    for ids, answer in zip(prompts(engine), expected, strict=True):
        n_seen += len(ids)
        assert list(alone.generate(ids).token_ids) == answer
        other = engine.submit(random_ids(engine, 50, seed=3), max_new_tokens=30, ignore_eos=True)
        assert list(beside.generate(ids).token_ids) == answer
        engine.core.cancel(other)
        assert max(alone.held_tokens) <= max(KEPT * n_seen, PROTECTED) + N_NEW
        engine.runner.pool.check_integrity([])
        n_seen += N_NEW
    assert alone.token_ids == beside.token_ids
    whole = engine.session(**ANSWER)
    assert [list(whole.generate(ids).token_ids) for ids in prompts(engine)] != expected


def test_a_compressed_chat_reads_what_the_template_writes_behind_an_answer(engine: Engine) -> None:
    session = engine.session(mode="compressed", system="be brief", **ANSWER)
    turns = []
    for text in MESSAGES:
        before = list(session.token_ids)
        result = session.chat(text)
        turns.append(session.token_ids[len(before) : len(session.token_ids) - N_NEW])
        assert session.token_ids[-N_NEW:] == list(result.token_ids)
    assert turns[0] == engine.encode_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": MESSAGES[0]}])
    assert engine.tokenizer.decode(turns[1], skip_special_tokens=False) == (
        f"<|im_end|>\n<|im_start|>user\n{MESSAGES[1]}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.session(mode="compressed", **ANSWER).generate(turns[0]).token_ids == tuple(by_steps(engine, turns)[0])
    only_last = "{{ '<|im_start|>' + messages[-1].content }}{{ '?' if messages[-1].role == 'user' }}"
    other = engine.session(mode="compressed", template=only_last, **ANSWER)
    other.chat("hello")
    with pytest.raises(UsageError, match="writes what was said differently"):
        other.chat("again")


@pytest.mark.parametrize("mode", ["exact", "compressed"])
def test_an_answer_that_is_stopped_is_read_with_the_next_turn(engine: Engine, mode: Any) -> None:
    first, second, third, _ = prompts(engine)
    session = engine.session(mode=mode, **ANSWER)
    session.generate(first)
    held = session.held_tokens
    stream = session.stream(second, max_new_tokens=100)
    next(stream)
    stream.close()
    assert session.last is not None
    said = list(session.last.token_ids)
    assert 0 < len(said) < 100
    assert session.held_tokens == held
    whole = engine.session(mode=mode, **ANSWER)
    whole.generate(first)
    assert session.generate(third).token_ids == whole.generate([*second, *said, *third]).token_ids


@pytest.mark.parametrize("mode", ["exact", "compressed"])
def test_a_saved_or_forked_conversation_goes_on_alike(engine: Engine, mode: Any, tmp_path: Path) -> None:
    file, session = tmp_path / "talk", engine.session(mode=mode, **ANSWER)
    session.chat(MESSAGES[0])
    session.save(file)
    assert file.stat().st_mode & 0o77 == 0
    fork = session.fork()
    expected = session.chat(MESSAGES[1]).token_ids
    assert fork.messages == session.messages[:2]
    assert fork.chat(MESSAGES[1]).token_ids == expected
    with Engine.load(engine.folder, **OPTIONS) as again:
        loaded = again.load_session(file, **ANSWER)
        assert (loaded.mode, loaded.chat(MESSAGES[1]).token_ids) == (mode, expected)
    with Engine.load(engine.folder, kv_dtype="float16", **OPTIONS) as other, pytest.raises(UsageError, match="another engine"):
        other.load_session(file)
    content = file.read_bytes()
    for damaged in (content[:-1], content[:50] + bytes([content[50] ^ 1]) + content[51:], b"", b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"damaged|no session"):
            session.load(file)
    assert len(session.messages) == 4
    with pytest.raises(UsageError, match="cannot read"):
        engine.load_session(tmp_path / "nothing")


def test_what_a_conversation_refuses(engine: Engine) -> None:
    with pytest.raises(UsageError, match="bad mode"):
        engine.session(mode="lossy")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one sample"):
        engine.session(n=2, temperature=1.0).chat("hello")
    session = engine.session(mode="compressed", **ANSWER)
    session.chat("hello")
    with pytest.raises(UsageError, match="consists of messages"):
        session.generate("hello")
    before = list(session.token_ids)
    with pytest.raises(UsageError, match="does not fit into the model's context any more"):
        session.chat("x " * 2000)
    assert session.token_ids == before


def test_a_conversation_in_the_terminal_goes_on_in_the_next_run(
    engine: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fork = tmp_path / "talk", tmp_path / "fork"
    options = ("--session", file, "--mode", "compressed", "--max-new-tokens", "5", "--chunk", "20")
    expected = Conversation(engine, mode="compressed", sampling={"max_new_tokens": 5})
    first, second, third = ("".join(expected.answer(text)) + "\n" for text in MESSAGES)
    said = [f"{MESSAGES[0]}\n/fork {fork}\n/fork {fork}", f"{MESSAGES[1]}\n{MESSAGES[2]}\n/load {fork}\n{MESSAGES[1]}\n"]
    outputs = []
    for lines in said:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(lines.encode()), encoding="utf-8"))
        outputs.append(run("chat", engine.folder, *options))
    (code, out, err), (code_again, out_again, err_again) = outputs
    assert (code, out, "File exists" in err) == (2, first, True)
    assert (code_again, out_again) == (0, second + third + second)
    assert "2 messages, mode compressed" in err_again


@pytest.mark.parametrize("name", ["prefixkv_paper", "refreekv", "h2o", "freekv"])
@pytest.mark.parametrize("windows", [(), (12, 0, 0)], ids=["", "windows"])
def test_a_compressed_turn_of_any_policy_depends_on_its_conversation_alone(
    small_engine: Engine, name: str, windows: tuple[int, ...], tmp_path: Path
) -> None:
    """Not on a restart between the turns, nor on what else runs; everything is free afterwards."""
    turns = [random_ids(small_engine, n_tokens, seed=n_tokens) for n_tokens in TURNS]
    with engine_under(small_engine, small_policy(name), windows=windows, chunk=20) as engine:
        session = engine.session(mode="compressed", **ANSWER)
        expected = [session.generate(ids).token_ids for ids in turns]
        assert_idle(engine)
        if name == "freekv":
            assert min(session.held_tokens[1:]) == len(session.token_ids) - 1
        elif name != "refreekv":
            assert min(session.held_tokens) < len(session.token_ids) / 2 + N_NEW
    for at, ids in enumerate(turns):
        with engine_under(small_engine, small_policy(name), windows=windows, chunk=20) as engine:
            again = engine.session(mode="compressed", **ANSWER)
            if at:
                again.load(tmp_path / "talk")
            engine.submit(random_ids(engine, 50, seed=3), max_new_tokens=30, ignore_eos=True)
            assert again.generate(ids).token_ids == expected[at]
            again.save(tmp_path / "talk")
