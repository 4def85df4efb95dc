"""Which token a template puts at the end of the assistant's turn: generation ends there."""

from collections.abc import Mapping

from trt_kv.chat.rendered import pattern_of
from trt_kv.chat.templates import ChatTemplates
from trt_kv.errors import TrtKvError

_QUESTION, _ANSWER = "trtkvquestion", "trtkvanswer"
_CONVERSATION = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def end_of_turn_ids(templates: ChatTemplates, added_tokens: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the tokens that the templates put behind what the assistant says, white space aside; in order, without repeats.

    ``added_tokens``: ids of the tokenizer's added tokens by content. Found by rendering a conversation. A template that ends
    turns with text, or that cannot render this conversation, adds none.
    """
    return tuple(dict.fromkeys(i for name in templates.templates if (i := _end_id(templates, name, added_tokens)) is not None))


def _end_id(templates: ChatTemplates, name: str, added_tokens: Mapping[str, int]) -> int | None:
    variables = {"messages": _CONVERSATION, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        rendered = templates.render(name, templates.templates[name], variables)
    except TrtKvError:
        return None
    _, answer, behind = rendered.rpartition(_ANSWER)
    tokens = [token for token in added_tokens if token and not token.isspace()]
    match = pattern_of(tokens).match(behind.lstrip()) if answer else None
    return added_tokens[match[0]] if match is not None else None
