"""Outputs with a structure conform to it, and what cannot be used is refused by name. The model's weights are random."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_engines import END, chat_engine
from tests.engines import Run, assert_nothing_leaked
from trt_kv.errors import NoTokenLeftError, UsageError
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_engine(tmp_path_factory)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, cache_tokens=4000, chunk=16, n_threads=1) as found:
        yield found


def test_samples_are_json_of_the_schema(engine: Engine) -> None:
    """The same for a request alone and in company that has another structure, or none."""
    wild: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 200, "seed": 4}
    whole = engine.generate("x", n=4, json_schema=SCHEMA, **wild)
    assert len({sample.text for sample in whole.samples}) > 1
    for sample in whole.samples:
        assert sample.finish_reason == "stop"
        answer = json.loads(sample.text)
        assert len(answer["name"]) <= 8
        assert set(answer["tags"]) <= {"a", "ü"}
    params = [
        SamplingParams(**wild, json_schema=json.dumps(SCHEMA)),
        SamplingParams(**wild, regex="[xyz]{5,9}"),
        SamplingParams(**wild),
    ]
    together = engine.generate_batch(["x", "x", "x"], params)
    assert together[0].text == whole.text
    assert 5 <= len(together[1].text) <= 9
    assert set(together[1].text) <= set("xyz")
    assert together[2] == engine.generate("x", params[2])
    assert_nothing_leaked(engine)


def test_an_end_is_possible_only_where_the_output_is_complete(engine: Engine) -> None:
    """The template's end of a turn too; and with a bias the end comes as soon as it may."""
    answer = engine.chat([{"role": "user", "content": "x"}], regex="[ab]{3,}", logit_bias={END: 1e6}, max_new_tokens=40)
    assert answer.finish_reason == "stop"
    assert 3 <= len(answer.text) <= 5
    endless = engine.generate("x", regex="[ab]{3,}", ignore_eos=True, max_new_tokens=12)
    assert endless.finish_reason == "length"
    assert set(endless.text) <= {"a", "b"}


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"json_schema": {"type": "thing"}}, "JSON schema cannot be used"),
        ({"json_schema": "{"}, "JSON schema cannot be used"),
        ({"json_schema": {"$ref": "http://127.0.0.1/schema"}}, "JSON schema cannot be used"),
        ({"json_schema": 3}, "bad json_schema"),
        ({"regex": "(("}, "regular expression cannot be used"),
        ({"regex": ""}, "bad regex"),
        ({"grammar": "begin: 1"}, "grammar cannot be used"),
        ({"grammar": 'start: "a"', "regex": "a"}, "one structure only"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_name(engine: Engine, structure: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        engine.generate("x", **structure)
    assert caught.value.parameter in structure


def test_parameters_that_leave_no_token_end_that_request_only(engine: Engine) -> None:
    params = [SamplingParams(regex="ab", min_tokens=9), SamplingParams(max_new_tokens=3)]
    ended, other = engine.generate_batch(["x", "x"], params)
    assert isinstance(ended.error, NoTokenLeftError)
    assert other.finish_reason == "length"


def test_a_tokenizer_of_words_is_refused(small_engine: Engine) -> None:
    with pytest.raises(UsageError, match="cannot be given a structure"):
        small_engine.generate([1, 5], regex="a")


def test_the_command_reads_a_schema(folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    code, out, err = run("generate", folder, "x", "--json-schema", file, "--temperature", "2", "--max-new-tokens", "200")
    assert code == 0, err
    assert set(json.loads(out)) == {"name", "tags"}
