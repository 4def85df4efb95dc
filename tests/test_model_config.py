"""config.json is read as transformers reads it, or refused with the field's name."""

import json
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import LLAMA3_SCALING, LLAMA_3_1_8B, read, read_qwen
from trt_kv.errors import CheckpointError
from trt_kv.families import family_from_name, family_names
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig, RopeConfig

NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
"""Fields that trt-kv does not guess for every family."""


def test_llama_3_1_8b_is_read_in_full() -> None:
    assert read() == ModelConfig(
        architecture="llama",
        n_layers=32,
        hidden_size=4096,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        max_positions=131072,
        rope=RopeConfig(
            theta=500000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_llama_3_1_8b_has_the_published_number_of_weights() -> None:
    sizes = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in read().tensor_shapes().items()}
    assert sum(sizes.values()) == 8_030_261_248


def test_old_llama_configs_may_leave_out_what_the_first_llama_did_not_have() -> None:
    config = read(num_key_value_heads=..., rope_theta=..., rope_scaling=...)
    assert (config.n_kv_heads, config.rope) == (32, RopeConfig(theta=10000.0))
    oldest = read(max_position_embeddings=..., architectures=["LLaMAForCausalLM"])
    assert oldest.max_positions == transformers.LlamaConfig().max_position_embeddings
    assert oldest.architecture == "llama"


def test_a_model_saved_without_its_head_is_read_as_its_architecture() -> None:
    assert read(architectures=["LlamaModel"]) == read()


def test_numbers_may_be_integers_written_as_floats() -> None:
    assert read(hidden_size=4096.0, eos_token_id=[128001.0, 2.0], bos_token_id=1.0) == read(
        hidden_size=4096, eos_token_id=[128001, 2], bos_token_id=1
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_null_kv_heads_are_as_many_as_query_heads(name: str) -> None:
    theirs = transformers.AutoConfig.for_model(name, num_key_value_heads=None)
    data = {**json.loads(theirs.to_json_string(use_diff=False)), "architectures": None, "num_key_value_heads": None}
    assert model_config_from_hf(data, source="config.json").n_kv_heads == theirs.num_attention_heads


@pytest.mark.parametrize("name", family_names())
@pytest.mark.parametrize("whole", [True, False], ids=["every-field", "fields-that-differ"])
def test_defaults_of_every_family_are_those_of_transformers(name: str, whole: bool) -> None:
    theirs = transformers.AutoConfig.for_model(name)
    data = json.loads(theirs.to_json_string(use_diff=not whole))
    needed = {} if whole else {size: getattr(theirs, size) for size in NEEDED if hasattr(theirs, size)}
    if not whole and not family_from_name(name).derives_head_dim:
        needed["head_dim"] = theirs.head_dim
    ours = model_config_from_hf({**needed, **data, "architectures": None}, source="config.json")
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.n_kv_heads == theirs.num_key_value_heads
    ropes = theirs.rope_parameters
    assert ours.rope.theta == ropes.get("full_attention", ropes)["rope_theta"]
    if ours.local_rope is not None:
        assert ours.local_rope.theta == ropes["sliding_attention"]["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    types = getattr(theirs, "layer_types", None) or []
    sliding = [layer for layer in range(ours.n_layers) if "sliding_attention" in types[layer : layer + 1]]
    assert list(ours.windowed_layers) == (list(range(ours.n_layers)) if name == "mistral" else sliding)
    assert set(ours.windows) <= {0, getattr(theirs, "sliding_window", 0)}


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
    ],
)
def test_a_needed_field_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json has no field '{field}'"):
        read(**{field: ...})


@pytest.mark.parametrize("field", ["num_key_value_heads", "rope_theta", "max_position_embeddings"])
def test_only_old_llamas_may_leave_out_fields(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"no field '{field}'"):
        read_qwen(**{field: ...})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "4096"),
        ("hidden_size", 4096.5),
        ("hidden_size", True),
        ("hidden_size", float("inf")),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", ["</s>"]),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"field '{field}' in config.json has a bad value"):
        read(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "n_layers must be at least 1"),
        ({"num_key_value_heads": 5}, "divide evenly"),
        ({"head_dim": 7}, "an even number of channels"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
        ({"eos_token_id": 128256}, "outside the vocabulary"),
        ({"rope_theta": -1.0}, "theta must be positive"),
        ({"rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3", "low_freq_factor": 4.0}}, "invalid frequency factors"),
        ({"rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3", "original_max_position_embeddings": 0}}, "original_max"),
        ({"hidden_act": "gelu"}, "unsupported activation"),
        ({"rope_scaling": [1.0]}, "not one flat object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_scaling": None}, "not one flat object"),
        ({"partial_rotary_factor": 0.5}, "over 0.5 of each head"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": ...},
        {"model_type": ["llama"]},
    ],
)
def test_an_unknown_architecture_lists_the_known_ones(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"'gemma2'.*'gemma3_text'.*'llama'.*'mistral'.*'olmo2'.*'qwen2'.*'smollm3'"):
        read(**changes)


