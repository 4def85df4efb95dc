"""Reads calibration prompts from a text file or a JSON-lines file."""

import json
from pathlib import Path

from trt_kv.errors import UsageError


def prompts_from_file(path: Path) -> list[str]:
    """The prompts in ``path``, in order, unmodified.

    ``.txt``: one prompt per line. ``.jsonl``: one object per line with the prompt under ``prompt`` (other keys are
    ignored), which also allows prompts with line breaks. ``UsageError``, with the line number, for an empty
    or malformed line; also for an unreadable or empty file and another file type.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            "the file with the prompts has an unsupported type", got=path.name, expected="a name ending in .txt or .jsonl"
        )
    lines = lines_of_file(path, kind="prompts")
    if not lines:
        raise UsageError("the file with the prompts is empty", got=str(path), expected="one prompt per line")
    read = _prompt_of_json_line if path.suffix == ".jsonl" else _prompt_of_text_line
    return [read(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]


def lines_of_file(path: Path, *, kind: str) -> list[str]:
    """The lines of a UTF-8 file, without line ends; only LF and CR LF separate them, as in JSON lines.

    ``UsageError`` for a file that cannot be read; ``kind`` describes the lines in its message.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise UsageError(f"cannot read the file with the {kind}", got=f"{path}: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        line = cause.object[: cause.start].count(b"\n") + 1
        raise UsageError(f"the {kind} are not UTF-8 text", got=f"byte {cause.start} in line {line} of {path}") from cause
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def json_of_line(line: str, where: str, *, expected: str) -> object:
    """The JSON document in ``line``; ``UsageError`` naming ``where`` for an empty line and for one that is not JSON."""
    if not line.strip():
        raise UsageError(f"{where} is empty", expected=expected, fix="remove the line")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise UsageError(f"{where} is not JSON", got=str(cause), expected=expected) from cause


def _prompt_of_text_line(line: str, where: str) -> str:
    if not line.strip():
        raise UsageError(
            f"{where} is empty",
            expected="one prompt per line",
            fix="remove the line; prompts with line breaks go into a .jsonl file",
        )
    return line


def _prompt_of_json_line(line: str, where: str) -> str:
    expected = '{"prompt": "..."}'
    data = json_of_line(line, where, expected=expected)
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if not isinstance(prompt, str):
        raise UsageError(f"{where} holds no prompt", got=line if len(line) <= 80 else f"{line[:77]}...", expected=expected)
    if not prompt.strip():
        raise UsageError(f"{where} holds an empty prompt", got=repr(prompt), expected=expected)
    return prompt
