"""The chat templates of a checkpoint or an engine: which files they are in, which one is meant, and how they are rendered."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_kv.errors import TrtKvError, UnknownNameError, UsageError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, read_json
from trt_kv.require import require
from trt_kv.safe_path import check_size
from trt_kv.text_file import lone_surrogate, shortened

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
LEGACY_FILE = "chat_template.json"
CONFIG_FILE = "tokenizer_config.json"
TOKENS_FILE = "special_tokens_map.json"
DEFAULT = "default"
MAX_TEMPLATE_BYTES = 2**18
"""Several times the largest that are published."""
MAX_TEMPLATES = 64
"""Of one checkpoint or engine: each is rendered to see how it ends a turn."""

_FAILURES = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(MemoryError, RecursionError, SyntaxError),
)
"""What a template raises beside jinja2's errors, with operations of Python on values of the wrong kind."""
_HOW_TO_RENDER = "check roles, tools and variables, or give another template"
_MOST_SAID = 400

_PART = "trtkvpart"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class ChatTemplates:
    """Templates by name; "default" is the one for conversations. ``special_tokens``: texts that all of them can use, such as
    ``bos_token``. ``owner``: what has them, for messages.
    """

    owner: str
    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, template: str | None, *, has_tools: bool) -> tuple[str, str]:
        """Name and text of the template that is meant by ``template``: a name, the text of another one, or None, which is
        "tool_use" if there are tools and such a template, else "default".
        """
        if template is not None and not isinstance(template, str):
            raise UsageError("bad template", got=repr(template), expected="a name, or the text of a template")
        if template is not None and ("{{" in template or "{%" in template):
            return "the given one", template
        if template is not None and template not in self.templates:
            raise UnknownNameError("chat template", template, self.templates)
        if not self.templates:
            raise UsageError(
                f"{self.owner} has no chat template",
                got="a tokenizer without one, as models have that were not trained on conversations",
                expected=f"{TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}",
                fix="use an instruct checkpoint, or write the prompt yourself (generate without --chat)",
            )
        name = template or ("tool_use" if has_tools and "tool_use" in self.templates else DEFAULT)
        if name not in self.templates:
            raise UsageError(
                f"{self.owner} has no default chat template", expected=f"one of {', '.join(sorted(self.templates))} by name"
            )
        return name, self.templates[name]

    def takes_parts(self, name: str, source: str) -> bool:
        """Whether the template ``source`` can render a content that is a list of parts: one is tried. Those that take texts
        only raise an error, or write the list as Python does.
        """
        part = {"type": "text", "text": _PART}
        variables = {"messages": [{"role": "user", "content": [part]}], "tools": None, "documents": None}
        try:
            text = self.render(name, source, {**variables, "add_generation_prompt": False})
        except TrtKvError:
            return False
        return _PART in text and not re.search(rf"['\"]{_PART}", text)

    def render(self, name: str, source: str, variables: Mapping[str, Any]) -> str:
        """The text of the template ``source``, called ``name``; ``UsageError`` with the line and what the template says."""
        sandbox = require("trt_kv.chat.sandbox")
        jinja2 = require("jinja2")
        where = f"the chat template {name!r} of {self.owner}"
        try:
            text = str(sandbox.render(source, {**self.special_tokens, **variables}))
        except jinja2.TemplateSyntaxError as error:
            found = f"line {error.lineno}: {error.message}"
            raise UsageError(f"{where} is malformed", got=found, expected="a jinja template") from error
        except _FAILURES as error:
            raise UsageError(
                f"{where} cannot be rendered", got=f"{type(error).__name__}: {_said(error)}", fix=_HOW_TO_RENDER
            ) from error
        except jinja2.TemplateError as error:
            refuses = type(error) is jinja2.TemplateError  # what raise_exception raises
            raise UsageError(
                f"{where} refuses these messages" if refuses else f"{where} cannot be rendered",
                got=_said(error),
                fix="change the messages as it says" if refuses else _HOW_TO_RENDER,
            ) from error
        if (at := lone_surrogate(text)) is not None:
            raise UsageError(f"{where} writes no text", got=f"half a surrogate pair, {text[at]!a}", fix=_HOW_TO_RENDER)
        return text