ROPE_FIELDS: tuple[str, ...] = (
    "rope_type",
    "factor",
    "rope_theta",
    "short_factor",
    "long_factor",
    "full_attention",
    "mscale",
    "truncate",
)
ROPE_FIELDS += ("beta_fast", "attention_factor", "partial_rotary_factor", "original_max_position_embeddings")
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["llama3", "yarn", "longrope", "proportional", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_FIELDS), inner),
    max_leaves=5,
)


FAMILY_FIELDS: tuple[str, ...] = (
    "partial_rotary_factor",
    "sliding_window",
    "hidden_activation",
    "query_pre_attn_scalar",
    "no_rope_layers",
)
FAMILY_FIELDS += ("attn_logit_softcapping", "embedding_multiplier", "original_max_position_embeddings", "text_config")


@pytest.mark.parametrize("field", [*LLAMA_3_1_8B, "rope_parameters", "head_dim", "layer_types", *FAMILY_FIELDS])
@settings(max_examples=50)
@given(value=JSON_VALUES, family=st.sampled_from([None, *family_names(), "gemma3"]))
def test_any_json_in_any_field_is_read_or_refused_but_never_a_crash(field: str, value: object, family: str | None) -> None:
    other = {} if family is None else {"model_type": family, "architectures": None, "use_sliding_window": True}
    try:
        read(**{**other, field: value})
    except CheckpointError:
        return


@given(
    kv_heads=st.integers(1, 9),
    group=st.integers(1, 7),
    half_head=st.integers(1, 80),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    eos=st.lists(st.integers(0, 16), max_size=3, unique=True),
)
def test_json_round_trip(kv_heads: int, group: int, half_head: int, biases: tuple[bool, bool, bool], eos: list[int]) -> None:
    config = ModelConfig(
        architecture="llama",
        n_layers=3,
        hidden_size=48,
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        head_dim=2 * half_head,
        intermediate_size=80,
        vocab_size=17,
        rms_norm_eps=1e-6,
        max_positions=128,
        rope=RopeConfig(theta=1e4, kind="linear", factor=2.0),
        qkv_bias=biases[0],
        output_bias=biases[1],
        mlp_bias=biases[2],
        eos_token_ids=tuple(eos),
    )
    assert config.group_size == group
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"rope": None}, r"model config\.rope is not a JSON object"),
        ({"more": 1}, "unknown fields"),
        ({"rope": {"kind": "default"}}, "lacks fields"),
        ({"n_layers": 3.0}, r"n_layers has the wrong type"),
        ({"n_layers": 10**9}, "n_layers is too large"),
        ({"tie_embeddings": 0}, "tie_embeddings has the wrong type"),
    ],
    ids=str,
)
def test_json_with_missing_unknown_or_impossible_fields_is_refused(damage: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ModelConfig.from_json({**read().to_json(), **damage})
