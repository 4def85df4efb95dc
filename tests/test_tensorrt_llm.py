"""The folder for TensorRT-LLM: options that its source admits, policies that are refused, and statistics of queries."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file

from tests.checkpoints import write_checkpoint
from tests.engines import Run
from trt_kv.errors import CheckpointError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.targets.tensorrt_llm import CONVERSION, as_yaml, checkpoint_files, save_statistics
from trt_kv.export.targets.tensorrt_llm_fields import check_options, missing_fields, published_fields
from trt_kv.export.targets.tensorrt_llm_options import CALIBRATION_FILE, HandOver, hand_over_of
from trt_kv.layer_budget import layer_budgets
from trt_kv.pipeline import environment
from trt_kv.pipeline.calibration_runs import query_statistics_of
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy_settings import policy_with
from trt_kv.presets import PRESETS

CONTEXT = 4000
REFUSED = {
    "arkvale": "recalled in each step",
    "bestkey": "recalled in each step",
    "randomdecode": "drawn at random",
    "freekv": "recalled in each step",
    "quest": "recalled in each step",
    "kvzap": "found from each prompt",
    "reach": "found from each prompt",
    "refreekv": "found from each prompt",
    "streamingllm": "sink_token_length is ignored",
    "pyramidkv": "a budget of its own for each layer",
    "lukv": "a budget of its own for each layer",
    "prefixkv": "a budget of its own for each layer",
    "prefixkv_paper": "a budget of its own for each layer",
    "widewindow": "a budget of its own for each layer",
}
SECTION = {"full": None, "h2o": "kv_cache_compression_config", "random": "kv_cache_compression_config"}
SECTION |= {
    "defensivekv_v": "sparse_attention_config",
    "snapkv": "sparse_attention_config",
    "uniform": "sparse_attention_config",
}


def handed_over(checkpoint: Checkpoint, name: str, changed: dict[str, Any] | None = None, **options: Any) -> HandOver:
    policy, n_layers = policy_with(policy_from_name(name), changed or {}), checkpoint.config.n_layers
    kept = [0.1 + 0.1 * layer for layer in range(n_layers)] if policy.needs_recipe else None
    budgets = layer_budgets(policy, n_layers, kept)
    return hand_over_of(checkpoint.config, policy, budgets, **({"context": CONTEXT, "page_size": 32} | options))


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_maps_to_admitted_options_or_is_refused_with_the_reason(name: str, bundled_checkpoint: Checkpoint) -> None:
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]) as caught:
            handed_over(bundled_checkpoint, name)
        assert caught.value.fix
        return
    found = handed_over(bundled_checkpoint, name)
    check_options(found.options)
    sections = {"kv_cache_compression_config", "sparse_attention_config"} & set(found.options)
    assert sections == ({SECTION[name]} if SECTION[name] else set())
    assert found.needs_queries == ("kv_cache_compression_config" in found.options)
    assert "sink_token_length" not in json.dumps(found.options)
    assert found.losses


def test_a_window_without_sinks_becomes_a_window_per_layer(bundled_checkpoint: Checkpoint) -> None:
    found = handed_over(bundled_checkpoint, "streamingllm", {"sinks": 0, "kept": 0.25})
    n_layers = bundled_checkpoint.config.n_layers
    assert found.options["kv_cache_config"]["max_attention_window"] == [1000] * n_layers
    found = handed_over(bundled_checkpoint, "streamingllm", {"sinks": 0, "budget": "recipe"})
    windows = found.options["kv_cache_config"]["max_attention_window"]
    assert windows == [round((0.1 + 0.1 * layer) * CONTEXT) for layer in range(n_layers)]
    assert any("at other lengths" in loss for loss in found.losses)
    with pytest.raises(UsageError, match="generated tokens are all kept"):
        handed_over(bundled_checkpoint, "streamingllm", {"sinks": 0, "decode": "keep"})


def test_budgets_reach_the_sections(bundled_checkpoint: Checkpoint) -> None:
    found = handed_over(bundled_checkpoint, "h2o", {"kept": 0.25})
    compression = found.options["kv_cache_compression_config"]
    assert compression["budget"] == 1000
    assert compression["calibration_path"] == CALIBRATION_FILE
    assert found.options["kv_cache_config"]["use_kv_cache_manager_v2"] is True
    sparse = handed_over(bundled_checkpoint, "snapkv", {"kept": 0.25}).options
    assert sparse["sparse_attention_config"]["prompt_budget"] == 1000
    assert sparse["kv_cache_config"]["enable_block_reuse"] is False


def test_what_cannot_be_is_refused(bundled_checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="powers of 2"):
        handed_over(bundled_checkpoint, "full", page_size=24)
    with pytest.raises(UsageError, match="int8"):
        handed_over(bundled_checkpoint, "full", kv_dtype="int8")
    config = dataclasses.replace(bundled_checkpoint.config, n_kv_heads=8)
    policy = policy_from_name("random")
    with pytest.raises(UsageError, match="does not run this model"):
        hand_over_of(config, policy, layer_budgets(policy, config.n_layers), context=CONTEXT, page_size=32)
    for wrong in ({"kv_cache_config": {"sink_token_length": 4}}, {"backend": "tensorrt"}, {"max_batch": 1}):
        with pytest.raises(UsageError, match="TensorRT-LLM"):
            check_options(wrong)
    with pytest.raises(CheckpointError, match="Hugging Face layout"):
        checkpoint_files(type("Other", (), {"location": Path("model.gguf")})())


def test_the_yaml_is_read_as_it_was_meant(bundled_checkpoint: Checkpoint) -> None:
    options = handed_over(bundled_checkpoint, "streamingllm", {"sinks": 0}).options
    assert yaml.safe_load(as_yaml(options)) == options


@pytest.mark.parametrize("sample", ["llama", "qwen3-biases"])
def test_statistics_are_those_of_the_queries_of_transformers(sample: str, tmp_path: Path) -> None:
    """Before RoPE, and after the norm of queries."""
    folder = PRESETS["llama3"].bundled_folder
    if sample != "llama":
        folder = tmp_path / sample
        write_checkpoint(folder, sample=sample)
    checkpoint = open_checkpoint(folder)
    prompts = [[1, *range(5, 45)], [1, *range(60, 90)]]
    found = query_statistics_of(checkpoint, prompts, lambda *_: None)
    assert found.n_tokens == 72
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    config = checkpoint.config
    seen: dict[int, list[np.ndarray]] = {}
    for layer, block in enumerate(model.model.layers):
        source = getattr(block.self_attn, "q_norm", block.self_attn.q_proj)
        source.register_forward_hook(
            lambda _m, _i, out, layer=layer: seen.setdefault(layer, []).append(
                out.detach().reshape(-1, config.n_heads, config.head_dim).numpy()
            )
        )
    with torch.inference_mode():
        for ids in prompts:
            model(torch.tensor([ids]))
    for layer in range(config.n_layers):
        low, high = np.split(np.concatenate(seen[layer]).astype(np.float64), 2, axis=-1)
        q = low + 1j * high
        np.testing.assert_allclose(found.mean_real[layer] + 1j * found.mean_imaginary[layer], q.mean(0), atol=2e-5)
        np.testing.assert_allclose(found.mean_absolute[layer], np.abs(q).mean(0), atol=2e-5)


def test_the_converted_file_is_what_tensorrt_llm_reads(bundled_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The line of the README runs, and makes E_q, E_q_norm, omega and freq_scale_sq of the right types and shapes."""
    config = bundled_checkpoint.config
    found = query_statistics_of(bundled_checkpoint, [[1, *range(5, 45)]], lambda *_: None)
    save_statistics(tmp_path / "triattention.safetensors", found.arrays, config, n_tokens=41, source="a test")
    words = CONVERSION.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", words], check=True, cwd=tmp_path)
    look = (
        "import json, torch; t = torch.load('triattention.pt', weights_only=True); "
        "print(json.dumps({n: [str(v.dtype), list(v.shape)] for n, v in t.items()}))"
    )
    told = subprocess.run([sys.executable, "-c", look], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    shape, pairs = [config.n_layers, config.n_heads, config.head_dim // 2], [config.head_dim // 2]
    assert json.loads(told) == {
        "E_q": ["torch.complex64", shape],
        "E_q_norm": ["torch.float32", shape],
        "omega": ["torch.float32", pairs],
        "freq_scale_sq": ["torch.float32", pairs],
    }
    omega = load_file(tmp_path / "triattention.safetensors")["omega"]
    np.testing.assert_allclose(omega, config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim), rtol=1e-6)


def test_the_command_writes_a_folder_whose_readme_tells_what_is_lost(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "handed"
    asked = ("--target", "tensorrt-llm", "--policy", "random", "--context", "2048", "--samples", "1", "--out", out)
    code, said, errors = run("build", *asked)
    assert code == 0, errors
    assert "README.md" in said
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "llm_options.yaml", "model", "triattention.safetensors"]
    readme, options = (out / "README.md").read_text(), yaml.safe_load((out / "llm_options.yaml").read_text())
    assert "the prompt is never evicted" in readme
    assert "Nothing here has been run with TensorRT-LLM" in readme
    assert CONVERSION in readme
    assert options["max_seq_len"] == 2048
    opened = open_checkpoint(out / "model")
    assert opened.config.n_layers == open_checkpoint(PRESETS["llama3"].bundled_folder).config.n_layers
    assert run("build", *asked)[0] == 2, "something is there already"
    code, _, errors = run("build", "--target", "tensorrt-llm", "--policy", "freekv", "--out", tmp_path / "other")
    assert code == 2
    assert "host_cache_size is for reuse" in errors
    assert not (tmp_path / "other").exists()


def test_calibrate_writes_query_statistics(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "queries.safetensors"
    code, said, errors = run("calibrate", "--queries", "--samples", "1", "--out", out)
    assert code == 0, errors
    assert str(out) in said
    assert set(load_file(out)) == {"q_mean_real", "q_mean_imag", "q_abs_mean", "omega", "freq_scale_sq"}
    assert run("calibrate", "--queries", "--out", tmp_path / "queries.pt")[0] == 2


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, without: str | None = None) -> None:
    """A package tensorrt_llm whose classes have the published fields, except one."""
    lines = ["import types"]
    for name, section in published_fields()["sections"].items():
        fields = [field for field in section["fields"] if f"{name}.{field}" != without]
        lines.append(f"{section['class']} = types.SimpleNamespace(model_fields={dict.fromkeys(fields)!r})")
    package = folder / "tensorrt_llm"
    (package / "llmapi").mkdir(parents=True)
    for file, text in {"__init__.py": "", "llmapi/__init__.py": "", "llmapi/llm_args.py": "\n".join(lines)}.items():
        (package / file).write_text(text)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def _forgotten_imports() -> Iterator[None]:
    """The stand-in is not found in memory afterwards."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_forgotten_imports")
@pytest.mark.parametrize("without", [None, "kv_cache_compression_config.beta"])
def test_doctor_compares_the_fields_with_an_installed_version(
    without: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, without)
    assert missing_fields() == ([without] if without else [])
    finding = environment._tensorrt_llm("section")
    assert (finding.state is environment.State.OK) == (without is None)
    assert without is None or without in finding.text


def test_doctor_says_plainly_that_it_is_not_installed() -> None:
    finding = environment._tensorrt_llm("section")
    assert finding.state is environment.State.OPTIONAL
    assert "not run" in finding.text