def chat_templates(files: Mapping[str, Path], *, owner: str, error: type[TrtKvError]) -> ChatTemplates:
    """The templates in ``files``, which are by the name that they have in a checkpoint; empty if there are none.

    ``chat_template.jinja`` and ``additional_chat_templates/NAME.jinja`` replace those of ``tokenizer_config.json``, as in
    transformers; ``chat_template.json`` is read if there is no other. Raises ``error`` for files that are malformed.
    """
    config = _object(files.get(CONFIG_FILE), error)
    templates = {
        DEFAULT if name == TEMPLATE_FILE else Path(name).stem: _text(path, error)
        for name, path in files.items()
        if name == TEMPLATE_FILE or _is_named_template(name)
    }
    if not templates:
        given = config.get("chat_template") or _object(files.get(LEGACY_FILE), error).get("chat_template")
        templates = _named(given, owner, error)
    if len(templates) > MAX_TEMPLATES:
        raise error(f"{owner} has too many chat templates", got=len(templates), expected=f"at most {MAX_TEMPLATES}")
    return ChatTemplates(owner=owner, templates=templates, special_tokens=_special_tokens(config, files, error))


def is_chat_file(name: str) -> bool:
    """Whether ``chat_templates`` reads a file of this name."""
    return name in (TEMPLATE_FILE, LEGACY_FILE, CONFIG_FILE, TOKENS_FILE) or _is_named_template(name)


def _is_named_template(name: str) -> bool:
    return name.startswith(f"{TEMPLATE_FOLDER}/") and name.endswith(".jinja")


def _said(error: BaseException) -> str:
    """The text of an error, and the line of the template, which jinja2 puts into the traceback."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    text = " ".join(str(error).split())
    text = text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}..."
    return text if line is None else f"{text} (line {line} of the template)"


def _named(given: Any, owner: str, error: type[TrtKvError]) -> dict[str, str]:
    """Templates of ``tokenizer_config.json``: one text, or a list of names and texts."""
    if given is None:
        return {}
    entries = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given
    try:
        found = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError) as cause:
        raise error(
            f"chat_template of {owner} is malformed", got=repr(cause), expected="a text, or names and templates"
        ) from cause
    if not all(isinstance(text, str) for item in found.items() for text in item):
        raise error(f"chat_template of {owner} is malformed", got=shortened(repr(found)), expected="texts")
    if any(len(text) > MAX_TEMPLATE_BYTES for text in found.values()):
        raise error(f"a chat template of {owner} is too large", expected=f"at most {MAX_TEMPLATE_BYTES} characters")
    return found


def _special_tokens(config: Mapping[str, Any], files: Mapping[str, Path], error: type[TrtKvError]) -> dict[str, str]:
    """Texts of the named special tokens; ``special_tokens_map.json`` counts if the other file does not describe the tokens."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named |= _object(files.get(TOKENS_FILE), error)
    more = [name for name, value in named.items() if name.endswith("_token") and isinstance(value, str)]
    texts = {}
    for name in (*_TOKENS, *more):
        value = named.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _object(path: Path | None, error: type[TrtKvError]) -> dict[str, Any]:
    if path is None:
        return {}
    data = read_json(path, kind="tokenizer's settings", error=error, max_bytes=MAX_DOCUMENT_BYTES)
    if not isinstance(data, dict):
        raise error(f"{path} holds no JSON object", got=type(data).__name__, expected="an object")
    return data


def _text(path: Path, error: type[TrtKvError]) -> str:
    check_size(path, MAX_TEMPLATE_BYTES, error=error)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {path}", got=str(cause), expected="a jinja template in UTF-8") from cause
