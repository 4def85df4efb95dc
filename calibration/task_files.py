"""The tasks file of an evaluation: JSON lines with prompts and expected answers, and when an answer is right."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trt_kv.calibration.prompt_files import ChatPrompt, chat_prompt_of, json_of_line, lines_of_file
from trt_kv.calibration.whole_words import inner_places
from trt_kv.errors import UsageError
from trt_kv.text_file import check_encodable, shortened

Match = Literal["exact", "contains"]
MATCHES: Mapping[str, str] = {
    "exact": "the answer begins with an accepted text",
    "contains": "the answer contains an accepted text",
}
_PLAIN = str.maketrans({"’": "'", "ʼ": "'", "‐": "-", "‑": "-", "−": "-"})
"""Typographic apostrophes, hyphens and the minus sign, as they are typed."""
FORM = '{"prompt": "...", "expected": "..."}'
CHAT_FORM = '{"messages": [{"role": "user", "content": "..."}], "expected": "..."}'


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One line of a tasks file: a prompt, or a conversation, and the ``accepted`` answers; the first is used for perplexity.

    ``name`` is unique; ``task`` is the group that the line is reported in, None if it has none.
    """

    line: int
    name: str
    task: str | None
    prompt: str | ChatPrompt
    accepted: tuple[str, ...]


def tasks_from_file(path: Path) -> list[FileTask]:
    """The tasks in a JSON-lines file, in order.

    Each line is an object with ``prompt`` (a text) or ``messages`` (a conversation, with ``tools``, see ``ChatPrompt``) and
    ``expected`` (a text, or a list of accepted texts); ``name`` (default: "line N") and ``task`` are optional texts, other keys
    are ignored. ``UsageError``, with the line number, for
    anything else, for a name that an earlier line has and for a file without lines. Blank lines are ignored.
    """
    lines = lines_of_file(path, kind="tasks")
    if not lines:
        raise UsageError("the file with the tasks is empty", got=str(path), expected=f"one task per line: {FORM}")
    tasks = [_task_of_line(line, number, f"line {number} of {path}") for number, line in lines.items()]
    seen: dict[str, int] = {}
    for task in tasks:
        if (earlier := seen.setdefault(task.name, task.line)) != task.line:
            raise UsageError(
                f"two tasks of {path} have the same name",
                got=f"{task.name!r} in lines {earlier} and {task.line}",
                fix='give each its own name; the key for a group of tasks is "task"',
            )
    return tasks


def is_right(text: str, accepted: Iterable[str], match: Match) -> bool:
    """Whether ``text`` begins with (or contains) one of the ``accepted`` texts, ignoring differences of white space.

    Words and numbers are matched whole: ``4`` is not found in ``42``, ``-4``, ``4.5`` or ``4%``, nor ``can`` in ``can't``.
    Scripts without upper and lower case, many of which have no spaces between words, are matched without this rule. The forms
    of one Unicode character are the same, and so are typographic and plain apostrophes, hyphens and minus signs.
    """
    answer = _normalised(text)
    inner = inner_places(answer)
    return any(_stands_in(answer, _normalised(wanted), match, inner) for wanted in accepted)


def _normalised(text: str) -> str:
    """``text`` in Unicode's composed form, with one space for each run of white space, and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_PLAIN).split())


def _stands_in(answer: str, wanted: str, match: Match, inner: set[int]) -> bool:
    start = answer.find(wanted)
    while start >= 0 and (match == "contains" or start == 0):
        if start not in inner and start + len(wanted) not in inner:
            return True
        start = answer.find(wanted, start + 1)
    return False


def _task_of_line(line: str, number: int, where: str) -> FileTask:
    data = json_of_line(line, where, expected=FORM)
    if not isinstance(data, dict):
        raise UsageError(f"{where} is not a task", got=shortened(line), expected=FORM)
    missing = [key for key in ("prompt", "expected") if key not in data and not (key == "prompt" and "messages" in data)]
    if missing:
        raise UsageError(f"{where} lacks {' and '.join(missing)}", got=shortened(line), expected=FORM)
    if "prompt" in data and "messages" in data:
        raise UsageError(f"{where} has two prompts", got='"prompt" and "messages"', expected=f"{FORM}, or {CHAT_FORM}")
    expected = data["expected"]
    if expected == []:
        raise UsageError(f"{where} has no expected answer", got="an empty list", expected="a text, or a list of texts")
    accepted = expected if isinstance(expected, list) else [expected]
    return FileTask(
        line=number,
        name=_text(data["name"], "name", where) if "name" in data else f"line {number}",
        task=_text(data["task"], "task", where) if "task" in data else None,
        prompt=_text(data["prompt"], "prompt", where) if "prompt" in data else chat_prompt_of(data, where),
        accepted=tuple(_text(text, "expected", where) for text in accepted),
    )


def _text(value: object, key: str, where: str) -> str:
    """``value`` if it is a non-empty text, or ``UsageError``."""
    if not isinstance(value, str):
        raise UsageError(f'"{key}" in {where} is not a text', got=shortened(repr(value)), expected="a text in quotes")
    if not value.strip():
        raise UsageError(f'"{key}" in {where} is empty', got=repr(value), expected="a text")
    check_encodable(value, what=f'"{key}" in {where}')
    return value
