"""Tasks of one's own: what a file may hold, and how tasks become a model's tokens."""

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from trt_kv.calibration.task_cases import SLACK, CaseRules, cases_from_tasks, continuation_ids
from trt_kv.calibration.task_files import FileTask, tasks_from_file
from trt_kv.errors import UsageError

RULES = CaseRules(separator=" ", contains=False, max_new_tokens=None, max_positions=9, vocab_size=6)
SOURCE = Path("mine.jsonl")


def test_a_file_of_tasks_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '{"prompt": "two\\nlines", "expected": "x", "id": 7}\n'
        '{"name": "b", "task": "sums", "prompt": " 1+1=", "expected": ["2", "two "]}\n'
    )
    assert tasks_from_file(path) == [
        FileTask(line=1, name="line 1", task=None, prompt="two\nlines", accepted=("x",)),
        FileTask(line=2, name="b", task="sums", prompt=" 1+1=", accepted=("2", "two ")),
    ]


GOOD = b'{"prompt": "p", "expected": "e"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "file with the tasks is empty"),
        (b" \r\n\n", "file with the tasks is empty"),
        (GOOD + b"prompt: p\n", "line 2 of .*is not JSON"),
        (GOOD + b'\n{"prompt": "p", "expected": \n', "line 3 of .*is not JSON"),
        (b'["p", "e"]\n', "line 1 of .*is not a task"),
        (GOOD + b'{"prompt": "p"}\n', "line 2 of .*lacks expected"),
        (b'{"expected": "e"}\n', "line 1 of .*lacks prompt"),
        (b'{"answer": "e"}\n', "line 1 of .*lacks prompt and expected"),
        (b'{"prompt": 3, "expected": "e"}\n', '"prompt" in line 1 of .*is not a text'),
        (b'{"prompt": " ", "expected": "e"}\n', '"prompt" in line 1 of .*is empty'),
        (b'{"prompt": "p", "expected": 42}\n', '"expected" in line 1 of .*is not a text'),
        (b'{"prompt": "p", "expected": "\\n"}\n', '"expected" in line 1 of .*is empty'),
        (b'{"prompt": "p", "expected": []}\n', "line 1 of .*has no expected answer"),
        (b'{"prompt": "p", "expected": ["e", null]}\n', '"expected" in line 1 of .*is not a text'),
        (b'{"prompt": "p", "expected": "e", "task": 1}\n', '"task" in line 1 of .*is not a text'),
        (b'{"prompt": "p", "expected": "\\ud83d"}\n', '"expected" in line 1 of (?s:.*)a lone surrogate'),
        (b'{"name": "line 2", "prompt": "p", "expected": "e"}\n' + GOOD, "same name"),
        (b"\xff\n", "byte 0 in line 1"),
    ],
)
def test_a_wrong_task_is_refused_with_its_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        tasks_from_file(path)


def test_equal_names_are_told_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(GOOD + 2 * b'{"name": "a", "prompt": "p", "expected": "e"}\n')
    with pytest.raises(UsageError, match="'a' in lines 2 and 3"):
        tasks_from_file(path)


def word_tokenizer(words: str, unknown: str | None) -> Tokenizer:
    """<bos>, then a token per word that is one of ``words``; others become ``unknown`` or, without one, nothing."""
    vocabulary = {word: i for i, word in enumerate(["<bos>", *([unknown] if unknown else []), *words.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown) if unknown else WordLevel(vocabulary))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.add_special_tokens(["<bos>", *([unknown] if unknown else [])])
    return tokenizer


def test_a_case_has_the_first_answers_tokens_and_room_for_the_longest() -> None:
    tokenizer = word_tokenizer("a b c d", "<unk>")
    task = FileTask(line=1, name="x", task=None, prompt="a b", accepted=("c", "c d a"))
    (case,) = cases_from_tasks([task], tokenizer, RULES, source=SOURCE)
    assert case.prompt == (0, 2, 3)
    assert case.expected == (4,)
    assert case.limit == 3 + SLACK
    assert case.can_come_out
    limits = [
        cases_from_tasks([task], tokenizer, rules, source=SOURCE)[0].limit
        for rules in (dataclasses.replace(RULES, contains=True), dataclasses.replace(RULES, max_new_tokens=5))
    ]
    assert limits == [9 - 3 + 1, 5]


def test_an_answer_that_the_tokenizer_cannot_spell_is_found_out() -> None:
    tokenizer = word_tokenizer("a b c d", "<unk>")
    tasks = [FileTask(line=1, name="x", task=None, prompt="a b", accepted=("c e",))]
    assert not cases_from_tasks(tasks, tokenizer, RULES, source=SOURCE)[0].can_come_out


@pytest.mark.parametrize(
    ("prompt", "expected", "rules", "words"),
    [
        ("a b c d a b", "c d a b", RULES, "line 3 of mine.jsonl is too long for the model"),
        (
            "a b",
            "c d",
            dataclasses.replace(RULES, vocab_size=4),
            '"expected" in line 3 of mine.jsonl has token ids outside the vocabulary',
        ),
        ("a b", "e", RULES, "the tokenizer cannot read line 3 of mine.jsonl"),
        ("a b", "c d", dataclasses.replace(RULES, max_new_tokens=1), "line 3 of mine.jsonl would be truncated"),
    ],
)
def test_what_the_model_cannot_hold_is_refused_with_its_line(prompt: str, expected: str, rules: CaseRules, words: str) -> None:
    task = FileTask(line=3, name="x", task=None, prompt=prompt, accepted=(expected,))
    with pytest.raises(UsageError, match=words):
        cases_from_tasks([task], word_tokenizer("a b c d", None), rules, source=SOURCE)


def test_a_text_without_tokens_is_refused_with_its_line() -> None:
    """Some tokenizers leave out what they do not know."""
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1}, []))
    for prompt, accepted, key in (("ab", ("b", "e"), "expected"), ("e", ("b",), "prompt")):
        task = FileTask(line=3, name="x", task=None, prompt=prompt, accepted=accepted)
        with pytest.raises(UsageError, match=rf'"{key}" in line 3 of mine\.jsonl has no tokens'):
            cases_from_tasks([task], tokenizer, RULES, source=SOURCE)


def test_the_last_expected_token_needs_no_position() -> None:
    """Seven prompt tokens and three expected ones: of nine positions the last is the second expected token's."""
    task = FileTask(line=1, name="x", task=None, prompt="a b c d a b", accepted=("c d a",))
    (case,) = cases_from_tasks([task], word_tokenizer("a b c d", None), RULES, source=SOURCE)
    assert (len(case.prompt), len(case.expected), case.limit) == (7, 3, 3)


def test_an_answer_is_tokenized_as_the_continuation_of_its_prompt() -> None:
    """A space between is part of the first token; where prompt and answer grow together the answer is tokenized alone."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "Ġ", "Ġc", "ab"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("Ġ", "c"), ("a", "b")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert continuation_ids(tokenizer, "b", " c") == [4]
    assert continuation_ids(tokenizer, "c a", "b") == [1]
    tasks = [
        FileTask(line=1, name="x", task=None, prompt=prompt, accepted=(text,))
        for prompt, text in (("b", "c"), ("b ", "c"), ("b", " c"))
    ]
    assert [case.expected for case in cases_from_tasks(tasks, tokenizer, RULES, source=SOURCE)] == [(4,), (2,), (4,)]
    glued = dataclasses.replace(RULES, separator="")
    assert [case.expected for case in cases_from_tasks(tasks, tokenizer, glued, source=SOURCE)] == [(2,), (2,), (4,)]
