"""The table of families: published models, what each setting does, and where weights are stored."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config, read_config, write_checkpoint, write_config
from tests.dense_reference import ContiguousCache
from tests.models_page import models_markdown
from trt_kv.errors import CheckpointError, UnknownNameError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.families import family_from_name, family_names
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig
from trt_kv.rope_config import RopeConfig
from trt_kv.weight_sources import stored_shapes, weight_sources

pytestmark = pytest.mark.usefixtures("one_thread")


def sizes(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    """The sizes of a published model, as in its config.json."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        **others,
    }


PUBLISHED = {
    "Gemma 2 2B": ("gemma2", sizes(26, 2304, 8, 4, 9216, 256000, head_dim=256), 2_614_341_888),
    "Gemma 3 270M": ("gemma3_text", sizes(18, 640, 4, 1, 2048, 262144, head_dim=256), 268_098_176),
    "Gemma 3 1B": ("gemma3_text", sizes(26, 1152, 4, 1, 6912, 262144, head_dim=256), 999_885_952),
    "Phi-3 mini": ("phi3", sizes(32, 3072, 32, 32, 8192, 32064), 3_821_079_552),
    "Phi-4 mini": ("phi3", sizes(32, 3072, 24, 8, 8192, 200064, tie_word_embeddings=True), 3_836_021_760),
    "SmolLM3 3B": ("smollm3", sizes(36, 2048, 16, 4, 11008, 128256), 3_075_098_624),
    "OLMo 2 1B": ("olmo2", sizes(16, 2048, 16, 16, 8192, 100352), 1_484_916_736),
    "Mistral 7B": ("mistral", sizes(32, 4096, 32, 8, 14336, 32000), 7_241_732_096),
    "Qwen2.5 7B": ("qwen2", sizes(28, 3584, 28, 4, 18944, 152064), 7_615_616_512),
    "Qwen3 8B": ("qwen3", sizes(36, 4096, 32, 8, 12288, 151936, head_dim=128), 8_190_735_360),
}
"""Family, sizes, and the number of parameters that its model card gives."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_weights(name: str) -> None:
    family, fields, n_parameters = PUBLISHED[name]
    others = {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 10000.0, "model_type": family}
    config = model_config_from_hf({**others, **fields}, source="config.json")
    for shapes in (config.tensor_shapes(), stored_shapes(config)):
        assert sum(map(math.prod, shapes.values())) == n_parameters


def test_a_file_of_the_folder_is_a_family_of_its_name() -> None:
    for name in family_names():
        family = family_from_name(name)
        assert family.model_type == name
        assert transformers.AutoConfig.for_model(name).model_type == name
        assert hasattr(transformers, family.class_name)
    with pytest.raises(UnknownNameError, match="gemma2, gemma3_text"):
        family_from_name("gpt2")


def test_the_page_of_models_is_that_of_the_table() -> None:
    assert (Path(__file__).parent.parent / "docs" / "models.md").read_text() == models_markdown(), (
        "run python -m tests.models_page > docs/models.md"
    )


WITHOUT: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"windows": ()}),
    ("gemma2", {"attention_soft_cap": 0.0}),
    ("gemma2", {"logit_soft_cap": 0.0}),
    ("gemma2", {"attention_scale": 0.0}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"activation": "silu"}),
    ("gemma3", {"windows": ()}),
    ("gemma3", {"local_rope": None, "local_rope_layers": ()}),
    ("gemma3", {"rope": RopeConfig(theta=1e6)}),
    ("smollm3", {"unrotated_layers": ()}),
    ("smollm3-windows", {"windows": ()}),
    ("granite", {"embedding_scale": 1.0}),
    ("granite", {"residual_scale": 1.0}),
    ("granite", {"attention_scale": 0.0}),
    ("granite", {"logit_scale": 1.0}),
    ("mistral-window", {"windows": ()}),
    ("phi3", {"windows": ()}),
    ("qwen2-yarn", {"rope": RopeConfig(theta=1e4)}),
]


@pytest.mark.parametrize(("sample", "without"), WITHOUT, ids=lambda value: value if isinstance(value, str) else "+".join(value))
@torch.no_grad()
def test_every_setting_of_a_sample_changes_its_logits(sample: str, without: dict[str, Any], tmp_path: Path) -> None:
    """So that the comparisons with transformers would notice if it were lost."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, sample))
    decoder = decoder_from_checkpoint(checkpoint)
    other = type(decoder)(dataclasses.replace(checkpoint.config, **without))
    other.load_state_dict(decoder.state_dict())
    ids, positions = torch.arange(3, 40), torch.arange(37)
    one, two = (module(ids, positions, positions, ContiguousCache(module.config)) for module in (decoder, other))
    assert (one - two).abs().max() > 0.01


