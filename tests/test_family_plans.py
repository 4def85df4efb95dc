"""Graphs of every family are read and built by TensorRT, with the ops as plugins."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.checkpoints import FAMILY_SAMPLES, write_checkpoint
from tests.tensorrt_plugins import deregister_plugins
from tests.test_tensorrt_graphs import TINY
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine, export_graphs
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name
from trt_kv.program import program_of_model


@pytest.fixture(autouse=True)
def _plugins_taken_back(tensorrt: ModuleType) -> Iterator[None]:
    yield
    deregister_plugins()


def check(network: dict[str, Any], config: ModelConfig) -> None:
    assert network["outputs"]["logits"]["shape"] == [-1, config.vocab_size]
    attends = [plugin for plugin in network["plugins"] if plugin["op"] == "CachedAttention"]
    assert [plugin["window"] for plugin in attends] == list(config.windows or [0] * config.n_layers)
    assert [plugin["soft_cap"] for plugin in attends] == pytest.approx([config.attention_soft_cap] * config.n_layers)
    assert [plugin["scale"] for plugin in attends] == pytest.approx([config.scale] * config.n_layers)


def test_a_family_with_windows_and_soft_caps_is_read_by_tensorrt(tmp_path: Path) -> None:
    from trt_kv.export.targets.tensorrt_network import check_network, describe_network, network_from_onnx

    checkpoint, policy = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", "gemma2")), policy_from_name("full")
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    export_graphs(EngineRequest(checkpoint=checkpoint, policy=policy, page_size=32), graphs)
    parsed = network_from_onnx(graphs / "decode.onnx")
    program = program_of_model(checkpoint.config, policy, phase="decode", page_size=32)
    check_network(parsed, program, checkpoint.config, page_size=32, dtype="float32")
    check(describe_network(parsed), checkpoint.config)


@pytest.mark.slow
@pytest.mark.parametrize("sample", FAMILY_SAMPLES)
def test_every_family_builds_for_tensorrt(sample: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", sample))
    request = EngineRequest(
        checkpoint=checkpoint, policy=policy_from_name("full"), page_size=32, tensorrt=TensorRtOptions(profile=TINY)
    )
    build_engine(request, tmp_path / "engine")
    assert (tmp_path / "engine" / "model.plan").stat().st_size > 1e5
    check(json.loads((tmp_path / "engine" / "network.json").read_text()), checkpoint.config)
