"""Which token a template puts at the end of the assistant's turn: generation ends there."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from trt_kv.chat.rendered import pattern_of
from trt_kv.chat.templates import ChatTemplates, chat_templates
from trt_kv.errors import CheckpointError, TrtKvError
from trt_kv.json_file import read_json
from trt_kv.manifest import MAX_TOKENIZER_BYTES, TOKENIZER_FILE

_QUESTION, _ANSWER = "trtkvquestion", "trtkvanswer"
_CONVERSATION = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def end_of_turn_ids(templates: ChatTemplates, added_tokens: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the tokens that the templates put behind what the assistant says, white space aside; in order, without repeats.

    ``added_tokens``: ids of the tokenizer's added tokens by content. Found by rendering a conversation. A template that ends
    turns with text, or that cannot render this conversation, adds none.
    """
    return tuple(dict.fromkeys(i for name in templates.templates if (i := _end_id(templates, name, added_tokens)) is not None))


def text_end_ids(eos_token_ids: Iterable[int], files: Mapping[str, Path], *, vocab_size: int) -> tuple[int, ...]:
    """All tokens that end a text of a checkpoint: ``eos_token_ids``, and those that its chat templates put behind an answer.

    ``files``: the tokenizer's, by the names that they have there. ``CheckpointError`` for files that are malformed.
    """
    templates = chat_templates(files, owner="the checkpoint", error=CheckpointError)
    if not templates.templates or TOKENIZER_FILE not in files:
        return tuple(eos_token_ids)
    path = files[TOKENIZER_FILE]
    try:
        description = read_json(path, kind="tokenizer", error=CheckpointError, max_bytes=MAX_TOKENIZER_BYTES)
        added = {str(token["content"]): int(token["id"]) for token in description.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(f"{path} is not a tokenizer", got=repr(cause), expected="a tokenizers file") from cause
    ends = [token for token in end_of_turn_ids(templates, added) if token < vocab_size]
    return tuple(dict.fromkeys((*eos_token_ids, *ends)))


def _end_id(templates: ChatTemplates, name: str, added_tokens: Mapping[str, int]) -> int | None:
    variables = {"messages": _CONVERSATION, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        rendered = templates.render(name, templates.templates[name], variables)
    except TrtKvError:
        return None
    _, answer, behind = rendered.rpartition(_ANSWER)
    tokens = frozenset(token for token in added_tokens if token and not token.isspace())
    match = pattern_of(tokens).match(behind.lstrip()) if answer else None
    return added_tokens[match[0]] if match is not None else None
