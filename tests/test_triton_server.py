"""Engines as models of a real tritonserver: clients get the tokens that they would get alone, or an error, and never hang."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import load_for_test, random_ids
from tests.http_server import eventually
from tests.triton_rig.clients import events_of, generate, generate_stream, grpc_stream, joined, posted
from tests.triton_rig.server import Server, serving
from trt_kv.export.triton_repository import FOLDER
from trt_kv.runtime.engine import Engine
from trt_kv.serving.triton.sampling_fields import FIELDS
from trt_kv.serving.triton.tensors import ANY, INPUTS, Tensor

pytestmark = pytest.mark.early

PROMPT = "the old storm"
NARROW = "narrow"
"""A model that runs one request at a time and lets one wait."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The server; ``engines``: in this process, by the model that serves the same engine; ``repository``: of ``NARROW``."""

    server: Server
    engines: dict[str, Engine]
    repository: Path

    @property
    def model(self) -> str:
        return next(iter(self.engines))

    def load(self, model: str, **body: Any) -> tuple[int, str]:
        """Load or reload a model: the status and what Triton says."""
        with posted(self.server, f"/v2/repository/models/{model}/load", body) as response:
            return response.status, response.read().decode()


@pytest.fixture(scope="module")
def site(
    small_folder: Path, small_freekv_folder: Path, triton_rig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Two engines served where they stand, and a copy of one's model elsewhere that names its engine by an absolute path."""
    standing = [folder / FOLDER for folder in (small_folder, small_freekv_folder)]
    names = [next(repository.iterdir()).name for repository in standing]
    engines = {name: load_for_test(repository.parent) for name, repository in zip(names, standing, strict=True)}
    elsewhere = tmp_path_factory.mktemp("models")
    shutil.copytree(standing[0] / names[0], elsewhere / NARROW)
    write_options(elsewhere, engine=str(small_folder), max_sequences=1, max_queue=1)
    scratch = tmp_path_factory.mktemp("server")
    for engine in engines.values():
        engine.generate(PROMPT, max_new_tokens=2, temperature=0.5)  # compiles kernels, so that the server finds them compiled
    with serving([*standing, elsewhere], triton_rig, scratch, "--model-control-mode=explicit", "--load-model=*") as server:
        yield Site(server=server, engines=engines, repository=elsewhere)
    for engine in engines.values():
        engine.close()


def write_options(repository: Path, **options: Any) -> None:
    (repository / NARROW / "1" / "model.json").write_text(json.dumps(options))


def test_the_server_and_every_model_are_ready_and_described(site: Site) -> None:
    assert site.server.status("/v2/health/live") == site.server.status("/v2/health/ready") == 200
    for model in (*site.engines, NARROW):
        assert site.server.status(f"/v2/models/{model}/ready") == 200
        config = json.loads(site.server.get(f"/v2/models/{model}/config"))
        assert config["max_batch_size"] == 0
        assert config["model_transaction_policy"] == {"decoupled": True}
        text = next(one for one in config["input"] if one["name"] == "text_input")
        assert (text["dims"], text["optional"]) == ([1, 1], True)


def test_unary_and_streamed_answers_over_http_and_grpc_are_those_of_the_engine(site: Site) -> None:
    for model, engine in site.engines.items():
        alone = engine.generate(PROMPT, max_new_tokens=12, temperature=0.7, seed=5, top_logprobs=2)
        asked: dict[str, Any] = {
            "text_input": PROMPT,
            "max_tokens": 12,
            "temperature": 0.7,
            "seed": 5,
            "return_output_ids": True,
        }
        counted = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_cumulative_logprob": True}
        status, answer = generate(site.server, model, **asked, **counted)
        assert status == 200
        assert (answer["text_output"], answer["output_ids"]) == (alone.text, list(alone.token_ids))
        assert answer["finish_reason"] == alone.finish_reason
        assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (alone.n_prompt_tokens, 12)
        total = sum(one.logprob for one in alone.logprobs)
        assert answer["cumulative_logprob"] == pytest.approx(total, rel=1e-6)

        events = generate_stream(site.server, model, **asked, **counted)
        assert len(events) > 3
        assert "".join(joined(events, "text_output")) == alone.text
        assert joined(events, "output_ids") == list(alone.token_ids)
        assert sum(joined(events, "num_output_tokens")) == 12
        assert joined(events, "finish_reason") == [alone.finish_reason]

        parts = grpc_stream(site.server, model, **asked, stream=True)
        assert b"".join(joined(parts, "text_output")).decode() == alone.text
        assert joined(parts, "output_ids") == list(alone.token_ids)
        (whole,) = grpc_stream(site.server, model, **asked)
        assert whole["text_output"] == [alone.text.encode()]


def test_the_format_of_vllm_is_understood(site: Site) -> None:
    engine = site.engines[site.model]
    wanted = {"max_tokens": "8", "temperature": 0.9, "seed": 3, "min_p": "0.05", "logprobs": 2, "stop": None}
    alone = engine.generate(PROMPT, max_new_tokens=8, temperature=0.9, seed=3, min_p=0.05, top_logprobs=2)
    asked = {"text_input": PROMPT, "sampling_parameters": json.dumps(wanted)}
    _, answer = generate(site.server, site.model, **asked, return_logprobs=True)
    assert answer["text_output"] == PROMPT + alone.text  # as vLLM's backend does, unless it is told not to
    found = json.loads(answer["logprobs"])
    for of_token, expected in zip(found, alone.logprobs, strict=True):
        # The server's numba may be another one, whose sums of exponentials are added in vectors of another width.
        assert of_token[str(expected.token_id)]["logprob"] == pytest.approx(expected.logprob, rel=1e-9)
        ranks = {token: one["rank"] for token, one in of_token.items() if one["rank"] is not None}
        assert ranks == {str(token): rank for rank, (token, _) in enumerate(expected.top, 1)}

    events = generate_stream(site.server, site.model, **asked, return_finish_reason=True, exclude_input_in_output=True)
    assert "".join(joined(events, "text_output")) == alone.text
    reasons = joined(events, "finish_reason")
    assert set(reasons[:-1]) == {"null"}
    assert reasons[-1] == alone.finish_reason


def test_tokens_in_and_tokens_out_and_stop_words(site: Site) -> None:
    engine = site.engines[site.model]
    prompt = random_ids(engine, 40, seed=1)
    alone = engine.generate(prompt, max_new_tokens=20)
    events = generate_stream(site.server, site.model, input_ids=prompt, max_tokens=20)
    assert joined(events, "output_ids") == list(alone.token_ids)
    words = alone.text.split()
    stopped = engine.generate(prompt, max_new_tokens=20, stop=words[4])
    _, answer = generate(site.server, site.model, input_ids=prompt, max_tokens=20, stop_words=[words[4], ""])
    assert (answer["text_output"], answer["finish_reason"]) == (stopped.text, "stop")
    ended = engine.generate(prompt, max_new_tokens=20, stop_token_ids=[alone.token_ids[6]])
    _, answer = generate(site.server, site.model, input_ids=prompt, max_tokens=20, end_id=alone.token_ids[6])
    assert (answer["output_ids"], answer["finish_reason"]) == (list(ended.token_ids), "stop")


def test_32_clients_of_two_engines_get_what_each_would_get_alone(site: Site) -> None:
    def ask(at: int) -> tuple[str, list[int]]:
        model = list(site.engines)[at % 2]
        prompt = random_ids(site.engines[model], 5 + 7 * at % 90, seed=at)
        asked: dict[str, Any] = {"input_ids": prompt, "max_tokens": 4 + at, "temperature": 0.8, "seed": at}
        if at % 3 == 0:
            parts = grpc_stream(site.server, model, **asked, stream=True)
            return b"".join(joined(parts, "text_output")).decode(), joined(parts, "output_ids")
        if at % 3 == 1:
            events = generate_stream(site.server, model, **asked)
            return "".join(joined(events, "text_output")), joined(events, "output_ids")
        _, answer = generate(site.server, model, **asked)
        return answer["text_output"], answer["output_ids"]

    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(ask, range(32)))
    for at, answer in enumerate(answers):
        engine = list(site.engines.values())[at % 2]
        prompt = random_ids(engine, 5 + 7 * at % 90, seed=at)
        alone = engine.generate(prompt, max_new_tokens=4 + at, temperature=0.8, seed=at)
        assert answer == (alone.text, list(alone.token_ids)), at


