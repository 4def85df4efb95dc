"""Reads calibration prompts from a text file or a JSON-lines file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.chat.encoder import ChatOptions
from trt_kv.chat.messages import last_role, plain_messages, plain_tools
from trt_kv.errors import UsageError
from trt_kv.text_file import check_encodable, read_text, shortened


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A conversation, which the model's chat template makes a prompt of. ``tools``: JSON schemas, or None.

    If the last message is the assistant's, the prompt ends in it; otherwise with the head of its answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the prompt ends in the assistant's message."""
        return last_role(self.messages) == "assistant"

    @property
    def options(self) -> ChatOptions:
        return ChatOptions(tools=self.tools, continue_final=self.is_open)


def prompts_from_file(path: Path) -> list[str | ChatPrompt]:
    """The prompts in ``path``, in order, unmodified.

    ``.txt``: one prompt per line. ``.jsonl``: one object per line with the prompt under ``prompt``, which may have line breaks,
    or a conversation under ``messages`` (and ``tools``); other keys are ignored. Blank lines are ignored. ``UsageError``, with
    the line number, for a malformed line; also for an unreadable or empty file and another file type.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            "the file with the prompts has an unsupported type", got=path.name, expected="a name ending in .txt or .jsonl"
        )
    lines = lines_of_file(path, kind="prompts")
    if not lines:
        raise UsageError("the file with the prompts is empty", got=str(path), expected="one prompt per line")
    if path.suffix == ".txt":
        return list(lines.values())
    return [_prompt_of_json_line(line, f"line {number} of {path}") for number, line in lines.items()]


def lines_of_file(path: Path, *, kind: str) -> dict[int, str]:
    """The lines of a UTF-8 file by their number, from 1, without line ends and blank lines.

    Only LF and CR LF separate lines, as in JSON lines. ``UsageError`` for a file that cannot be read; ``kind`` describes
    the lines in its message.
    """
    lines = read_text(path, what=f"the file with the {kind}").split("\n")
    return {number: line for number, line in enumerate(lines, start=1) if line.strip()}


def json_of_line(line: str, where: str, *, expected: str) -> object:
    """The JSON document in ``line``; ``UsageError`` naming ``where`` if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise UsageError(f"{where} is not JSON", got=str(cause), expected=expected) from cause


def chat_prompt_of(data: Mapping[str, Any], where: str) -> ChatPrompt:
    """The conversation of a line with ``messages``; ``UsageError`` naming ``where`` for one that is malformed."""
    messages = plain_messages(data["messages"], name=f'"messages" in {where}: messages')
    return ChatPrompt(messages=messages, tools=plain_tools(data.get("tools"), name=f'"tools" in {where}: tools'))


def _prompt_of_json_line(line: str, where: str) -> str | ChatPrompt:
    expected = '{"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}'
    data = json_of_line(line, where, expected=expected)
    if isinstance(data, dict) and "messages" in data and "prompt" not in data:
        return chat_prompt_of(data, where)
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if not isinstance(prompt, str):
        raise UsageError(f"{where} holds no prompt", got=shortened(line), expected=expected)
    if not prompt.strip():
        raise UsageError(f"{where} holds an empty prompt", got=repr(prompt), expected=expected)
    check_encodable(prompt, what=f'"prompt" in {where}')
    return prompt
