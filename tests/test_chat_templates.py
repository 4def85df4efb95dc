"""Conversations are rendered and encoded as transformers does it, unless messages contain control tokens."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.chat_templates import CONTROL, ENDS, NAMED, PLAIN, TEMPLATES, TOKENIZERS, TOOLS
from trt_kv.chat.encoder import ChatEncoder, ChatOptions
from trt_kv.chat.templates import MAX_TEMPLATES, ChatTemplates, chat_templates
from trt_kv.chat.turns import end_of_turn_ids, text_end_ids
from trt_kv.errors import CheckpointError, UnknownNameError, UsageError
from trt_kv.prompt_tokens import prompt_tokens

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
Messages = list[dict[str, Any]]

CONVERSATIONS: dict[str, Messages] = {
    "one turn": [{"role": "user", "content": " What is\n\nthe capital?  "}],
    "several": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there , world\n"},
        {"role": "user", "content": "  and 日本語 🎉 é\u0301 ?"},
    ],
    "system": [{"role": "system", "content": " short & <b>brief</b>\n"}, {"role": "user", "content": "hello"}],
    "thoughts": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "tool_calls": None},
    ],
    "thoughts apart": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "hm\n"}],
}


def reference(tokenizer: Tokenizer, template: Any) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **SPECIAL_TOKENS)


def encoder(tokenizer: Tokenizer, template: Any) -> ChatEncoder:
    named = {"default": template} if isinstance(template, str) else template
    return ChatEncoder(tokenizer, ChatTemplates(owner="the model", templates=named, special_tokens=SPECIAL_TOKENS))


def id_of(token: str) -> int:
    index = TOKENIZERS["byte-level"].token_to_id(token)
    assert index is not None
    return index


def without(tokenizer: Tokenizer, content: str) -> Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != content]
    for index, token in enumerate(description["added_tokens"]):
        token["id"] = token["id"] if token["content"] in description["model"]["vocab"] else 10_000 + index
    return Tokenizer.from_str(json.dumps(description))


WITHOUT = {kind: without(tokenizer, "<|CHATBOT_TOKEN|>") for kind, tokenizer in TOKENIZERS.items()}
REFERENCES = {(kind, name): reference(TOKENIZERS[kind], TEMPLATES[name]) for kind in TOKENIZERS for name in TEMPLATES}
ENCODERS = {(kind, name): encoder(TOKENIZERS[kind], TEMPLATES[name]) for kind in TOKENIZERS for name in TEMPLATES}


def ids_of_transformers(kind: str, name: str, messages: Messages, **call: Any) -> list[int]:
    encoded: Any = REFERENCES[kind, name].apply_chat_template(messages, **call)
    return list(encoded["input_ids"])


def both(kind: str, name: str, messages: Messages, **options: Any) -> tuple[Any, Any]:
    """(text, ids) of ours and of transformers; what is raised instead, as the text of ``raise_exception``."""
    ours: Any
    theirs: Any
    try:
        rendered = ENCODERS[kind, name].render(messages, ChatOptions(generation_prompt=True, **options))
        ours = rendered.text, ENCODERS[kind, name].encode(rendered)
    except UsageError as error:
        ours = str(error.got).partition(" (line")[0]
    variables = options.pop("variables", {})
    call = {"add_generation_prompt": True, **options, **variables}
    try:
        text = REFERENCES[kind, name].apply_chat_template(messages, tokenize=False, **call)
        theirs = text, ids_of_transformers(kind, name, messages, **call)
    except Exception as error:  # noqa: BLE001  (jinja2's)
        theirs = str(error)
    return ours, theirs


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_text_and_token_ids_are_those_of_transformers(name: str, conversation: str) -> None:
    for kind in TOKENIZERS:
        for options in ({}, {"tools": TOOLS}, {"variables": {"enable_thinking": False, "date_string": "1 May"}}):
            ours, theirs = both(kind, name, CONVERSATIONS[conversation], **options)
            assert ours == theirs
            assert (ours == "System role not supported") == ((name, conversation) == ("gemma", "system"))


def test_tool_calls_and_their_results() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": [1, None, True]}}}
    messages: Messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": '{"degrees": 7}'},
    ]
    ours, theirs = both("byte-level", "llama-3", messages, tools=TOOLS)
    assert ours == theirs
    assert '"Zürich"' in ours[0]
    ours, theirs = both("byte-level", "llama-3", [messages[0], {"role": "assistant", "tool_calls": [call, call]}])
    assert ours == theirs == "This model only supports single tool-calls at once!"


TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n<|>[]/'\"&{}%ahelo")), max_size=12)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS).map(
        lambda turn: {"role": turn[0], "content": turn[1]}
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150)
@given(messages=TURNS, name=st.sampled_from(sorted(TEMPLATES)), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_any_messages_are_rendered_and_encoded_as_by_transformers(messages: Messages, name: str, kind: str) -> None:
    ours, theirs = both(kind, name, messages)
    assert ours == theirs


PIECES = st.lists(
    st.sampled_from([*CONTROL, *PLAIN, "</s>", "<s>", "<unk>", "a", " ", "\n", "<|im_", "end|>", "é"]), max_size=6
)


@settings(max_examples=150)
@given(pieces=PIECES, name=st.sampled_from(sorted(TEMPLATES)), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_control_tokens_written_by_a_user_are_text(pieces: list[str], name: str, kind: str) -> None:
    """The text is the same, and there are as many special tokens as with a message without any."""
    chat, tokenizer = ENCODERS[kind, name], TOKENIZERS[kind]
    written = "".join(pieces)
    messages = [{"role": "user", "content": f"a{written}a"}]
    rendered = chat.render(messages)
    assert rendered.text == REFERENCES[kind, name].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special and index != 0}
    found = [i for i in chat.encode(rendered) if i in special]
    assert found == [i for i in chat.token_ids([{"role": "user", "content": "ahello"}]) if i in special]
    trusted = chat.token_ids(messages, ChatOptions(trusted=True))
    assert trusted == ids_of_transformers(kind, name, messages, add_generation_prompt=True)


def test_control_tokens_become_the_letters_that_they_consist_of() -> None:
    """What is around them is encoded as in a text with any other word in their place."""
    chat, tokenizer = ENCODERS["byte-level", "chatml"], TOKENIZERS["byte-level"]
    ids = chat.token_ids([{"role": "user", "content": "hello<|im_end|> there"}])
    assert tokenizer.decode(ids, skip_special_tokens=False).count("<|im_end|>") == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhello<|im_end|> there\nassistant\n"
    letters = tokenizer.encode("<|im_", add_special_tokens=False).ids
    assert any(ids[at : at + len(letters)] == letters for at in range(len(ids)))


@settings(max_examples=150)
@given(
    text=st.lists(st.sampled_from(["<|CHATBOT_TOKEN|>", " ", "\n", "hello", "a", "é", "<", "|", "日"]), max_size=8).map(
        "".join
    ),
    kind=st.sampled_from(sorted(TOKENIZERS)),
    name=st.sampled_from(["chatml", "llama-3", "mistral", "zephyr"]),
)
def test_texts_around_control_tokens_have_the_tokens_of_a_tokenizer_that_does_not_know_them(
    text: str, kind: str, name: str
) -> None:
    """None of these templates writes <|CHATBOT_TOKEN|>. Without it, its tokenizer encodes the text in one go."""
    messages = [{"role": "user", "content": text}]
    rendered = ENCODERS[kind, name].render(messages)
    expected = WITHOUT[kind].encode(rendered.text, add_special_tokens=False).tokens
    assert [TOKENIZERS[kind].id_to_token(i) for i in ENCODERS[kind, name].encode(rendered)] == expected


def test_a_control_token_is_not_formed_by_two_parts_of_a_message() -> None:
    chat, end = ENCODERS["byte-level", "parts"], id_of("<|im_end|>")
    parts = [{"type": "text", "text": text} for text in ("a<|im_", "end|>b", "c")]
    messages: Messages = [{"role": "user", "content": parts}]
    rendered = chat.render(messages)
    assert rendered.text == REFERENCES["byte-level", "parts"].apply_chat_template(messages, tokenize=False)
    assert chat.encode(rendered).count(end) == 1
    assert chat.token_ids(messages, ChatOptions(trusted=True)).count(end) == 2


@pytest.mark.parametrize(
    "form", ["{{ X }}", "{{ X | tojson }}", "{{ X | tojson(ensure_ascii=true) }}", "{{ X | string | trim }}"]
)
@pytest.mark.parametrize("what", ["messages", "tools", "documents", "mood"])
def test_control_tokens_are_text_wherever_a_template_puts_them(form: str, what: str) -> None:
    """In keys and values of anything it is given; also next to characters like those that mark them inside."""
    chat, end = encoder(TOKENIZERS["byte-level"], form.replace("X", what) + "<|im_end|>"), id_of("<|im_end|>")
    given: dict[str, Any] = {"type": "a<|im_end|>", "<|im_end|>": ["\ufdd0<|im_end|>\ufdd1 \\ufdd2", {"role": "<|im_end|>"}]}
    messages: Messages = [{"role": "user", "content": "<|im_end|>", **given}]
    options = ChatOptions(tools=[given], documents=[given], variables={"mood": [given]})
    rendered = chat.render(messages, options)
    assert chat.encode(rendered).count(end) == 1
    theirs = reference(TOKENIZERS["byte-level"], form.replace("X", what) + "<|im_end|>").apply_chat_template(
        messages, tokenize=False, tools=[given], documents=[given], mood=[given]
    )
    assert rendered.text == theirs
    assert chat.encode(chat.render(messages, dataclasses.replace(options, trusted=True))).count(end) > 1


def test_characters_that_mark_control_tokens_inside_may_be_written() -> None:
    chat, end = ENCODERS["byte-level", "chatml"], id_of("<|im_end|>")
    for characters in (map(chr, range(0xFDD0, 0xFDF0)), map(chr, range(0xE000, 0xE100))):
        messages = [{"role": "user", "content": "".join(characters) + "<|im_end|>"}]
        rendered = chat.render(messages)
        expected = REFERENCES["byte-level", "chatml"].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered.text == expected
        assert chat.encode(rendered).count(end) == 1
    every = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)]))
    with pytest.raises(UsageError, match="every character for private use"):
        chat.render([{"role": "user", "content": every}])


def test_tokens_that_are_not_special_count_in_what_the_model_said_only() -> None:
    chat, think = ENCODERS["byte-level", "qwen-3"], id_of("<think>")
    assert think not in chat.token_ids([{"role": "user", "content": "<think>"}])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]
    assert chat.token_ids(messages).count(think) == 1
    harmless = ENCODERS["byte-level", "chatml"]  # a template that never writes it
    assert harmless.token_ids([{"role": "user", "content": "<think>"}]).count(think) == 1


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"template": "rag", "documents": [{"title": "a", "text": "b\nc"}]}])
def test_a_named_template_is_chosen_as_by_transformers(options: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hello\nthere"}]
    ours = encoder(TOKENIZERS["byte-level"], NAMED).render(messages, ChatOptions(**options)).text
    call = {"chat_template" if name == "template" else name: value for name, value in options.items()}
    theirs = reference(TOKENIZERS["byte-level"], NAMED).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **call
    )
    assert ours == theirs


IN_PARTS = [{"type": "text", "text": "he "}, {"type": "text", "text": "llo "}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(["chatml", "llama-3", "mistral", "gemma", "parts"], ["hello the", "hello  "]),
        ("parts", IN_PARTS),
    ],
)
def test_the_final_message_can_be_left_open(name: str, content: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    ours = ENCODERS["byte-level", name].render(messages, ChatOptions(continue_final=True)).text
    theirs = REFERENCES["byte-level", name].apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours == theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_found(name: str) -> None:
    added = {token.content: i for i, token in TOKENIZERS["byte-level"].get_added_tokens_decoder().items()}
    templates = ChatTemplates(owner="it", templates={"default": TEMPLATES[name]}, special_tokens=SPECIAL_TOKENS)
    assert end_of_turn_ids(templates, added) == (added[ENDS[name]],)


@pytest.mark.parametrize("template", ["{{ messages[1].content }} User:", "{{ raise_exception('no') }}", "{% for %}", ""])
def test_a_template_without_such_a_token_adds_none(template: str) -> None:
    assert end_of_turn_ids(ChatTemplates(owner="it", templates={"default": template}), {"</s>": 2}) == ()


def test_files_are_read_in_the_order_of_transformers(tmp_path: Path) -> None:
    """Each state of the folder is read by both."""
    files = {
        "chat_template.json": json.dumps({"chat_template": "legacy"}),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": [{"name": "default", "template": "a{{ eos_token }}"}, {"name": "tool_use", "template": "b"}],
                "eos_token": {"content": "</s>", "__type": "AddedToken"},
            }
        ),
        "special_tokens_map.json": json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}),
        "additional_chat_templates/rag.jinja": "c{{ bos_token }}\n",
        "chat_template.jinja": "d{{ bos_token }}{{ eos_token }}\r\n\r\n",
    }
    TOKENIZERS["byte-level"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "additional_chat_templates").mkdir()
    found: dict[str, Path] = {}
    for name, content in files.items():
        found[name] = tmp_path / name
        found[name].write_bytes(content.encode())
        templates = chat_templates(found, owner="it", error=CheckpointError)
        if name == "chat_template.json":
            assert templates.templates == {"default": "legacy"}
            continue
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        theirs = loaded.chat_template
        assert templates.templates == (theirs if isinstance(theirs, dict) else {"default": theirs})
        for name_of_template in templates.templates:
            text = templates.render(name_of_template, templates.templates[name_of_template], {})
            assert text == loaded.apply_chat_template(
                [{"role": "user", "content": "x"}], chat_template=templates.templates[name_of_template], tokenize=False
            )


@pytest.mark.parametrize("name", ["{{ m.content }}", "{{ '<' + m.content + '>' }}", "{{ m.content | trim }}"])
def test_parts_of_a_content_are_one_text_for_a_template_that_takes_texts(name: str) -> None:
    """Which would be an error, or Python's notation of a list in the prompt."""
    chat, template = ENCODERS["byte-level", "chatml"], f"{{% for m in messages %}}{name}{{% endfor %}}"
    parts = [{"type": "text", "text": "a <|im_end|>"}, {"type": "text", "text": "b"}]
    options = ChatOptions(template=template)
    found = chat.token_ids([{"role": "user", "content": parts}], options)
    assert found == chat.token_ids([{"role": "user", "content": "a <|im_end|>\nb"}], options)
    pieces = "{% for part in m.content %}[{{ part.text }}]{% endfor %}"
    both = f"{{% for m in messages %}}{{% if m.content is string %}}{name}{{% else %}}{pieces}{{% endif %}}{{% endfor %}}"
    assert chat.render([{"role": "user", "content": parts}], ChatOptions(template=both)).text == "[a <|im_end|>][b]"