def test_fused_projections_are_read_as_rows_of_one_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "phi3"))
    stored = load_file(tmp_path / "model.safetensors")
    q, k, v = (checkpoint.tensor(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qkv")
    assert q.shape != k.shape
    assert torch.equal(torch.cat((q, k, v)), stored["model.layers.1.self_attn.qkv_proj.weight"])
    gate, up = (checkpoint.tensor(f"model.layers.2.mlp.{name}_proj.weight") for name in ("gate", "up"))
    assert torch.equal(torch.cat((gate, up)), stored["model.layers.2.mlp.gate_up_proj.weight"])
    assert checkpoint.tensor_names == tuple(checkpoint.config.tensor_shapes())
    assert set(stored_shapes(checkpoint.config)) == set(stored)


def test_a_fused_projection_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "phi3")
    edit_config(tmp_path, num_key_value_heads=4)
    with pytest.raises(CheckpointError, match="qkv_proj") as refusal:
        open_checkpoint(tmp_path)
    assert (refusal.value.got, refusal.value.expected) == ([96, 48], [144, 48])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_gemma_are_stored_less_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is lost to the stored type when 1 is added."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "gemma3", dtype=dtype))
    stored = load_file(tmp_path / "model.safetensors")
    norms = [name for name in checkpoint.tensor_names if "norm" in name]
    assert len(norms) == 7 * 6 + 1
    for name in checkpoint.tensor_names:
        tensor = checkpoint.tensor(name)
        assert torch.equal(tensor, stored[name].float() + 1.0 if name in norms else stored[name])


def test_where_weights_are_is_the_name_itself_for_a_family_like_llama(tmp_path: Path) -> None:
    config = open_checkpoint(write_checkpoint(tmp_path, "qwen3")).config
    assert stored_shapes(config) == config.tensor_shapes()
    for name, source in weight_sources(config).items():
        assert (source.name, source.first_row, source.n_rows) == (name, 0, config.tensor_shapes()[name][0])
        assert source.offset == 0.0


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_text_model_inside_a_wrapper_without_a_tower_is_the_text_model(prefix: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "gemma3")
    plain = open_checkpoint(folder)
    digest = plain.digest
    stored = load_file(folder / "model.safetensors")
    without = "model." if prefix.startswith("model.") else ""
    save_file({prefix + name.removeprefix(without): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    text = read_config(folder)
    architectures = ["Gemma3ForConditionalGeneration"]
    write_config(folder, {"model_type": "gemma3", "architectures": architectures, "text_config": text, "eos_token_id": [2, 5]})
    wrapped = open_checkpoint(folder)
    assert wrapped.config == dataclasses.replace(plain.config, eos_token_ids=(2, 5))
    assert wrapped.digest == digest
    edit_config(folder, vision_config={"model_type": "siglip_vision_model"})
    with pytest.raises(CheckpointError, match="vision or audio tower"):
        open_checkpoint(folder)


@pytest.mark.parametrize("field", ["partial_rotary_factor", "rope_parameters"])
def test_a_share_of_a_head_that_is_no_even_number_of_channels_is_refused(field: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "phi3")
    rope = {**read_config(folder)["rope_parameters"], "partial_rotary_factor": 0.6}
    edit_config(folder, **({field: rope} if field == "rope_parameters" else {field: 0.6, "rope_parameters": None}))
    with pytest.raises(CheckpointError, match=r"RoPE over 0\.6 of each head"):
        open_checkpoint(folder)


def test_a_longrope_without_a_factor_per_pair_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "phi4-mini")
    rope = read_config(folder)["rope_parameters"]
    edit_config(folder, rope_parameters={**rope, "long_factor": [1.0, 2.0]})
    with pytest.raises(CheckpointError, match="one factor per pair"):
        open_checkpoint(folder)


def test_attention_in_both_directions_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "gemma3")
    edit_config(folder, use_bidirectional_attention=True)
    with pytest.raises(CheckpointError, match="both directions"):
        open_checkpoint(folder)


def test_the_json_of_a_model_without_later_features_has_no_later_fields(tmp_path: Path) -> None:
    """So that recipes and engines of earlier versions still belong to their models."""
    config = open_checkpoint(write_checkpoint(tmp_path)).config
    data = config.to_json()
    assert list(data)[-3:] == ["qk_norm", "bos_token_id", "eos_token_ids"]
    assert list(data["rope"])[-1] == "original_max_positions"
    assert len(data["rope"]) == 6
    assert ModelConfig.from_json(data) == config
