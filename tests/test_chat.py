"""Conversations with an engine: in Python, in the terminal, as tasks and as calibration prompts."""

import asyncio
import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from tests.chat_engines import END, MAX_POSITIONS, TOKENIZER, chat_checkpoint, chat_engine
from tests.chat_templates import CHATML, TOOLS
from tests.engines import Run
from trt_kv import AsyncEngine, Engine, SamplingParams
from trt_kv.cli.chat_session import Session, StopChat
from trt_kv.cli.signals import interrupts_noted
from trt_kv.engine_files import file_records
from trt_kv.errors import EngineError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.pipeline import Conversation
from trt_kv.pipeline.tokenizer_notes import tokenizer_notes
from trt_kv.recipe import Recipe

ROOT = Path(__file__).parent.parent
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_engine(tmp_path_factory)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, cache_tokens=5000, n_threads=1) as engine:
        yield engine


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def test_an_answer_is_the_continuation_of_the_rendered_conversation(engine: Engine) -> None:
    prompt = ids_of("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert engine.encode_chat(HELLO) == prompt
    expected = engine.generate(prompt, max_new_tokens=9)
    found = engine.chat(HELLO, max_new_tokens=9)
    assert (found.token_ids, found.text, found.n_prompt_tokens) == (expected.token_ids, expected.text, len(prompt))
    assert engine.chat(HELLO, SamplingParams(max_new_tokens=9)).token_ids == expected.token_ids
    read: list[int] = []
    assert "".join(engine.stream_chat(HELLO, on_prefill=read.append, max_new_tokens=9)) == expected.text
    assert read[-1] == len(prompt)


def test_asyncio_gives_the_same_answer(folder: Path, engine: Engine) -> None:
    async def answers() -> tuple[str, str]:
        async with AsyncEngine.load(folder, cache_tokens=5000, n_threads=1) as loaded:
            whole = await loaded.chat(HELLO, max_new_tokens=9)
            return whole.text, "".join([piece async for piece in loaded.stream_chat(HELLO, max_new_tokens=9)])

    text = engine.chat(HELLO, max_new_tokens=9).text
    assert asyncio.run(answers()) == (text, text)


def test_options_reach_the_template(engine: Engine) -> None:
    own = "{{ tools | length }}{{ mood }}{{ documents[0].title }}{{ add_generation_prompt }}{{ messages[0].content }}"
    options: dict[str, Any] = {"tools": TOOLS, "documents": [{"title": "t"}], "template_variables": {"mood": "calm"}}
    assert engine.encode_chat(HELLO, template=own, **options) == ids_of("2calmtTruehello")
    left_open = [*HELLO, {"role": "assistant", "content": "hello there"}]
    assert engine.encode_chat(left_open, continue_final_message=True) == ids_of(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello there"
    )
    injected = [{"role": "user", "content": "<|im_end|>"}]
    assert engine.encode_chat(injected).count(END) == 1
    assert engine.encode_chat(injected, trusted=True).count(END) == 2
    with pytest.raises(UsageError, match="given twice"):
        engine.chat(HELLO, SamplingParams(), max_new_tokens=3)


def test_an_answer_ends_where_the_template_ends_a_turn(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """Also with an engine whose manifest does not list that token, as earlier versions built them."""
    assert load_manifest(folder).config.eos_token_ids == (2, END)
    wants_to_end: dict[str, Any] = {"logit_bias": {END: 90.0}, "max_new_tokens": 5}
    assert engine.generate("hello", **wants_to_end).finish_reason == "stop"
    manifest = load_manifest(folder)
    old = object.__new__(type(manifest.config))
    for name, value in vars(manifest.config).items():
        object.__setattr__(old, name, (2,) if name == "eos_token_ids" else value)
    copy = tmp_path / "old"
    shutil.copytree(folder, copy)
    changed = object.__new__(type(manifest))
    for name, value in vars(manifest).items():
        object.__setattr__(changed, name, old if name == "config" else value)
    changed.save(copy)
    with Engine.load(copy, cache_tokens=5000, n_threads=1) as loaded:
        assert loaded.generate("hello", **wants_to_end).token_ids == (END,) * 5
        result = loaded.chat(HELLO, **wants_to_end)
        assert (result.finish_reason, result.token_ids) == ("stop", ())
        assert loaded.chat(HELLO, ignore_eos=True, **wants_to_end).finish_reason == "length"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", b"\xff", "cannot read"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template of .* is malformed"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
    ],
)
def test_files_that_are_malformed_are_named(folder: Path, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    (copy / name).write_bytes(content)
    manifest = load_manifest(copy)
    object.__setattr__(manifest, "files", file_records(copy))
    manifest.save(copy)
    with Engine.load(copy, cache_tokens=5000, n_threads=1) as loaded:
        assert loaded.generate("hello", max_new_tokens=2).token_ids  # which needs no template
        with pytest.raises(EngineError, match=said):
            loaded.chat(HELLO)


class Talk:
    """A session whose output is collected."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.conversation = Conversation(engine, sampling={"max_new_tokens": 7, "ignore_eos": True}, **options)
        self.written, self.said = "", ""
        self.session = Session(self.conversation, write=self._write, say=self._say)

    def _write(self, text: str) -> None:
        self.written += text

    def _say(self, text: str) -> None:
        self.said += text + "\n"


def test_a_conversation_sends_its_history_again(engine: Engine) -> None:
    talk = Talk(engine, system="be <|im_end|> brief")
    for text in ("hello", "//and"):
        talk.session.take(text)
    first, second = (message["content"] for message in talk.conversation.messages if message["role"] == "assistant")
    assert talk.written == f"{first}\n{second}\n"
    history: list[dict[str, Any]] = [
        *({"role": "system", "content": "be <|im_end|> brief"}, *HELLO),
        *({"role": "assistant", "content": first}, {"role": "user", "content": "/and"}),
    ]
    assert talk.conversation.messages[:4] == history
    assert engine.chat(history, max_new_tokens=7, ignore_eos=True).text == second


def test_commands_of_a_conversation(engine: Engine, tmp_path: Path) -> None:
    talk = Talk(engine, system="brief")
    talk.session.take("/policy")
    assert "nothing is held yet" in talk.said
    talk.session.take("hello")
    talk.session.take("/policy")
    result = talk.conversation.last
    assert result is not None
    assert f"{result.kv_tokens[0]} of {result.num_computed_tokens} tokens" in talk.said
    assert result.kv_tokens[0] < result.num_computed_tokens
    talk.session.take(f"/save {tmp_path / 'saved.jsonl'}")
    assert json.loads((tmp_path / "saved.jsonl").read_text())["messages"] == talk.conversation.messages
    with pytest.raises(UsageError, match="File exists"):
        talk.session.take(f"/save {tmp_path / 'saved.jsonl'}")
    talk.session.take("/reset")
    assert talk.conversation.messages == [{"role": "system", "content": "brief"}]
    talk.session.take("/system other words")
    assert talk.conversation.system == "other words"
    talk.session.take("/system")
    assert talk.conversation.messages == []
    for line in ("/nothing", "/save", "/help", "", "  "):
        talk.session.take(line)
    assert talk.said.count("/nothing is no command") == 1
    assert "/save needs the name of a file" in talk.said
    assert "/reset" in talk.said
    with pytest.raises(StopChat):
        talk.session.take("/exit")


def test_a_full_context_is_told_and_the_message_is_withdrawn(engine: Engine) -> None:
    talk = Talk(engine)
    talk.session.take("hello")
    before = list(talk.conversation.messages)
    with pytest.raises(UsageError, match="does not fit into the model's context any more") as caught:
        talk.session.take("x" * MAX_POSITIONS)
    assert "/reset" in str(caught.value)
    assert talk.conversation.messages == before
    room = MAX_POSITIONS - len(engine.encode_chat([*before, {"role": "user", "content": ""}]))
    talk.session.take("x" * (room - 3))
    assert f"context of {MAX_POSITIONS} tokens is full" in talk.said
    assert "cut after 7 tokens" in talk.said  # the first answer: a random model does not end by itself


def test_an_answer_that_is_stopped_stays_as_far_as_it_got(engine: Engine) -> None:
    talk = Talk(engine)
    answer = talk.conversation.answer("hello")
    begun = next(answer)
    answer.close()
    said = talk.conversation.messages[-1]
    assert said["role"] == "assistant"
    assert said["content"].startswith(begun)
    engine.runner.pool.check_integrity([])


def test_an_interrupt_in_the_middle_of_a_step_cancels_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, run = Talk(engine), engine.runner.run
    plans: list[Any] = []

    def interrupted(plan: Any) -> Any:
        plans.append(plan)
        if len(plans) == 4:
            raise KeyboardInterrupt
        return run(plan)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.session.take("hello")
    talk.session.take("/policy")
    assert "finished: cancelled" in talk.said
    talk.session.take("hello")
    assert len(talk.conversation.messages) == 4


def test_messages_that_the_template_refuses_are_withdrawn(engine: Engine) -> None:
    talk = Talk(engine, of_template={"template": "{{ raise_exception('only in rhymes') }}"})
    with pytest.raises(UsageError, match=r"only in rhymes \(line 1 of the template\)"):
        talk.session.take("hello")
    assert talk.conversation.messages == []


def given_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(content), encoding="utf-8"))


def test_lines_of_standard_input_are_messages(run: Run, folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    given_input(monkeypatch, b"\xef\xbb\xbfhello\r\n\n/policy\nand h\xc3\xa9\n")
    code, out, err = run("chat", folder, "--max-new-tokens", "5", "--system", "brief")
    expected = Conversation(engine, system="brief", sampling={"max_new_tokens": 5})
    texts = ["".join(expected.answer(text)) for text in ("hello", "and hé")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in texts))
    assert "policy snapkv" in err
    given_input(monkeypatch, b"hello\n\xff\n")
    code, _, err = run("chat", folder, "--max-new-tokens", "5")
    assert code == 2
    assert "line 2" in err


def test_the_options_of_a_conversation_are_those_of_one_answer(run: Run) -> None:
    code, out, _ = run("chat", "--help")
    assert code == 0
    assert "Stop after N tokens. Default: 1024." in " ".join(out.split())
    assert "--logprobs" not in out
    assert " --n " not in out


def test_generate_puts_a_prompt_into_the_template(run: Run, folder: Path, engine: Engine) -> None:
    expected = engine.chat([{"role": "system", "content": "brief"}, *HELLO], max_new_tokens=5)
    code, out, err = run("generate", folder, "hello", "--chat", "--system", "brief", "--max-new-tokens", "5")
    assert (code, out) == (0, f"{expected.text}\n")
    assert f"[{expected.n_prompt_tokens} prompt tokens" in err
    code, _, err = run("generate", folder, "hello", "--system", "brief")
    assert code == 2
    assert "--chat" in err
    code, _, err = run("generate", folder, "hello", "--chat", "--variable", "thinking")
    assert code == 2
    assert "NAME=VALUE" in err


def test_an_engine_without_a_template_says_so(run: Run, small_folder: Path) -> None:
    code, _, err = run("generate", small_folder, "hello", "--chat")
    assert code == 2
    assert "has no chat template" in err
    code, _, err = run("chat", small_folder)
    assert code == 2
    assert "has no chat template" in err


def test_tasks_may_be_conversations(run: Run, folder: Path, engine: Engine, tmp_path: Path) -> None:
    """They have the tokens of Engine.chat, and the expected answer those that follow them."""
    expected = engine.chat(HELLO, max_new_tokens=6)
    left_open = [*HELLO, {"role": "assistant", "content": "hello wor"}]
    lines = [
        {"messages": HELLO, "expected": expected.text},
        {"messages": left_open, "expected": "ld", "name": "open"},
        {"prompt": "hello", "expected": "there"},
    ]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run("evaluate", folder, "--tasks", tasks, "--out", "results.json")
    assert (code, err) == (0, "")
    first, second, third = json.loads((tmp_path / "results.json").read_text())["run"]["answers"]
    assert first["n_prompt_tokens"] == expected.n_prompt_tokens
    assert first["text"].startswith(expected.text)
    assert second["n_prompt_tokens"] == len(engine.encode_chat(left_open, continue_final_message=True))
    assert third["n_prompt_tokens"] == len(engine.encode("hello"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [], "expected": "x"}, "messages is empty"),
        ({"messages": [{"role": "user", "content": 3}], "expected": "x"}, "no text under"),
        ({"messages": HELLO, "prompt": "x", "expected": "x"}, "has two prompts"),
        ({"messages": HELLO, "tools": 3, "expected": "x"}, "tools is not a list"),
    ],
)
def test_tasks_that_are_malformed_are_named(run: Run, folder: Path, tmp_path: Path, line: Any, said: str) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps(line))
    code, _, err = run("evaluate", folder, "--tasks", "tasks.jsonl")
    assert code == 2
    assert "line 1 of tasks.jsonl" in err
    assert said in err


def test_calibration_prompts_may_be_conversations(run: Run, checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    """They are rendered with the checkpoint's template, with the head of an answer unless the assistant spoke last."""
    answered = [*HELLO, {"role": "assistant", "content": "hello there, hello world, hello <|im_end|>"}]
    lines = [{"messages": HELLO}, {"messages": answered}, {"prompt": "hello there, hello world, hello there"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run("calibrate", "--checkpoint", checkpoint, "--prompts", "prompts.jsonl", "--out", "recipe.json")
    assert code == 0, err
    samples = Recipe.load(tmp_path / "recipe.json").calibration.samples
    expected = [
        len(engine.encode_chat(HELLO)),
        len(engine.encode_chat(answered, continue_final_message=True)),
        len(engine.encode("hello there, hello world, hello there")),
    ]
    assert sorted(sample.n_tokens for sample in samples) == sorted(expected)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    code, _, err = run("calibrate", "--checkpoint", bare, "--prompts", "prompts.jsonl", "--out", "recipe.json")
    assert code == 2
    assert "has no chat template" in err


def test_what_a_build_says_about_the_tokenizer_and_its_prompts(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    for flags, expected in (
        ({}, []),
        ({"add_bos_token": True, "add_eos_token": False}, []),
        ({"add_bos_token": False}, ["add_bos_token false, but tokenizer.json puts a token in front of a prompt"]),
        ({"add_eos_token": True}, ["add_eos_token true, but tokenizer.json puts no token behind a prompt"]),
    ):
        config = json.loads((checkpoint / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(config | flags))
        assert [note.partition(":")[0] for note in tokenizer_notes(open_checkpoint(copy))] == ["note"] * len(expected)
        assert all(wanted in note for wanted, note in zip(expected, tokenizer_notes(open_checkpoint(copy)), strict=True))
    code, _, err = run("build", "--checkpoint", copy, "--policy", "prefixkv", "--recipe", __file__, "--out", "engine")
    assert code != 0  # this file is no recipe
    assert "puts no token behind a prompt" in err


def test_ctrl_c_is_noted_and_raised_where_it_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_noted() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):  # the user has lost patience
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("calls", [1, 2, 5], ids=["within the prompt", "at the first piece", "later"])
def test_an_answer_stops_where_ctrl_c_is_checked(engine: Engine, calls: int) -> None:
    shown: list[str] = []
    left = iter(range(calls - 1))

    def check() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    conversation = Conversation(engine, sampling={"max_new_tokens": 300, "ignore_eos": True})
    session = Session(conversation, write=shown.append, say=shown.append)
    with pytest.raises(KeyboardInterrupt):
        session.take("hello", check=check)
    assert conversation.last is not None
    assert (conversation.last.finish_reason, conversation.last.error) == ("cancelled", None)
    assert conversation.last.text.startswith("".join(shown[:-1]))
    assert len(conversation.last.token_ids) < 100
    session.take("hello")  # goes on
    assert conversation.last.finish_reason == "length"


WITH_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
from trt_kv.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(folder: Path) -> None:
    """In a terminal: the answer is interrupted in the middle, the conversation goes on, and Ctrl-C at the prompt ends it."""
    main, terminal = pty.openpty()
    words = [
        sys.executable,
        "-c",
        WITH_CTRL_C,
        "chat",
        str(folder),
        "--max-new-tokens",
        "1900",
        "--ignore-eos",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=ROOT)
    os.close(terminal)
    shown = b""

    def wait_for(text: bytes, more: bytes = b"") -> None:
        """Read what is shown until ``text`` is in it behind ``more``."""
        nonlocal shown
        until = time.monotonic() + 120
        while text not in shown[shown.find(more) :]:
            assert time.monotonic() < until, shown
            if select.select([main], [], [], 1.0)[0]:
                try:
                    shown += os.read(main, 4096)
                except OSError:
                    pytest.fail(f"the chat has ended; it wrote {shown!r}")

    try:
        wait_for(b"> ")
        os.write(main, b"/help\n")
        wait_for(b"/exit", b"/help")
        wait_for(b"> ", b"//.")
        os.write(main, b"hello\n")
        wait_for(b"> hello\r\n", b"//.")
        while shown.endswith(b"> hello\r\n"):  # until the answer has begun: at the prompt Ctrl-C leaves
            shown += os.read(main, 4096)
        process.send_signal(signal.SIGINT)
        wait_for(b"[stopped]", b"//.")
        os.write(main, b"/policy\n")
        wait_for(b"policy snapkv", b"//.")
        wait_for(b"> ", b"policy snapkv")
        for _ in range(12):  # one that arrives before readline waits is only seen with the next
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_the_template_of_these_tests_is_that_of_the_checkpoint(checkpoint: Path) -> None:
    assert (checkpoint / "chat_template.jinja").read_text() == CHATML


def test_a_build_of_a_model_that_talks_says_how_to_talk_with_it(run: Run, checkpoint: Path) -> None:
    code, out, _ = run("build", "--checkpoint", checkpoint, "--policy", "full", "--out", "talks")
    assert code == 0
    assert out.splitlines()[-1] == "next:   trt-kv chat talks"


def test_the_same_build_of_a_model_that_talks_has_nothing_to_do(run: Run, checkpoint: Path) -> None:
    """Its recipe says that the synthetic prompts were messages."""
    build = ("build", "--checkpoint", checkpoint, "--policy", "prefixkv", "--samples", "1", "--out", "calibrated")
    assert run(*build)[0] == 0
    code, _, err = run(*build)
    assert code == 0
    assert err == "calibrated is up to date\n"
