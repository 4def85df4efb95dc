"""Graphs with RecallAttention are read and built by TensorRT itself, as plugins and by the ops' functions."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.shaped_models import LLAMA_31_8B, save_shaped_graph
from tests.tensorrt_plugins import deregister_plugins
from tests.test_tensorrt_graphs import PAGE_SIZE, TINY, plan_request, program
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, export_graphs
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.profiles import build_profile
from trt_kv.program import PHASES

pytestmark = [pytest.mark.early, pytest.mark.slow]

FREEKV = policy_from_name("freekv")
BUDGET_FOUND = dataclasses.replace(FREEKV, budget="unimetric", tokens=0)
POLICIES = {
    "freekv_but_layer_1": dataclasses.replace(FREEKV, exempt_layers=(1,)),
    "freekv_budget_found": BUDGET_FOUND,
    "bestkey": policy_from_name("bestkey"),
}
"""What ``test_tensorrt_graphs``, which goes through the presets, does not see."""


@pytest.fixture(scope="module")
def build(tensorrt: ModuleType) -> Iterator[ModuleType]:
    """``trt_kv.export.targets.tensorrt_engine``, with the plugins taken back afterwards."""
    from trt_kv.export.targets import tensorrt_engine

    yield tensorrt_engine
    deregister_plugins()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(POLICIES["freekv_but_layer_1"], id="freekv_but_layer_1", marks=pytest.mark.slow),
        pytest.param(POLICIES["freekv_budget_found"], id="freekv_budget_found"),
        pytest.param(POLICIES["bestkey"], id="bestkey"),
    ],
)
def exported(
    request: pytest.FixtureRequest, small_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineRequest, Path]:
    policy: Policy = request.param
    wanted = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy)
    folder = tmp_path_factory.mktemp("graphs")
    export_graphs(wanted, folder)
    return wanted, folder


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_build_with_their_ops_as_plugins(
    build: Any, exported: tuple[EngineRequest, Path], phase: str, tmp_path: Path
) -> None:
    wanted, graphs = exported
    request = plan_request(build, wanted, graphs, phase)
    build.build_plan(request, tmp_path)
    assert (tmp_path / "model.plan").stat().st_size > 1e5
    network = json.loads((tmp_path / "network.json").read_text())
    assert [p["op"] for p in network["plugins"]] == [node.op for nodes in request.program for node in nodes]
    assert ("budget_0" in network["outputs"]) == (wanted.policy.budget == "unimetric" and phase == "prefill")
    assert network["outputs"]["corrected_0" if 0 not in wanted.policy.exempt_layers else "corrected_1"]["type"] == "INT64"


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_build_without_plugins(build: Any, exported: tuple[EngineRequest, Path], phase: str) -> None:
    """Standard layers only, all the way to an engine: the functions are a fallback that TensorRT compiles."""
    from trt_kv.export.targets.tensorrt_network import network_from_onnx

    wanted, graphs = exported
    deregister_plugins()
    request = plan_request(build, wanted, graphs, phase)
    parsed = network_from_onnx(request.graph, plugins=False)
    assert parsed.plugins() == []
    config = build._builder_config(parsed, request, build.BuildProgress("building", None))
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    assert plan is not None, parsed.logger.errors
    assert parsed.logger.errors == []


def test_only_plans_that_remember_queries_bound_their_number(build: Any, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """U, the rows of last_query, has the pool's range: the pool has a row per page. Other plans have no such axis."""
    config = open_checkpoint(small_checkpoint_folder).config
    for policy, recalls in ((FREEKV, True), (policy_from_name("full"), False)):
        request = build.PlanRequest(
            graph=tmp_path / "unread.onnx",
            program=program(policy, config, "prefill"),
            config=config,
            page_size=PAGE_SIZE,
            dtype="float32",
            options=TensorRtOptions(profile=TINY),
        )
        assert all(ranges.get("U") == (ranges["M"] if recalls else None) for ranges in request.ranges)


def shaped_request(build: Any, config: ModelConfig, folder: Path) -> Any:
    """A prefill graph of ``config`` in fp16 that recalls and finds its budgets in every layer."""
    ops = program(BUDGET_FOUND, config, "prefill")
    save_shaped_graph(config, ops, folder / "prefill.onnx", page_size=PAGE_SIZE, dtype=torch.float16)
    return build.PlanRequest(
        graph=folder / "prefill.onnx",
        program=ops,
        config=config,
        page_size=PAGE_SIZE,
        dtype="float16",
        options=TensorRtOptions(profile=build_profile("datacenter")),
    )


def check_shaped_network(network: dict[str, Any], config: ModelConfig) -> None:
    assert [plugin["op"] for plugin in network["plugins"]] == ["RecallAttention", "AdaptiveBudget"] * config.n_layers
    last = config.n_layers - 1
    assert network["inputs"][f"summaries_{last}"] == {"type": "HALF", "shape": [-1, 8, 2, 128]}
    assert network["inputs"][f"last_query_{last}"] == {"type": "HALF", "shape": [-1, 32, 128]}
    assert network["outputs"][f"budget_{last}"] == {"type": "INT64", "shape": [-1]}


def test_llama_31_8b_that_recalls_parses_with_plugins_in_every_layer(build: Any, tmp_path: Path) -> None:
    from trt_kv.export.targets.tensorrt_network import check_network, describe_network, network_from_onnx

    request = shaped_request(build, LLAMA_31_8B, tmp_path)
    parsed = network_from_onnx(request.graph)
    check_network(parsed, request.program, LLAMA_31_8B, page_size=PAGE_SIZE, dtype="float16")
    check_shaped_network(describe_network(parsed), LLAMA_31_8B)


def test_llama_31_8b_that_recalls_builds(build: Any, tmp_path: Path) -> None:
    """Two of its layers, and few words."""
    config = dataclasses.replace(LLAMA_31_8B, n_layers=2, vocab_size=1000, bos_token_id=1, eos_token_ids=(2,))
    request = shaped_request(build, config, tmp_path)
    build.build_plan(request, tmp_path)
    check_shaped_network(json.loads((tmp_path / "network.json").read_text()), config)
    assert (tmp_path / "model.plan").stat().st_size > 400e6
    (tmp_path / "model.plan").unlink()
