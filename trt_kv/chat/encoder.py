"""Conversations to token ids: rendered with a template and encoded, text of messages as text only."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_kv.chat.messages import Message, plain_data, plain_messages, plain_tools, texts_in
from trt_kv.chat.rendered import Marks, RenderedChat, pattern_of
from trt_kv.chat.templates import ChatTemplates
from trt_kv.errors import UsageError
from trt_kv.prompt_tokens import RenamableTokenizer, with_renamed_tokens


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation is rendered. ``tools``: JSON schemas; ``documents``: titles and texts; ``template``: the name, or the
    text, of a template; ``variables``: what else it reads, such as ``enable_thinking``.

    ``generation_prompt``: the head of the assistant's answer follows; with ``continue_final`` the last message is left open
    instead.
    ``trusted``: control tokens written in messages count, as in transformers.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template: str | None = None
    variables: Mapping[str, Any] | None = None
    generation_prompt: bool = True
    continue_final: bool = False
    trusted: bool = False


DEFAULT_OPTIONS = ChatOptions()


class ChatEncoder:
    """Renders conversations with ``templates`` and encodes them with ``tokenizer``. Any thread may use it.

    Control tokens (such as <|im_end|>) that are written in messages, tools and variables are encoded as the letters that they
    consist of. Everything else is encoded as transformers encodes it, token by token.
    """

    def __init__(self, tokenizer: RenamableTokenizer, templates: ChatTemplates) -> None:
        self.templates = templates
        self._tokenizer = tokenizer
        added = [
            token for token in tokenizer.get_added_tokens_decoder().values() if token.content and not token.content.isspace()
        ]
        self._special = frozenset(token.content for token in added if token.special)
        self._others = frozenset(token.content for token in added) - self._special

    def token_ids(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> list[int]:
        """Token ids of a conversation; ``UsageError`` for messages that are malformed or that the template refuses."""
        return self.encode(self.render(messages, options))

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> RenderedChat:
        """The text of a conversation; errors as for ``token_ids``."""
        plain = plain_messages(messages)
        tools = plain_tools(options.tools)
        documents = plain_tools(options.documents, name="documents")
        variables = plain_data(dict(options.variables or {}), "template_variables")
        name, source = self.templates.chosen(options.template, has_tools=tools is not None)
        taken = [source, *texts_in(plain), *texts_in(tools), *texts_in(documents), *texts_in(variables)]
        marks = Marks(self._special, self._others, taken) if not options.trusted else Marks((), (), taken)
        self._check_roles(plain)
        if options.continue_final:
            _leave_open(plain, marks.tail)
        given = {
            "messages": [_marked(message, marks) for message in plain],
            "tools": marks.marked(tools),
            "documents": marks.marked(documents),
            "add_generation_prompt": options.generation_prompt and not options.continue_final,
        }
        rendered = self.templates.render(name, source, {**marks.marked(variables), **given})
        if options.continue_final:
            rendered = _cut_open(rendered, marks.tail, f"the chat template {name!r}")
        return marks.read(rendered, lambda token, written: token in self._special or token in written or token in source)

    def space_before_answer(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> str:
        """The white space that the template writes between the head of an answer and its text."""
        head = self.render(messages, options).text
        try:
            whole = self.render([*messages, {"role": "assistant", "content": "x"}], options).text
        except UsageError:
            return ""
        space, answer, _ = whole[len(head) :].partition("x")
        return space if whole.startswith(head) and answer and not space.strip() else ""

    def encode(self, rendered: RenderedChat) -> list[int]:
        """Token ids of a rendered conversation. The tokenizer adds none: a template writes <bos> itself."""
        if not any(is_literal for _, is_literal in rendered.pieces):
            return list(self._tokenizer.encode(rendered.text, add_special_tokens=False).ids)
        tokenizer, names = self._renamed
        pattern = pattern_of(frozenset(names))
        renamed = [
            text if is_literal else pattern.sub(lambda match: names[match[0]], text) for text, is_literal in rendered.pieces
        ]
        return list(tokenizer.encode("".join(renamed), add_special_tokens=False).ids)

    @functools.cached_property
    def _renamed(self) -> tuple[RenamableTokenizer, Mapping[str, str]]:
        """A tokenizer whose control tokens have names that nobody can write, so that a text is encoded in one go: its control
        tokens by their new names, and those in messages, which keep the old ones, as letters.
        """
        return with_renamed_tokens(self._tokenizer, self._special | self._others)

    def _check_roles(self, messages: Sequence[Message]) -> None:
        control = pattern_of(frozenset(token for token in self._special | self._others if not token.isalnum()))
        for index, message in enumerate(messages):
            if control.search(message["role"]):
                raise UsageError(f"messages[{index}] has a control token in its role", got=repr(message["role"]))


def _marked(message: Mapping[str, Any], marks: Marks) -> dict[str, Any]:
    marked: dict[str, Any] = marks.marked(message, own=message["role"] in ("assistant", "model"))
    return {**marked, "role": message["role"]}


def _leave_open(messages: list[dict[str, Any]], tail: str) -> None:
    """Put ``tail`` behind the text of the last message, and a space, to see whether the template removes spaces."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = f"{content}{tail} "
    elif content:
        content[-1]["text"] += f"{tail} "
    else:
        raise UsageError("the final message has no text that could be continued", got=repr(content), expected="a text")


def _cut_open(rendered: str, tail: str, where: str) -> str:
    at = rendered.rfind(tail)
    if at < 0:
        raise UsageError(
            f"{where} leaves the final message out, so it cannot be continued", fix="leave continue_final_message out"
        )
    return rendered[:at] if rendered[at + 1 : at + 2] == " " else rendered[:at].rstrip()
