"""Engines as models of a real tritonserver: clients get the tokens that they would get alone, or an error, and never hang."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines import load_for_test, random_ids
from tests.triton_rig.clients import generate, generate_stream, grpc_stream, joined, posted
from tests.triton_rig.server import Server, serving
from trt_kv.export.triton_repository import FOLDER
from trt_kv.runtime.engine import Engine

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
        asked = {"text_input": PROMPT, "max_tokens": 12, "temperature": 0.7, "seed": 5, "return_output_ids": True}
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
        assert of_token[str(expected.token_id)]["logprob"] == expected.logprob
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
