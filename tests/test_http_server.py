"""``trt-kv serve`` as clients see it: the openai package and plain HTTP against a real server on a loopback port."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat_engines import chat_engine
from tests.http_server import MODEL, Served, eventually, served
from trt_kv.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_engine(tmp_path_factory)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Served]:
    with served(folder) as server:
        yield server


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Engine]:
    """The same engine without a server."""
    with Engine.load(folder, cache_tokens=4000, chunk=16, n_threads=1) as engine:
        yield engine


@pytest.fixture
def client(tiny: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def post(server: Served, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_is_that_of_the_engine_whole_and_streamed(client: openai.OpenAI, alone: Engine) -> None:
    expected = alone.chat(said("Hello there"), max_new_tokens=20)
    options: dict[str, Any] = {"model": MODEL, "messages": said("Hello there"), "max_tokens": 20}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == len(expected.token_ids)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.n_prompt_tokens, len(expected.token_ids))
    kv = whole.usage.model_extra["kv"]
    assert kv["kept_tokens"] == pytest.approx(sum(expected.kv_tokens) / len(expected.kv_tokens), abs=0.01)
    assert kv["kept_share_per_layer"] == pytest.approx([n / kv["computed_tokens"] for n in expected.kv_tokens], abs=1e-4)
    assert 0.0 < kv["kept_share_per_layer"][0] < 1.0
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_completions_of_several_prompts_have_their_samples_in_order(client: openai.OpenAI, alone: Engine) -> None:
    prompts = ["once upon", "a time"]
    expected = [
        sample.text
        for prompt in prompts
        for sample in alone.generate(prompt, n=2, temperature=0.9, seed=5, max_new_tokens=9, stop=["e"]).samples
    ]
    options: dict[str, Any] = {"model": MODEL, "prompt": prompts, "n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 9}
    options["stop"] = ["e"]
    whole = client.completions.create(**options, logprobs=1)
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(**options, stream=True, echo=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [prompts[at // 2] + text for at, text in enumerate(expected)]


def test_parameters_of_other_servers_reach_the_engine(client: openai.OpenAI, alone: Engine) -> None:
    sampling: dict[str, Any] = {"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.3, "min_tokens": 6, "ignore_eos": True}
    expected = alone.chat(said("x"), temperature=0.8, seed=3, max_new_tokens=12, logit_bias={70: 2.0}, **sampling)
    found = client.chat.completions.create(
        model=MODEL,
        messages=said("x"),  # type: ignore[arg-type]
        temperature=0.8,
        seed=3,
        max_completion_tokens=12,
        logit_bias={"70": 2},
        extra_body=sampling,
    )
    assert found.choices[0].message.content == expected.text


def test_many_clients_at_once_get_exactly_what_each_gets_alone(tiny: Served, alone: Engine) -> None:
    """32 clients of different lengths, half of them streaming, a third of them sampling."""
    asked: list[dict[str, Any]] = [
        {
            "model": MODEL,
            "messages": said(f"client {at} " + "word " * (at * 7 % 40)),
            "max_tokens": 5 + at % 13,
            "temperature": 0.8 * (at % 3 == 0),
            "seed": at,
        }
        for at in range(32)
    ]
    expected = [
        alone.chat(one["messages"], max_new_tokens=one["max_tokens"], temperature=one["temperature"], seed=one["seed"]).text
        for one in asked
    ]

    async def ask(found: openai.AsyncOpenAI, at: int, one: dict[str, Any]) -> str:
        if at % 2:
            answer = await found.chat.completions.create(**one)
            return answer.choices[0].message.content or ""
        return "".join(
            [chunk.choices[0].delta.content or "" async for chunk in await found.chat.completions.create(**one, stream=True)]
        )

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
            return list(await asyncio.gather(*(ask(found, at, one) for at, one in enumerate(asked))))

    assert asyncio.run(everyone()) == expected
    assert eventually(lambda: tiny.is_idle)


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
    ],
    ids=lambda field: next(iter(field)),
)
def test_an_answer_has_the_structure_that_was_asked_for(tiny: Served, field: dict[str, Any]) -> None:
    """From a model with random weights, at a high temperature."""
    body = {"messages": said("x"), "temperature": 1.5, "n": 3, "seed": 1, "max_tokens": 60, **field}
    choices = post(tiny, CHAT, body).json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        answer = json.loads(choice["message"]["content"])
        assert set(answer) == {"n", "ok"}
        assert 0 <= answer["n"] <= 99
        assert isinstance(answer["ok"], bool)


def test_an_answer_is_one_of_the_choices_or_of_a_grammar(tiny: Served) -> None:
    for field, allowed in (
        ({"structured_outputs": {"choice": ["North", 'So"uth']}}, {"North", 'So"uth'}),
        ({"guided_regex": "(ab|cd){2}"}, {"abab", "abcd", "cdab", "cdcd"}),
        ({"guided_grammar": 'start: "a" B\nB: "x" | "y"'}, {"ax", "ay"}),
    ):
        body = {"prompt": "x", "temperature": 2.0, "n": 4, "seed": 1, **field}
        assert {choice["text"] for choice in post(tiny, COMPLETIONS, body).json()["choices"]} <= allowed


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"messages": said("x"), "temperature": -1}, 400, "temperature"),
        (CHAT, {"messages": said("x"), "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": said("x"), "max_completion_tokens": 0}, 400, "max_completion_tokens"),
        (CHAT, {"messages": said("x"), "temprature": 1}, 400, "temprature"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": said("x"), "top_logprobs": 3}, 400, "top_logprobs"),
        (CHAT, {"messages": said("x"), "logit_bias": {"x": 1}}, 400, "logit_bias"),
        (CHAT, {"messages": said("x"), "logit_bias": {"400": 1}}, 400, "logit_bias"),
        (CHAT, {"messages": said("x"), "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (CHAT, {"messages": said("x"), "guided_json": {"type": "thing"}}, 400, "response_format"),
        (CHAT, {"messages": said("x"), "guided_regex": "a", "guided_grammar": "b"}, 400, "guided_grammar"),
        (CHAT, {"messages": said("x"), "stream_options": {}}, 400, "stream_options"),
        (CHAT, {"messages": said("x"), "model": "gpt-9"}, 404, "model"),
        (CHAT, {"messages": said("x"), "n": 2, "temperature": 0}, 400, "n"),
        (CHAT, {"messages": said("x"), "guided_regex": "a", "min_tokens": 9}, 400, None),
        (CHAT, {"messages": said("word " * 3000)}, 400, "messages"),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, 9999]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "n": 10**9, "temperature": 1}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, 400, "best_of"),
        ("/v1/tokenize", {}, 400, "prompt"),
        ("/v1/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/v1/embeddings", {}, 404, None),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_bad_request_names_its_field(tiny: Served, path: str, body: Any, status: int, param: str | None) -> None:
    answer = post(tiny, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["message"]
    assert error["type"].endswith("error")
    assert "Traceback" not in answer.text


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = st.sampled_from(
    "messages prompt n max_tokens temperature top_p top_k min_p stop seed logit_bias presence_penalty response_format tools "
    "structured_outputs guided_regex stop_token_ids bad_words min_tokens stream logprobs top_logprobs".split()
)


@given(path=st.sampled_from([CHAT, COMPLETIONS]), changes=st.dictionaries(_FIELDS, _VALUES, min_size=1, max_size=3))
@settings(max_examples=60)
def test_no_request_is_answered_with_an_internal_error(tiny: Served, path: str, changes: dict[str, Any]) -> None:
    base = {"messages": said("x")} if path == CHAT else {"prompt": "x"}
    answer = post(tiny, path, {**base, "max_tokens": 2, **changes})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": ' + b"[" * 5000, b"null"], ids=repr)
def test_a_body_that_is_no_request_is_refused(tiny: Served, content: bytes) -> None:
    answer = httpx.post(tiny.url + CHAT, content=content[:6000], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_other_types_of_body_are_refused(tiny: Served) -> None:
    """A page elsewhere can make a browser send a form or plain text here without asking, but no JSON."""
    assert httpx.post(tiny.url + CHAT, data={"messages": "x"}).status_code == 415
    assert httpx.post(tiny.url + CHAT, content=json.dumps({"messages": said("x")})).status_code == 415


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_pages_within_a_step(tiny: Served, stream: bool) -> None:
    body = {"messages": said("x"), "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    with tiny.slow(0.02):
        with httpx.stream("POST", tiny.url + CHAT, json=body, timeout=60) if stream else begun(tiny, body) as _:
            assert eventually(lambda: tiny.engine.core.statistics.n_running == 1)
        n_steps = tiny.engine.core.statistics.decode_steps
        assert eventually(lambda: tiny.is_idle)
        n_more = tiny.engine.core.statistics.decode_steps - n_steps
    assert n_more <= 5  # the time in which the server notices, at 20 ms a step


@contextlib.contextmanager
def begun(server: Served, body: Any) -> Iterator[socket.socket]:
    """A connection on which a request has been sent; it is closed at the end of the block."""
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(server.server.socket.getsockname()) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    with served(folder, max_queue=1, drain_seconds=0) as server, server.slow(0.05):
        server.engine.core.reservation.resources[0].total = 1  # type: ignore[misc]
        long = {"messages": said("x"), "max_tokens": 400, "ignore_eos": True}
        with begun(server, long):
            assert eventually(lambda: server.engine.core.statistics.n_running == 1)
            with begun(server, long):
                assert eventually(lambda: server.engine.core.statistics.n_waiting == 1)
                answer = post(server, CHAT, long)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["code"] == "unavailable"
                assert "trt_kv_requests_refused_total{" in httpx.get(server.url + "/metrics").text


def test_stopping_lets_requests_end_and_takes_no_more(folder: Path, alone: Engine) -> None:
    expected = alone.chat(said("x"), max_new_tokens=30, ignore_eos=True).text
    with served(folder) as server, server.slow(0.01), httpx.Client(timeout=60) as client:
        body = {"messages": said("x"), "max_tokens": 30, "ignore_eos": True, "stream": True}
        with client.stream("POST", server.url + CHAT, json=body) as answer:
            assert eventually(lambda: server.engine.core.statistics.n_running == 1)
            server.server.stop()
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
        server.thread.join(20)
        with pytest.raises(httpx.ConnectError):
            client.get(server.url + "/health")


def test_stopping_ends_requests_that_take_too_long(folder: Path) -> None:
    with served(folder, drain_seconds=0) as server, server.slow(0.05), httpx.Client(timeout=60) as client:
        body = {"messages": said("x"), "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with client.stream("POST", server.url + CHAT, json=body) as answer, begun(server, body | {"stream": False}) as other:
            assert eventually(lambda: server.engine.core.statistics.n_running == 2)
            server.server.stop()
            *_, last, end = [line for line in answer.iter_lines() if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
            assert end == "data: [DONE]"
            assert other.recv(1000).startswith(b"HTTP/1.1 503 ")
            server.thread.join(10)
            assert not server.thread.is_alive()


def test_cached_tokens_are_told_and_keys_and_salts_share_none(folder: Path) -> None:
    """In whole answers, in streams, and in chats; of two keys, each finds its own prefixes only."""
    prompt = [3 + at % 50 for at in range(100)]

    def cached(key: str, path: str = COMPLETIONS, **body: Any) -> int:
        asked = ({"prompt": prompt} if path == COMPLETIONS else {"messages": said("y" * 200)}) | {"max_tokens": 2} | body
        answer = post(server, path, asked, Authorization=f"Bearer {key}")
        assert answer.status_code == 200
        if "stream" in body:
            _, last, _ = answer.text.strip().rsplit("\n\n", 2)
            usage = json.loads(last.removeprefix("data: "))["usage"]
        else:
            usage = answer.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    with served(folder, api_keys=("one", "two")) as server:
        assert [cached("one"), cached("one"), cached("two"), cached("two")] == [0, 80, 0, 80]
        salted = [cached(key, cache_salt="s") for key in ("one", "one", "two")]
        assert salted == [0, 80, 0]
        assert cached("one", stream=True, stream_options={"include_usage": True}) == 80
        assert [cached("one", CHAT), cached("one", CHAT)] == [0, 160]
        refused = post(server, COMPLETIONS, {"prompt": prompt, "cache_salt": ""}, Authorization="Bearer one")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


def test_a_key_and_limits_guard_the_server(folder: Path) -> None:
    with served(folder, api_keys=("secret",), max_body_bytes=2000, max_prompt_tokens=40, max_new_tokens=3) as server:
        body = {"messages": said("x")}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            refused = post(server, CHAT, body, **headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        key = {"Authorization": "Bearer secret"}
        assert post(server, CHAT, body, **key).json()["usage"]["completion_tokens"] <= 3
        assert post(server, CHAT, {"messages": said("y" * 3000)}, **key).status_code == 413
        refused = post(server, COMPLETIONS, {"prompt": list(range(3, 60))}, **key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        for path in ("/health", "/ready", "/metrics", "/"):
            assert httpx.get(server.url + path).status_code == 200
        assert httpx.get(server.url + "/v1/models").status_code == 401


def test_tokens_can_be_counted_without_generating(tiny: Served, alone: Engine) -> None:
    found = post(tiny, "/v1/tokenize", {"prompt": "Hello there", "return_token_strs": True}).json()
    assert found["tokens"] == alone.encode("Hello there")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    of_chat = post(tiny, "/v1/tokenize", {"messages": said("Hello <|im_end|>")}).json()
    assert of_chat["tokens"] == alone.encode_chat(said("Hello <|im_end|>"))
    back = post(tiny, "/v1/detokenize", {"tokens": alone.encode_part("Hello there")}).json()
    assert back == {"prompt": "Hello there"}


def test_models_and_request_ids(tiny: Served, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).model_extra["policy"] == "snapkv"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")
    assert httpx.get(tiny.url + "/health", headers={"X-Request-Id": "mine-7"}).headers["X-Request-Id"] == "mine-7"
    assert httpx.get(tiny.url + "/health", headers={"X-Request-Id": "two words"}).headers["X-Request-Id"] != "two words"


def test_a_conversation_is_remembered_and_goes_on_from_what_was_kept(folder: Path, alone: Engine) -> None:
    """Whole and streamed, each with the tokens of the engine's own session; keys apart, and turns counted."""
    texts = ["y" * 90, "and x?", "more z"]

    def turn(text: str, key: str = "one", **changes: Any) -> httpx.Response:
        body = {"messages": said(text), "max_tokens": 8, "session": {"id": "s"} | changes.pop("session", {})} | changes
        return post(server, CHAT, body, Authorization=f"Bearer {key}")

    for mode in ("compressed", "exact"):
        session = alone.session(mode=mode)
        expected = [session.chat(text, max_new_tokens=8) for text in texts]
        with served(folder, api_keys=("one", "two")) as server:
            for at, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
                if at == 1:
                    answer = turn(text, stream=True, stream_options={"include_usage": True}, session={"turns": 1})
                    *chunks, last = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
                    said_text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
                else:
                    last = turn(text, session={"mode": mode}).json()
                    said_text = last["choices"][0]["message"]["content"]
                assert said_text == wanted.text
                assert last["usage"]["session"] == {"id": "s", "mode": mode, "turns": at + 1}
                assert last["usage"]["prompt_tokens"] == wanted.n_prompt_tokens
            for refused in (
                turn("x", session={"turns": 1}),
                turn("x", session={"mode": "exact" if mode != "exact" else "compressed"}),
            ):
                assert (refused.status_code, refused.json()["error"]["param"]) == (409, "session")
            assert turn("x", key="two", session={"turns": 0}).json()["usage"]["session"]["turns"] == 1
            assert turn("x", n=2, temperature=1.0).status_code == 400
            assert turn("x", session={"turns": 3}).status_code == 200
            assert eventually(lambda: server.is_idle)