def test_a_client_that_goes_away_ends_its_request(site: Site) -> None:
    """The only place is taken by a request that would take seconds; the next one gets it at once."""
    endless = {"text_input": PROMPT, "stream": True, "max_tokens": 100_000, "end_id": -1}
    before = metric(site, "vllm:request_success_total", NARROW, finished_reason="cancelled")
    with posted(site.server, f"/v2/models/{NARROW}/generate_stream", endless) as response:
        assert next(events_of(response))["text_output"]
    assert eventually(lambda: metric(site, "vllm:request_success_total", NARROW, finished_reason="cancelled") == before + 1)
    assert metric(site, "trt_kv_pages_used", NARROW, tier="pool") == 0
    assert metric(site, "vllm:num_requests_running", NARROW) == 0


def test_a_full_queue_refuses_and_answers_what_it_has_taken(site: Site) -> None:
    endless = {"text_input": PROMPT, "max_tokens": 100_000, "end_id": -1}
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: generate(site.server, NARROW, **endless), range(8)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 400}, answers  # this release makes 400 of every code of a model's error
    assert all("the queue is full" in answer["error"] for status, answer in answers if status == 400)
    assert '"code": "UNAVAILABLE"' in site.server.log_text
    assert len({answer["text_output"] for status, answer in answers if status == 200}) == 1


