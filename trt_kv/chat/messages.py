"""Messages as callers pass them to plain data for a template, checked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trt_kv.errors import UsageError
from trt_kv.text_file import check_whole_characters, shortened

Message = Mapping[str, Any]
"""``role`` and ``content`` (a text, or a list of parts ``{"type": "text", "text": ...}``), and what else its template reads."""

_MOST_DEPTH = 64
FORM = '[{"role": "user", "content": "..."}]'
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what a model thought before it answered."""


def plain_messages(messages: Any, *, name: str = "messages") -> list[dict[str, Any]]:
    """A copy of ``messages`` of plain JSON types, without keys whose value is None; ``UsageError`` for anything else.

    What a model thought may be under any of the names in use; a template finds it as ``reasoning_content`` and ``thinking``.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(
            f"{name} is not a list of messages", got=shortened(f"{type(messages).__name__}: {messages!r}"), expected=FORM
        )
    if not messages:
        raise UsageError(f"{name} is empty", expected=FORM)
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def plain_data(value: Any, name: str, *, depth: int = 0) -> Any:
    """A copy of ``value`` of plain JSON types; ``UsageError``, with its place in ``name``, for anything else.

    ``depth``: of the lists and dictionaries that it is in.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if depth > _MOST_DEPTH:
        raise UsageError(
            f"{name[: name.index('[')]} has data in itself, or nested too deeply",
            got=f"more than {_MOST_DEPTH} levels",
            expected="what JSON has, without cycles",
        )
    if isinstance(value, str):
        check_whole_characters(value, what=name)
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {
            str(plain_data(key, f"a key of {name}", depth=_MOST_DEPTH)): plain_data(item, f"{name}[{key!r}]", depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{name}[{index}]", depth=depth + 1) for index, item in enumerate(value)]
    raise UsageError(
        f"{name} is no plain data",
        got=type(value).__name__,
        expected="what JSON has: texts, numbers, True, False, None, lists, dictionaries",
        fix="pass tools as JSON schemas" if callable(value) else None,
    )


def plain_tools(tools: Any, *, name: str = "tools") -> list[dict[str, Any]] | None:
    """Tools, or documents, as plain data; ``UsageError`` unless they are a list of dictionaries, or None."""
    if tools is None:
        return None
    if isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools):
        return [plain_data(tool, f"{name}[{index}]") for index, tool in enumerate(tools)]
    raise UsageError(
        f"{name} is not a list of dictionaries",
        got=shortened(f"{type(tools).__name__}: {tools!r}"),
        expected="JSON schemas of functions" if "tools" in name else 'a list of {"title": "...", "text": "..."}',
    )


def plain_variables(variables: Any) -> dict[str, Any]:
    """Variables of a template as plain data; ``UsageError`` unless they are a dictionary by name, or None."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise UsageError(
            "template_variables is not a dictionary by name",
            got=shortened(f"{type(variables).__name__}: {variables!r}"),
            expected='e.g. {"enable_thinking": False}',
        )
    plain: dict[str, Any] = plain_data(variables, "template_variables")
    return plain


def texts_in(value: Any) -> Iterator[str]:
    """Every text in plain data, keys of dictionaries among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def with_joined_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain messages, with the parts of each content as one text of several lines, as in vLLM."""
    return [
        {**message, "content": "\n".join(part["text"] for part in content)}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def last_role(messages: Sequence[Message]) -> str:
    """The role of the last message."""
    return str(messages[-1]["role"])


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{name} is not a message", got=shortened(f"{type(message).__name__}: {message!r}"), expected=FORM)
    plain = {key: item for key, item in plain_data(message, name).items() if item is not None}
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError(f"{name} has no role", got=shortened(json.dumps(plain)), expected="system, user, assistant or tool")
    _check_content(plain, name)
    thought = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _check_content(message: Mapping[str, Any], name: str) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and set(message) > {"role"}):  # of tool calls, which need no text
        return
    if not isinstance(content, list):
        raise UsageError(f'{name} has no text under "content"', got=shortened(repr(content)), expected=FORM)
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UsageError(
                f'{name}["content"][{index}] is not text',
                got=f"a part of type {kind!r}",
                expected='parts of text only: {"type": "text", "text": "..."}',
                fix="leave it out: trt-kv runs models of text" if kind != "text" else None,
            )