def test_a_session_has_one_turn_at_a_time_and_is_forgotten_in_the_end(folder: Path) -> None:
    def turn(**session: Any) -> httpx.Response:
        return post(server, CHAT, {"messages": said("Hello"), "max_tokens": 6, "session": session})

    with served(folder, max_sessions=2) as server:
        sessions = server.server.app.state.context.sessions
        with (
            server.slow(0.2),
            httpx.stream(
                "POST",
                server.url + CHAT,
                json={"messages": said("x"), "stream": True, "max_tokens": 60, "ignore_eos": True, "session": {"id": "a"}},
                timeout=60,
            ) as stream,
        ):
            lines = stream.iter_lines()  # when nothing refers to it, it closes the stream
            next(lines)
            assert turn(id="a").json()["error"]["code"] == "session_in_turn"
        assert eventually(lambda: not any(held.in_turn for held in sessions._held.values()))
        assert turn(id="a", turns=0).status_code == 200  # the turn that was left never was
        assert [turn(id=name).status_code for name in ("b", "c")] == [200, 200]
        assert turn(id="a", turns=1).json()["error"]["code"] == "session_turns"
        assert len(sessions._held) == 2
        sessions._now = lambda: 1e12
        assert turn(id="c", turns=1).json()["error"]["code"] == "session_turns"
        assert turn(id="", mode="exact").status_code == 400
