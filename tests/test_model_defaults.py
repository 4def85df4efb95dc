"""Sampling parameters that a model's generation_config.json recommends: used unless a request says otherwise, and told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.engines import Run, build_for_test
from tests.test_fuzzed_engine import signed_again
from trt_kv import AsyncEngine, Engine, SamplingParams
from trt_kv.errors import EngineError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_from_name
from trt_kv.runtime.sampling.model_defaults import NO_DEFAULTS, ModelDefaults, model_defaults_from

QWEN: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "bos_token_id": 1}
PROMPT = "the old storm"


def defaults_of(**fields: Any) -> ModelDefaults:
    return model_defaults_from(fields, source="generation_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of a model that samples by default."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("sampling"))
    transformers.GenerationConfig(**QWEN, repetition_penalty=1.1, no_repeat_ngram_size=3).save_pretrained(checkpoint)
    request = EngineRequest(checkpoint=open_checkpoint(checkpoint), policy=policy_from_name("full"), page_size=5)
    return build_for_test(request, tmp_path_factory.mktemp("engines") / "sampling")


@pytest.fixture
def engine(folder: Path) -> Any:
    with Engine.load(folder, cache_tokens=400, n_threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_new_tokens": 512, "max_length": 4096, "transformers_version": "5"}, {}),
        (QWEN, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.0}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": None, "top_p": None, "top_k": None}, {}),
        ({"top_k": -1}, {}),
        ({"min_p": 0.1, "typical_p": 0.9}, {"min_p": 0.1, "typical_p": 0.9}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0}, {}),
        ({"bad_words_ids": [[3, 4]], "suppress_tokens": [7]}, {"bad_words": [[3, 4], [7]]}),
        ({"stop_strings": ["User:"]}, {"stop": ["User:"]}),
    ],
    ids=str,
)
def test_fields_of_the_file(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = defaults_of(**fields)
    assert found.params == SamplingParams(**expected)
    assert found.given == expected


@pytest.mark.parametrize(
    "fields", [QWEN, {"do_sample": True}, {"temperature": 0.6}, {"do_sample": False, "top_p": 0.9}], ids=str
)
def test_the_model_samples_where_transformers_does(fields: dict[str, Any]) -> None:
    mode = transformers.GenerationConfig.from_dict(fields).get_generation_mode()
    assert (defaults_of(**fields).params.temperature > 0.0) == (mode.name == "SAMPLE")


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "temperature": "hot"},
        {"top_p": 0.0},
        {"top_k": 2.5},
        {"top_k": -2},
        {"repetition_penalty": 0},
        {"bad_words_ids": 7},
        {"bad_words_ids": [[]]},
        {"suppress_tokens": ["the"]},
        {"stop_strings": [""]},
    ],
    ids=str,
)
def test_values_that_no_request_could_have_are_refused_with_the_file(fields: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"generation_config\.json"):
        defaults_of(**fields)


def test_what_is_not_supported_is_told_unless_it_does_nothing() -> None:
    found = defaults_of(num_beams=4, no_repeat_ngram_size=0, penalty_alpha=0.6, guidance_scale=1.0, sequence_bias=None)
    assert found.ignored == {"num_beams": 4, "penalty_alpha": 0.6}
    assert found.params == SamplingParams()


def test_options_by_name_replace_single_ones_and_params_replace_all(engine: Engine) -> None:
    own: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    assert engine.default_sampling == SamplingParams(**own)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, own),
        ({"temperature": 1.5}, own | {"temperature": 1.5}),
        ({"temperature": 0.0}, {"repetition_penalty": 1.1}),
    ]
    for given, complete in cases:
        options: dict[str, Any] = {"seed": 5, "max_new_tokens": 12, **given}
        expected = engine.generate(PROMPT, SamplingParams(seed=5, max_new_tokens=12, **complete))
        assert engine.generate(PROMPT, **options) == expected
        assert "".join(engine.stream(PROMPT, **options)) == expected.text
        assert engine.generate_batch([PROMPT], **options) == [expected]
    assert engine.generate(PROMPT, SamplingParams()) != engine.generate(PROMPT, temperature=0.0)


def test_with_asyncio(folder: Path) -> None:
    async def ask() -> None:
        async with AsyncEngine.load(folder, cache_tokens=400, n_threads=1) as shared:
            own = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=5, max_new_tokens=9)
            assert await shared.generate(PROMPT, seed=5, max_new_tokens=9) == await shared.generate(PROMPT, own)

    asyncio.run(ask())


def test_they_can_be_left_out(folder: Path, engine: Engine) -> None:
    with Engine.load(folder, cache_tokens=400, model_defaults=False, n_threads=1) as plain:
        assert plain.default_sampling == SamplingParams()
        assert plain.generate(PROMPT, max_new_tokens=9) == engine.generate(PROMPT, SamplingParams(max_new_tokens=9))
    with pytest.raises(UsageError, match="bad model_defaults"):
        Engine.load(folder, model_defaults="auto")  # type: ignore[arg-type]


def test_the_command_line_tells_them(run: Run, folder: Path, engine: Engine) -> None:
    words = ("generate", folder, PROMPT, "--max-new-tokens", "9")
    ignored = "[not supported, and ignored: no_repeat_ngram_size 3 of generation_config.json]"
    all_told = "temperature 0.6, top_p 0.95, top_k 20, repetition_penalty 1.1 from generation_config.json"
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {}, f"[{all_told}; --temperature 0 for greedy]"),
        (
            ["--temperature", "0"],
            {"temperature": 0.0},
            "[repetition_penalty 1.1 from generation_config.json; --no-model-defaults to ignore it]",
        ),
        (
            ["--temperature", "0.9", "--repetition-penalty", "1"],
            {"temperature": 0.9, "repetition_penalty": 1.0},
            "[top_p 0.95, top_k 20 from generation_config.json; --no-model-defaults to ignore it]",
        ),
    ]
    for more, options, told in cases:
        code, out, err = run(*words, *more)
        assert code == 0
        assert out == engine.generate(PROMPT, max_new_tokens=9, seed=0, **options).text + "\n"
        assert told in err
        assert ignored in err
    _, out, err = run(*words, "--no-model-defaults")
    assert out == engine.generate(PROMPT, SamplingParams(max_new_tokens=9)).text + "\n"
    assert "generation_config" not in err


def test_a_model_without_recommendations_stays_greedy(small_engine: Engine) -> None:
    """The bundled one, too."""
    assert small_engine.model_defaults.params == NO_DEFAULTS.params
    bundled = Path("trt_kv/models/llama3-tiny/generation_config.json")
    assert model_defaults_from(json.loads(bundled.read_text()), source=str(bundled)).given == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (json.dumps({"suppress_tokens": [VOCAB_SIZE]}), "outside the vocabulary"),
        ("[]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(content: str, match: str, broken: Path) -> None:
    path = broken / "generation_config.json"
    path.write_text(content)
    signed_again(broken, path.name)
    with pytest.raises(EngineError, match=match) as refused:
        Engine.load(broken)
    assert str(path) in str(refused.value)
    Engine.load(broken, cache_tokens=400, model_defaults=False, n_threads=1).close()
