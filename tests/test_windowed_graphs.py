"""Graphs with windows and a soft cap: whole in ONNX Runtime by the ops' bodies, and in TensorRT by these and as plugins."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.device_engines import WINDOWS, with_windows
from tests.engines import build_for_test, prefixkv_request
from tests.tensorrt_plugins import deregister_plugins
from tests.test_monolithic_graphs import ATOL, MonolithicRunner, recorded_run
from tests.test_tensorrt_graphs import plan_request
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import load_manifest

pytestmark = pytest.mark.early


@pytest.fixture(scope="module")
def request_and_folder(small_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineRequest, Path]:
    """PrefixKV beside a layer with a window."""
    request = prefixkv_request(with_windows(open_checkpoint(small_checkpoint_folder)), (0.6, 1.0, 0.5), budget=0.55)
    return request, build_for_test(request, tmp_path_factory.mktemp("windowed") / "engine")


def test_graphs_give_the_runtimes_logits_while_pages_of_the_window_are_freed(
    request_and_folder: tuple[EngineRequest, Path],
) -> None:
    manifest = load_manifest(request_and_folder[1])
    steps, logits, _ = recorded_run(request_and_folder[1], manifest)
    assert any((step.kv_len[1] <= step.positions.max()).all() for step in steps), "no page has been freed"
    graphs = MonolithicRunner(request_and_folder[1] / "graphs", manifest)
    outputs = [graphs.run(step)["logits"] for step in steps]
    np.testing.assert_allclose(np.concatenate(outputs), np.concatenate(logits), atol=ATOL, rtol=0.0)


@pytest.fixture(scope="module")
def build(tensorrt: ModuleType) -> Iterator[ModuleType]:
    """``trt_kv.export.targets.tensorrt_engine``, with the plugins taken back afterwards."""
    from trt_kv.export.targets import tensorrt_engine

    yield tensorrt_engine
    deregister_plugins()


@pytest.mark.slow
def test_tensorrt_builds_windows_as_plugins_and_as_functions(
    build: Any, request_and_folder: tuple[EngineRequest, Path], tmp_path: Path
) -> None:
    from trt_kv.export.targets.tensorrt_network import network_from_onnx

    wanted, folder = request_and_folder
    request = plan_request(build, wanted, folder / "graphs", "prefill")
    build.build_plan(request, tmp_path)
    plugins = json.loads((tmp_path / "network.json").read_text())["plugins"]
    attend = [plugin for plugin in plugins if plugin["op"] == "CachedAttention"]
    assert [plugin["window"] for plugin in attend] == list(WINDOWS["windows"])
    capped = [plugin["soft_cap"] for plugin in plugins if plugin["op"] != "EvictTokens"]
    assert capped == pytest.approx([WINDOWS["attention_soft_cap"]] * len(capped))
    deregister_plugins()
    parsed = network_from_onnx(request.graph, plugins=False)
    assert parsed.plugins() == []
    config = build._builder_config(parsed, request, build.BuildProgress("building", None))
    assert parsed.builder.build_serialized_network(parsed.network, config) is not None, parsed.logger.errors
