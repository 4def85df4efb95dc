"""Quantised Hugging Face checkpoints: their weights are those of the libraries that define the formats."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.checkpoints import edit_config, read_config, write_checkpoint
from tests.engines import build_for_test
from tests.quantised import (
    AWQ_CONFIG,
    FP8_CONFIG,
    GPTQ_CONFIG,
    INT4,
    Q_PROJ,
    SCHEMES,
    Quantise,
    Tensors,
    compressed,
    ct_config,
    fp8_blocks,
    quantised,
)
from tests.test_fuzzed_engine import structures
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.huggingface import SINGLE_FILE, HuggingFaceCheckpoint, open_huggingface
from trt_kv.export.checkpoints.quantized.arithmetic import unpacked
from trt_kv.export.checkpoints.quantized.schemes import scheme_from_hf
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_from_name
from trt_kv.runtime.engine import Engine


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        open_huggingface(folder)
    return refused.value


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replace parts of the first layer's q_proj; ``...`` removes one."""
    tensors = load_file(folder / SINGLE_FILE)
    for part, value in changes.items():
        name = Q_PROJ.replace("weight", part)
        tensors.pop(name, None)
        if value is not ...:
            tensors[name] = value
    save_file(tensors, folder / SINGLE_FILE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama-untied")


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_reference(name: str, folder: Path) -> None:
    """Projections in fp32 as the formats' own libraries, or their definitions, have them; all else as it is stored."""
    config, quantise = SCHEMES[name]
    values = quantised(folder, config, quantise)
    checkpoint = open_huggingface(folder)
    assert set(checkpoint.tensor_names) == set(values)
    for tensor_name, expected in values.items():
        found = checkpoint.tensor(tensor_name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)
    assert checkpoint.digest == open_huggingface(folder).digest


def decoded_by_transformers(folder: Path) -> Any:
    """transformers' model with its own dequantisation of fp8 blocks; loading them takes its extra "accelerate"."""
    stored = load_file(folder / SINGLE_FILE)
    scales = {name: stored.pop(f"{name}_scale_inv") for name in list(stored) if f"{name}_scale_inv" in stored}
    dequantise = Fp8Dequantize(None)._dequantize_one
    state = {name: dequantise(tensor, scales[name]) if name in scales else tensor for name, tensor in stored.items()}
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    model.load_state_dict(state)
    return model


def loaded_by_transformers(folder: Path) -> Any:
    """transformers' model with the dequantisation of compressed-tensors."""
    config = read_config(folder)
    edit_config(folder, quantization_config=config["quantization_config"] | {"dequantize": True})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "quantise", "load"),
    [
        pytest.param(FP8_CONFIG | {"weight_block_size": [16, 16]}, fp8_blocks((16, 16)), decoded_by_transformers, id="fp8"),
        pytest.param(
            ct_config(**INT4, symmetric=False), compressed(**INT4, symmetric=False), loaded_by_transformers, id="int4"
        ),
    ],
)
def test_a_quantised_model_generates_what_transformers_does(
    config: dict[str, Any], quantise: Quantise, load: Callable[[Path], Any], folder: Path
) -> None:
    """Both dequantise; then weights and greedy tokens are equal."""
    quantised(folder, config, quantise)
    theirs = load(folder).eval()
    checkpoint = open_huggingface(folder)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(checkpoint.tensor(name), tensor, rtol=1e-6, atol=1e-7)
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), page_size=5)
    engine_folder = build_for_test(request, folder.parent / "engine")
    prompt = list(range(5, 40))
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    with Engine.load(engine_folder, cache_tokens=400, n_threads=1) as engine:
        found = engine.generate(prompt, max_new_tokens=16, ignore_eos=True)
    assert list(found.token_ids) == expected[0, len(prompt) :].tolist()


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
@settings(max_examples=50)
def test_packed_integers_are_unpacked(n_rows: int, n_columns: int, n_bits: int, seed: int) -> None:
    codes = torch.randint(0, 1 << n_bits, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_to_int32((codes - (1 << (n_bits - 1))).to(torch.int8), n_bits)
    assert torch.equal(unpacked(packed, n_bits, n_columns).long(), codes)


@pytest.mark.parametrize("method", ["bitsandbytes", "eetq", "hqq", "aqlm", "torchao", "mxfp4", "gguf", "quark", "auto-round"])
def test_other_schemes_are_refused_by_name(method: str, folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    error = refusal(folder)
    assert method in str(error.got)
    assert "original checkpoint" in str(error.fix)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bits": 4}, "None"),
        ("fp8", "fp8"),
        (FP8_CONFIG | {"weight_block_size": [0, 3]}, "weight_block_size"),
        (GPTQ_CONFIG | {"bits": 3}, "3 bits"),
        (GPTQ_CONFIG | {"bits": "4"}, "bits"),
        (GPTQ_CONFIG | {"group_size": 0}, "group_size"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "marlin"),
        (AWQ_CONFIG | {"version": "gemv"}, "gemv"),
        (AWQ_CONFIG | {"bits": 8}, "8 bits"),
        (ct_config(**INT4 | {"format": "nvfp4-pack-quantized"}), "nvfp4"),
        (ct_config(**INT4 | {"num_bits": 3}), "3 bits"),
        (ct_config(**INT4 | {"group_size": None}), "group"),
        (ct_config(**INT4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (ct_config(**INT4) | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (ct_config(**INT4) | {"config_groups": {}}, "config_groups"),
        (ct_config(**INT4) | {"config_groups": {"g": {"targets": "Linear", "weights": {}}}}, "group"),
    ],
    ids=str,
)
def test_settings_that_are_not_read_are_refused(config: Any, said: str, folder: Path) -> None:
    edit_config(folder, quantization_config=config)
    assert said in str(refusal(folder))


@given(st.sampled_from(sorted(SCHEMES)), st.data())
@settings(max_examples=200)
def test_settings_changed_at_random_are_read_or_refused(name: str, data: st.DataObject) -> None:
    config = json.loads(data.draw(structures(SCHEMES[name][0])))
    with contextlib.suppress(CheckpointError):
        scheme_from_hf({"quantization_config": config}, source="config.json")


def test_settings_and_tensors_that_do_not_fit_together_are_refused(folder: Path) -> None:
    original = load_file(folder / SINGLE_FILE)
    edit_config(folder, quantization_config=GPTQ_CONFIG)
    assert "remove its quantization_config" in str(refusal(folder).fix)

    for config, quantise, changes, said in (
        (*SCHEMES["fp8 blocks"], {"weight_scale_inv": ...}, "not complete"),
        (*SCHEMES["fp8 blocks"], {"weight_scale_inv": torch.ones(2, 2)}, "another shape"),
        (*SCHEMES["fp8 blocks"], {"weight_scale_inv": torch.ones(3, 2, dtype=torch.int32)}, "another type"),
        (*SCHEMES["gptq"], {"qzeros": ...}, "not complete"),
        (*SCHEMES["gptq"], {"scales": torch.ones(2, 48)}, "another shape"),
        (*SCHEMES["gptq"], {"bias": torch.ones(48)}, "not those that config.json describes"),
        (*SCHEMES["gptq"], {"qweight": torch.zeros(7, 48, dtype=torch.int32)}, "another shape"),
        (*SCHEMES["awq"], {"qweight": torch.zeros(48, 7, dtype=torch.int32)}, "another shape"),
        (*SCHEMES["ct int4 groups"], {"weight_shape": torch.tensor([48, 47])}, "does not have the shape"),
        (*SCHEMES["ct int4 groups"], {"weight_packed": ...}, "not those that config.json describes"),
        (*SCHEMES["ct int8 groups"], {"weight_scale": ...}, "no model.layers.0.self_attn.q_proj.weight_scale"),
        (*SCHEMES["ct int8 with zero points"], {"weight_zero_point": ...}, "not complete"),
    ):
        save_file(original, folder / SINGLE_FILE)
        quantised(folder, config, quantise)
        edit_tensors(folder, **changes)
        assert said in str(refusal(folder)), (config, changes)

    save_file(original, folder / SINGLE_FILE)
    quantised(folder, *SCHEMES["gptq in activation order"])
    edit_tensors(folder, g_idx=torch.full((48,), 3, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=Q_PROJ):
        open_huggingface(folder).tensor(Q_PROJ)


@pytest.mark.parametrize(("name", "part"), [("gptq", "scales"), ("awq", "scales"), ("ct int8 groups", "weight_scale")])
def test_scales_that_are_no_numbers_are_refused(name: str, part: str, folder: Path) -> None:
    quantised(folder, *SCHEMES[name])
    scale = load_file(folder / SINGLE_FILE)[Q_PROJ.replace("weight", part)]
    scale[0, 0] = float("nan")
    edit_tensors(folder, **{part: scale})
    with pytest.raises(CheckpointError, match=f"'{Q_PROJ}' of .*: a quantised weight has scales that are no finite numbers"):
        open_huggingface(folder).tensor(Q_PROJ)


def test_modules_are_quantised_as_their_group_says(folder: Path) -> None:
    """A name goes before a pattern, and a pattern before a class."""
    wide = ct_config(**INT4 | {"group_size": 8})
    config = ct_config(**INT4)
    config["config_groups"] |= {
        "others": {"targets": ["re:.*mlp.*"], "weights": wide["config_groups"]["group_0"]["weights"]},
        "none": {"targets": ["Embedding"], "weights": None},
    }
    values: Tensors = {}
    stored: Tensors = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        if name.endswith("proj.weight"):
            args = INT4 | {"group_size": 8} if "mlp" in name else INT4
            parts, values[name] = compressed(**args)(tensor)
            stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, folder / SINGLE_FILE)
    edit_config(folder, quantization_config=config)
    checkpoint = open_huggingface(folder)
    for name, expected in values.items():
        torch.testing.assert_close(checkpoint.tensor(name), expected, rtol=1e-6, atol=1e-7)
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.q.*"]
    edit_config(folder, quantization_config=config)
    assert "k_proj" in str(refusal(folder))


def test_scales_of_the_cache_and_of_activations_are_left_out(folder: Path) -> None:
    config, quantise = SCHEMES["fp8 per tensor"]
    quantised(folder, config, quantise)
    tensors = load_file(folder / SINGLE_FILE)
    more = {"model.layers.0.self_attn.k_scale": torch.tensor(0.1), "model.layers.1.self_attn.v_proj.v_scale": torch.ones(1)}
    before = open_huggingface(folder)
    digest, weight = before.digest, before.tensor(Q_PROJ).clone()
    save_file(tensors | more, folder / SINGLE_FILE)
    after = open_huggingface(folder)
    assert after.digest == digest
    assert torch.equal(after.tensor(Q_PROJ), weight)


def test_the_digest_is_that_of_what_is_stored(folder: Path) -> None:
    """It changes with any part, and with a setting that changes the values."""
    quantised(folder, *SCHEMES["gptq"])

    def opened() -> HuggingFaceCheckpoint:
        return open_huggingface(folder)

    digests = [opened().digest]
    edit_config(folder, quantization_config=GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"})
    digests.append(opened().digest)
    stored = load_file(folder / SINGLE_FILE)
    edit_tensors(folder, scales=stored[Q_PROJ.replace("weight", "scales")] * 2)
    digests.append(opened().digest)
    assert len(set(digests)) == 3
