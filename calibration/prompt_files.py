"""Reads calibration prompts from a text file or a JSON-lines file."""

import json
from pathlib import Path

from trt_kv.errors import UsageError
from trt_kv.text_file import check_encodable, read_text, shortened


def prompts_from_file(path: Path) -> list[str]:
    """The prompts in ``path``, in order, unmodified.

    ``.txt``: one prompt per line. ``.jsonl``: one object per line with the prompt under ``prompt`` (other keys are
    ignored), which also allows prompts with line breaks. Blank lines are ignored. ``UsageError``, with the line number, for a
    malformed line; also for an unreadable or empty file and another file type.
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


def _prompt_of_json_line(line: str, where: str) -> str:
    expected = '{"prompt": "..."}'
    data = json_of_line(line, where, expected=expected)
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if not isinstance(prompt, str):
        raise UsageError(f"{where} holds no prompt", got=shortened(line), expected=expected)
    if not prompt.strip():
        raise UsageError(f"{where} holds an empty prompt", got=repr(prompt), expected=expected)
    check_encodable(prompt, what=f'"prompt" in {where}')
    return prompt
