"""Conversations that an engine remembers: the same tokens as the whole history, or going on from what was kept."""

import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from tests.chat_engines import chat_engine
from tests.engines import Run, random_ids
from tests.serving import assert_idle, engine_under, small_policy
from trt_kv import Engine
from trt_kv.errors import RecallError, UsageError
from trt_kv.pipeline import Conversation
from trt_kv.policies import policy_names
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.session import Session

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


OFTEN = ("prefixkv_paper", "refreekv", "h2o", "freekv")
WHERE: dict[str, dict[str, Any]] = {
    "": {},
    "windows": {"windows": (12, 0, 0)},
    "file": {"host_tier": f"file:{tempfile.gettempdir()}"},
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, where) for name in OFTEN for where in ("", "windows")),
        *((name, "file") for name in ("freekv", "quest")),
        *(pytest.param(name, "", marks=pytest.mark.slow) for name in policy_names() if name not in OFTEN),
    ],
)
def test_a_compressed_turn_of_any_policy_depends_on_its_conversation_alone(
    small_engine: Engine, name: str, where: str, tmp_path: Path
) -> None:
    """Not on a restart between the turns, nor on what else runs; everything is free afterwards."""
    turns = [random_ids(small_engine, n_tokens, seed=n_tokens) for n_tokens in TURNS]
    with engine_under(small_engine, small_policy(name), **WHERE[where], chunk=20) as engine:
        session = engine.session(mode="compressed", **ANSWER)
        expected = [session.generate(ids).token_ids for ids in turns]
        assert_idle(engine)
        if name in ("freekv", "quest"):
            assert min(session.held_tokens[1:]) == len(session.token_ids) - 1
        elif name in OFTEN and name != "refreekv":
            assert min(session.held_tokens) < len(session.token_ids) / 2 + N_NEW
    again = session
    for at, ids in enumerate(turns):
        with engine_under(small_engine, small_policy(name), **WHERE[where], chunk=20) as engine:
            again = engine.session(mode="compressed", **ANSWER)
            if at:
                again.load(tmp_path / "talk")
            engine.submit(random_ids(engine, 50, seed=3), max_new_tokens=30, ignore_eos=True)
            assert again.generate(ids).token_ids == expected[at]
            again.save(tmp_path / "talk")
    assert state_of(again) == state_of(session), "there is something of others in it"


def state_of(session: Session) -> dict[str, bytes]:
    assert session._said.state is not None
    return {name: values.tobytes() for name, values in session._said.state.arrays.items()}


@pytest.mark.parametrize("name", ["freekv", "quest"])
def test_a_cache_in_a_file_has_the_turns_of_one_in_memory(small_engine: Engine, name: str, tmp_path: Path) -> None:
    """From one to the other too, and as in a sequence whose cache is never copied."""
    turns = [random_ids(small_engine, n_tokens, seed=n_tokens) for n_tokens in TURNS]
    with (
        engine_under(small_engine, small_policy(name), chunk=20) as in_memory,
        engine_under(small_engine, small_policy(name), **WHERE["file"], chunk=20) as in_file,
    ):
        assert isinstance(in_file.runner.tiers, StreamedRecall)
        sessions = [engine.session(mode="compressed", **ANSWER) for engine in (in_memory, in_file)]
        for ids in turns:
            found = [session.generate(ids).token_ids for session in sessions]
            assert found[0] == found[1]
            assert state_of(sessions[0]) == state_of(sessions[1])
            first, second = sessions
            first._said, second._said = second._said, first._said
        plain, expected, pending = in_file.runner.new_sequence(), [], list[int]()
        for ids in turns:
            answer = [int(in_file.runner.prefill(plain, [*pending, *ids]).argmax())]
            while len(answer) < N_NEW:
                answer.append(int(in_file.runner.decode([plain], [answer[-1]])[0].argmax()))
            expected += [*ids, *answer]
            pending = answer[-1:]
        plain.release()
        assert sessions[1].token_ids == expected
        assert_idle(in_file)


def test_an_answer_whose_pages_are_lost_at_its_end_fails_and_is_read_again(small_engine: Engine) -> None:
    turns = [random_ids(small_engine, n_tokens, seed=n_tokens) for n_tokens in TURNS]
    with engine_under(small_engine, small_policy("freekv"), **WHERE["file"], chunk=20) as engine:
        session = engine.session(mode="compressed", **ANSWER)
        session.generate(turns[0])
        held, before = session.held_tokens, len(session.token_ids)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.runner.states, "read", _lost)
            with pytest.raises(RecallError, match="lost"):
                session.generate(turns[1])
        assert session.held_tokens == held
        said = session.token_ids[before:]
        assert len(said) == len(turns[1]) + N_NEW
        again = engine.session(mode="compressed", **ANSWER)
        again.generate(turns[0])
        assert session.generate(turns[2]).token_ids == again.generate([*said, *turns[2]]).token_ids
        assert_idle(engine)


def test_what_comes_while_the_end_of_an_answer_is_copied_changes_nothing(engine: Engine) -> None:
    """A cancellation is too late; an interrupt stops the turn, whose pages are freed with the next step."""
    first, second, *_ = prompts(engine)
    plain = engine.session(mode="compressed", **ANSWER)
    expected = [plain.generate(ids).token_ids for ids in (first, second)]
    session, read = engine.session(mode="compressed", **ANSWER), engine.runner.states.read

    def cancelled(sequence: Any) -> Any:
        for request in engine.core._live:
            request.cancelled = True
        return read(sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner.states, "read", cancelled)
        assert session.generate(first).token_ids == expected[0]
    assert session.last is not None
    assert (session.last.finish_reason, session.held_tokens != ()) == ("length", True)
    fork = session.fork()

    def interrupted(_: Any) -> Any:
        patch.undo()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner.states, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fork.generate(second)
    assert fork.held_tokens == session.held_tokens
    assert not fork.in_turn
    assert session.generate(second).token_ids == expected[1]
    engine.core.run_until_idle()
    assert_idle(engine)


def _lost(_: object) -> None:
    raise RecallError("the pages are lost")
