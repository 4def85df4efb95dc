"""Tasks of a file as token ids of one model, validated before any of them is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from trt_kv.calibration.task_files import FileTask, is_right
from trt_kv.chat.encoder import ChatEncoder
from trt_kv.errors import UsageError
from trt_kv.prompt_tokens import prompt_tokens

SLACK = 4
"""Tokens generated beyond the longest accepted answer, to distinguish ``4`` from ``42`` and ``4.5``, and ``can`` from
``can’t``, whose apostrophe may be three tokens of a byte each.
"""
SEARCHED = 64
"""Tokens generated beyond the longest accepted answer with match "contains"."""


@dataclass(frozen=True, kw_only=True)
class TaskCase:
    """One task as token ids. ``expected``: the first accepted answer. At most ``limit`` tokens are generated.

    ``can_come_out``: whether the tokenizer reproduces some accepted answer, so that a model could generate it.
    """

    task: FileTask
    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    limit: int
    can_come_out: bool


@dataclass(frozen=True, kw_only=True)
class CaseRules:
    """How tasks become token ids for a model of ``max_positions`` positions and ``vocab_size`` tokens.

    ``separator`` is put between prompt and answer if neither has white space there. ``max_new_tokens``: None is as many as the
    longest accepted answer has plus 4, or plus 64 if answers only have to contain it (``contains``).
    """

    separator: str
    contains: bool
    max_new_tokens: int | None
    max_positions: int
    vocab_size: int


def cases_from_tasks(
    tasks: Sequence[FileTask], tokenizer: Tokenizer, rules: CaseRules, *, source: Path, chat: ChatEncoder | None = None
) -> list[TaskCase]:
    """One case per task. ``UsageError``, with the line of ``source``, for what the model or its tokenizer cannot process.

    ``chat``: encodes conversations; None if there are none.
    """
    return [_case(task, tokenizer, rules, f"line {task.line} of {source}", chat) for task in tasks]


def continuation_ids(tokenizer: Tokenizer, prompt: str, text: str) -> list[int]:
    """The tokens of ``text`` after ``prompt``, without special ones.

    They are the tokens after the prompt's when both are encoded together, if that leaves the prompt's tokens unchanged.
    """
    return _tokens_after(prompt_tokens(tokenizer, prompt), prompt_tokens(tokenizer, prompt + text), tokenizer, text)


def _tokens_after(before: list[int], whole: list[int], tokenizer: Tokenizer, text: str) -> list[int]:
    if len(whole) > len(before) and whole[: len(before)] == before:
        return whole[len(before) :]
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _encoded(
    task: FileTask, tokenizer: Tokenizer, rules: CaseRules, chat: ChatEncoder | None
) -> tuple[str, list[int], list[list[int]]]:
    """The prompt's text, its tokens and those of each accepted answer."""
    if isinstance(task.prompt, str):
        after = [continuation_ids(tokenizer, task.prompt, _joined(task.prompt, text, rules)) for text in task.accepted]
        return task.prompt, prompt_tokens(tokenizer, task.prompt), after
    assert chat is not None
    rendered = chat.render(task.prompt.messages, task.prompt.options)
    space = "" if task.prompt.is_open else chat.space_before_answer(task.prompt.messages, task.prompt.options)
    before = chat.encode(rendered)
    texts = [space + text for text in task.accepted]
    return (
        rendered.text,
        before,
        [_tokens_after(before, chat.encode(rendered.followed_by(text)), tokenizer, text) for text in texts],
    )


def _case(task: FileTask, tokenizer: Tokenizer, rules: CaseRules, where: str, chat: ChatEncoder | None) -> TaskCase:
    try:
        shown, prompt, answers = _encoded(task, tokenizer, rules, chat)
    except UsageError as cause:
        raise UsageError(f"{where}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause
    except Exception as cause:  # tokenizers raises no more specific class
        raise UsageError(f"the tokenizer cannot read {where}", got=str(cause)) from cause
    _check_tokens("prompt", shown, prompt, rules, where)
    for text, ids in zip(task.accepted, answers, strict=True):
        _check_tokens("expected", text, ids, rules, where)
    longest = max(map(len, answers))
    _check_lengths(len(prompt), longest, rules, where)
    wanted = rules.max_new_tokens or longest + (SEARCHED if rules.contains else SLACK)
    spelled = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return TaskCase(
        task=task,
        prompt=tuple(prompt),
        expected=tuple(answers[0]),
        limit=min(wanted, _room(len(prompt), rules)),
        can_come_out=any(is_right(said, [text], "exact") for said, text in zip(spelled, task.accepted, strict=True)),
    )


def _check_tokens(key: str, text: str, ids: Sequence[int], rules: CaseRules, where: str) -> None:
    if not ids:
        raise UsageError(
            f'"{key}" in {where} has no tokens', got=repr(text[:40]), expected="text in the vocabulary of the model's tokenizer"
        )
    if max(ids) >= rules.vocab_size:
        raise UsageError(
            f'"{key}" in {where} has token ids outside the vocabulary of the model',
            got=max(ids),
            expected=f"below {rules.vocab_size}",
        )


def _check_lengths(n_prompt: int, longest: int, rules: CaseRules, where: str) -> None:
    if longest > _room(n_prompt, rules):
        raise UsageError(
            f"{where} is too long for the model",
            got=f"{n_prompt} tokens in the prompt and {longest} expected",
            expected=f"at most {rules.max_positions} positions",
            fix="shorten the prompt, or use a checkpoint with a longer context",
        )
    if rules.max_new_tokens is not None and rules.max_new_tokens < longest:
        raise UsageError(
            f"the answer to {where} would be truncated",
            got=f"--max-new-tokens {rules.max_new_tokens}",
            expected=f"at least {longest}, the tokens of the expected answer",
        )


def _room(n_prompt: int, rules: CaseRules) -> int:
    """Number of tokens that can be generated: the last one is never an input, so it needs no position."""
    return rules.max_positions - n_prompt + 1


def _joined(prompt: str, text: str, rules: CaseRules) -> str:
    """``text`` as it continues ``prompt``."""
    return text if prompt[-1].isspace() or text[0].isspace() else rules.separator + text