def test_what_is_wrong_is_named(site: Site) -> None:
    for body, field in (
        ({"max_tokens": 3}, "text_input"),
        ({"text_input": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"text_input": PROMPT, "temperature": -1.0}, "temperature"),
        ({"text_input": PROMPT, "top_p": 2.0}, "top_p"),
        ({"text_input": PROMPT, "beam_width": 4}, "beam_width"),
        ({"text_input": PROMPT, "sampling_parameters": "{"}, "sampling_parameters"),
        ({"text_input": PROMPT, "sampling_parameters": '{"best_of": 3}'}, "best_of"),
        ({"text_input": PROMPT, "sampling_parameters": '{"seed": "x"}'}, "seed"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"input_ids": [10**6], "max_tokens": 2}, "vocabulary"),
        ({"input_ids": [1] * 10**4, "max_tokens": 2}, "positions"),
    ):
        status, answer = generate(site.server, site.model, **body)
        assert status == 400, (body, answer)
        assert field in answer["error"]


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists, max_leaves=4)
_VALUES = st.integers(-3, 40) | st.floats(-1, 3) | st.sampled_from([True, "4", "", [], ["x"], [3], None, {"5": 1.0}, 2**70])
_NUMBERS = {"INT32": st.integers(-3, 40), "UINT64": st.integers(0, 2**63 - 1), "FP32": st.floats(-1, 3, width=32)}
_TYPED = {**_NUMBERS, "STRING": st.text(max_size=6), "BOOL": st.booleans()}


def _of(tensor: Tensor) -> st.SearchStrategy[Any]:
    """Values of its type; a list may have any length, also where one value is expected."""
    one = _TYPED[tensor.dtype]
    return st.lists(one, min_size=1, max_size=3) if tensor.size == ANY else one | st.lists(one, min_size=1, max_size=2)


@settings(max_examples=60)
@given(tensors=st.fixed_dictionaries({}, optional={one.name: _of(one) for one in INPUTS if one.name != "stream"}))
def test_no_tensors_get_anything_but_an_answer_or_a_refusal(site: Site, tensors: dict[str, Any]) -> None:
    status, answer = generate(site.server, site.model, **{"max_tokens": 2} | tensors)
    assert status == (200 if "text_output" in answer else 400), answer


@settings(max_examples=60)
@given(fields=st.dictionaries(st.sampled_from([*FIELDS, "other"]), _VALUES | _JSON, max_size=4))
def test_no_parameters_get_anything_but_an_answer_or_a_refusal(site: Site, fields: dict[str, Any]) -> None:
    asked = {"text_input": PROMPT, "max_tokens": 2, "sampling_parameters": json.dumps(fields)}
    status, answer = generate(site.server, site.model, **asked)
    assert status == (200 if "text_output" in answer else 400), answer


def test_a_model_is_reloaded_with_other_options_or_says_why_not(site: Site, small_folder: Path, tmp_path: Path) -> None:
    alone = site.engines[site.model].generate(PROMPT, max_new_tokens=5)
    config = {"backend": "python", "parameters": {"batch_dimension": {"string_value": "false"}}}
    status, said = site.load(NARROW, parameters={"config": json.dumps(config)})
    assert status == 200, said
    asked = {"text_input": PROMPT, "sampling_parameters": json.dumps({"max_tokens": 5}), "stream": True}
    parts = grpc_stream(site.server, NARROW, leading=(), **asked)  # as clients of vLLM's backend send it
    assert b"".join(joined(parts, "text_output")).decode() == alone.text

    broken = tmp_path / "broken"
    shutil.copytree(small_folder, broken)
    with (broken / "tokenizer.json").open("a") as file:
        file.write(" ")
    write_options(site.repository, engine=str(broken))
    status, said = site.load(NARROW)
    assert (status, "is not the file that was built" in said) == (400, True), said
    assert generate(site.server, NARROW, text_input=PROMPT, max_tokens=2)[0] == 200  # the one that was loaded before

    write_options(site.repository, engine=str(small_folder), max_sequences=1)
    assert site.load(NARROW)[0] == 200
    assert grpc_stream(site.server, NARROW, text_input=PROMPT, max_tokens=5)[0]["text_output"] == [alone.text.encode()]


def test_a_killed_model_ends_the_server_so_that_no_client_waits_for_ever(site: Site) -> None:
    """The last test of this server."""
    assert eventually(lambda: len(site.server.stubs(NARROW)) == 1)  # those that were unloaded have ended
    (stub,) = site.server.stubs(NARROW)
    endless = {"text_input": PROMPT, "stream": True, "max_tokens": 100_000, "end_id": -1}
    with posted(site.server, f"/v2/models/{NARROW}/generate_stream", endless) as response:
        events = events_of(response)
        next(events)
        os.kill(stub, signal.SIGKILL)
        assert not joined(list(events), "finish_reason")  # the connection was closed
    assert site.server.process.wait(10) is not None


def metric(site: Site, name: str, model: str, **labels: str) -> float:
    """The value of a metric; 0 for one that is not there yet."""
    found = site.server.metrics()
    wanted = {"model_name": model, **labels}
    return next((value for (one, given), value in found.items() if one == name and wanted.items() <= dict(given).items()), 0.0)