NESTED: list[Any] = []
NESTED.append(NESTED)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "not a list of messages"),
        ([], "empty"),
        ({"role": "user"}, "not a list of messages"),
        (["hello"], r"messages\[0\] is not a message"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], 'no text under "content"'),
        ([{"role": "user", "content": 3}], 'no text under "content"'),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "is not text"),
        ([{"role": "user", "content": "\ud83d"}], "half a surrogate pair"),
        ([{"role": "user", "content": "x", "more": object()}], r"messages\[0\]\['more'\] is no plain data"),
        ([{"role": "user<|im_end|>", "content": "x"}], "control token in its role"),
        ([{"role": "user", "content": "x", "more": NESTED}], r"^messages has data in itself, or nested too deeply"),
    ],
)
def test_messages_that_are_none_are_refused_with_their_place(messages: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ENCODERS["byte-level", "chatml"].token_ids(messages)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [print]}, "tools is not a list of dictionaries"),
        ({"tools": [{"f": print}]}, "JSON schemas"),
        ({"documents": "x"}, "documents is not a list"),
        ({"template": 3}, "bad template"),
        ({"variables": {"x": {1, 2}}}, "template_variables"),
        ({"variables": [1]}, "template_variables is not a dictionary"),
        ({"variables": {1: 2}}, "template_variables is not a dictionary"),
        ({"trusted": "no"}, "bad trusted"),
        ({"continue_final": 1}, "bad continue_final_message"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ENCODERS["byte-level", "chatml"].token_ids([{"role": "user", "content": "x"}], ChatOptions(**options))


def test_a_template_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        encoder(TOKENIZERS["byte-level"], {}).token_ids([{"role": "user", "content": "x"}])
    with pytest.raises(UnknownNameError, match="default, rag, tool_use"):
        encoder(TOKENIZERS["byte-level"], NAMED).token_ids([{"role": "user", "content": "x"}], ChatOptions(template="fast"))


FLAGS = [
    {name: flag for name, flag in zip(("add_bos_token", "add_eos_token"), flags, strict=True) if flag is not None}
    for flags in itertools.product([None, True, False], repeat=2)
]


@pytest.mark.parametrize("with_processor", [True, False], ids=["<s> in front", "nothing added"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompts_have_the_special_tokens_of_transformers(kind: str, with_processor: bool, tmp_path: Path) -> None:
    """The post-processor of tokenizer.json counts; transformers ignores the flags of tokenizer_config.json beside it."""
    description = json.loads(TOKENIZERS[kind].to_str())
    description["post_processor"] = description["post_processor"] if with_processor else None
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for flags in FLAGS:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **SPECIAL_TOKENS, **flags}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)("hello a")
        assert prompt_tokens(tokenizer, "hello a") == theirs["input_ids"]


def test_ends_of_a_checkpoint_are_those_of_its_configs_and_its_template(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["gemma"])
    files = {name: tmp_path / name for name in ("tokenizer.json", "chat_template.jinja")}
    end = id_of("<end_of_turn>")
    assert text_end_ids((2, 7), files, vocab_size=999) == (2, 7, end)
    assert text_end_ids((end, 2), files, vocab_size=999) == (end, 2)
    assert text_end_ids((2,), files, vocab_size=end) == (2,)
    assert text_end_ids((2,), {"tokenizer.json": files["tokenizer.json"]}, vocab_size=999) == (2,)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": "x"}]}')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        text_end_ids((2,), files, vocab_size=999)


def test_the_number_of_templates_is_bounded(tmp_path: Path) -> None:
    """Each is rendered when an engine is built."""
    named = [{"name": f"t{i}", "template": "x"} for i in range(MAX_TEMPLATES + 1)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(CheckpointError, match="too many chat templates"):
        chat_templates({"tokenizer_config.json": tmp_path / "tokenizer_config.json"}, owner="it", error=CheckpointError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "template", "content", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(
        st.sampled_from(["chat_template", "bos_token", "eos_token", "my_token", "added_tokens_decoder"]), JSON
    ),
    tokens=JSON,
    template=st.sampled_from(sorted(TEMPLATES)),
)
def test_files_of_any_content_give_templates_or_the_error(config: Any, tokens: Any, template: str, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")}
    files["tokenizer_config.json"].write_text(json.dumps(config))
    files["special_tokens_map.json"].write_text(json.dumps(tokens))
    files["chat_template.json"].write_text(json.dumps({"chat_template": tokens}))
    try:
        templates = chat_templates(files, owner="it", error=CheckpointError)
    except CheckpointError:
        return
    assert all(isinstance(text, str) for text in (*templates.templates.values(), *templates.special_tokens.values()))
    assert end_of_turn_ids(templates, {"</s>": 2}) in ((), (2,))
    assert templates.render("mine", TEMPLATES[template], {"messages": CONVERSATIONS["one turn"], "tools": None})
