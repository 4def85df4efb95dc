"""Every exported graph is read and built by TensorRT itself, with the ops as plugins and without them."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.engines import SHARES, prefixkv_request, recipe_for
from tests.shaped_models import LLAMA_31_8B, save_shaped_graph
from tests.tensorrt_plugins import deregister_plugins
from trt_kv.errors import EngineError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine, export_graphs
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.manifest import load_manifest
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.registry import op_specs
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy
from trt_kv.profiles import BuildProfile, build_profile
from trt_kv.program import PHASES, OpNode, Program, program_of, program_of_model
from trt_kv.runtime.engine import Engine

pytestmark = [pytest.mark.early, pytest.mark.slow]

PAGE_SIZE = 32
ENGINES = {"full": "full_folder", "prefixkv_paper": "half_folder"}
TINY = BuildProfile(
    summary="for tests",
    prefill_tokens=((1, 16, 32), (33, 64, 128)),
    decode_sequences=((1, 2, 4),),
    context_tokens=(1, 64, 256),
    cache_tokens=(32, 256, 1024),
    workspace_mib=64,
    optimization_level=0,
)


@pytest.fixture(scope="module")
def build(tensorrt: ModuleType) -> Iterator[ModuleType]:
    """``trt_kv.export.targets.tensorrt_engine``, with the plugins taken back afterwards."""
    from trt_kv.export.targets import tensorrt_engine

    yield tensorrt_engine
    deregister_plugins()


def request_for(checkpoint: Checkpoint, name: str) -> EngineRequest:
    policy = policy_from_name(name)
    if not policy.needs_recipe:
        return EngineRequest(checkpoint=checkpoint, policy=policy)
    shares = SHARES[: checkpoint.config.n_layers]
    recipe = recipe_for(checkpoint, shares, budget=0.5)
    return EngineRequest(checkpoint=checkpoint, policy=dataclasses.replace(policy, kept=0.5), recipe=recipe)


def program(policy: Policy, config: ModelConfig, phase: str, kept_shares: list[float] | None = None) -> Program:
    return program_of_model(config, policy, phase=phase, page_size=PAGE_SIZE, kept_shares=kept_shares)


def presets() -> Iterator[Any]:
    """Each preset; those whose graphs have the ops of one before them, with other attributes, are slow."""
    seen: set[Any] = set()
    for name in sorted(policy_names(), key=lambda name: name not in ENGINES):
        policy = policy_from_name(name)
        if policy.heads == "own":  # refused for plans
            continue
        sizes: dict[str, Any] = {"n_layers": 3, "scale": 1.0, "page_size": PAGE_SIZE, "kept_shares": SHARES[:3]}
        programs = [program_of(policy, phase=phase, **sizes) for phase in PHASES]
        ops = tuple(tuple(node.op for node in nodes) for program in programs for nodes in program)
        yield pytest.param(name, marks=pytest.mark.slow if ops in seen else ())
        seen.add(ops)


@pytest.fixture(scope="module", params=presets())
def exported(
    request: pytest.FixtureRequest,
    bundled_checkpoint: Checkpoint,
    small_checkpoint_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EngineRequest, Path]:
    """Graphs under each policy: the bundled model's where other tests have an engine of it, else the small random model's."""
    if request.param in ENGINES:
        wanted = request_for(bundled_checkpoint, request.param)
        return wanted, request.getfixturevalue(ENGINES[request.param]) / "graphs"
    wanted = request_for(open_checkpoint(small_checkpoint_folder), request.param)
    folder = tmp_path_factory.mktemp("graphs")
    export_graphs(wanted, folder)
    return wanted, folder


@pytest.fixture(scope="module")
def small_request(small_checkpoint_folder: Path) -> EngineRequest:
    """PrefixKV for the small random checkpoint."""
    return prefixkv_request(open_checkpoint(small_checkpoint_folder), (0.6, 0.3, 0.9), budget=0.6)


def plan_request(build: Any, wanted: EngineRequest, graphs: Path, phase: str, **changes: Any) -> Any:
    config = wanted.checkpoint.config
    request = build.PlanRequest(
        graph=graphs / f"{phase}.onnx",
        program=program(wanted.policy, config, phase, wanted.kept_shares),
        config=config,
        page_size=PAGE_SIZE,
        dtype="float32",
        options=TensorRtOptions(profile=TINY),
    )
    return dataclasses.replace(request, **changes)


@pytest.mark.parametrize("phase", PHASES)
def test_every_policy_builds_with_its_ops_as_plugins(
    build: Any, exported: tuple[EngineRequest, Path], phase: str, tmp_path: Path
) -> None:
    """A serialized engine, and plugin layers whose fields are the policy's parameters, layer by layer."""
    wanted, graphs = exported
    told: list[tuple[str, int, int]] = []
    request = plan_request(build, wanted, graphs, phase)
    build.build_plan(request, tmp_path, lambda *progress: told.append(progress))
    assert (tmp_path / "model.plan").stat().st_size > 1e5
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2]
    plugins = json.loads((tmp_path / "network.json").read_text())["plugins"]
    nodes = [node for layer in request.program for node in layer]
    assert [plugin["op"] for plugin in plugins] == [node.op for node in nodes]
    for plugin, node in zip(plugins, nodes, strict=True):
        assert {name: plugin[name] for name in node.attributes} == pytest.approx(dict(node.attributes))


@pytest.mark.parametrize("phase", PHASES)
def test_without_plugins_the_ops_are_their_functions(build: Any, exported: tuple[EngineRequest, Path], phase: str) -> None:
    """The same files, nothing registered: standard layers only, and a network that TensorRT accepts."""
    from trt_kv.export.targets.tensorrt_network import network_from_onnx

    _, graphs = exported
    deregister_plugins()
    parsed = network_from_onnx(graphs / f"{phase}.onnx", plugins=False)
    assert parsed.plugins() == []
    assert parsed.network.num_layers > len(network_from_onnx(graphs / f"{phase}.onnx").plugins())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_engines_build(build: Any, small_request: EngineRequest, dtype: str, tmp_path: Path) -> None:
    wanted = dataclasses.replace(small_request, dtype=dtype, tensorrt=TensorRtOptions(profile=TINY))
    build_engine(wanted, tmp_path / "engine")
    network = json.loads((tmp_path / "engine" / "network.json").read_text())
    short = {"float16": "HALF", "bfloat16": "BF16"}[dtype]
    assert {network["outputs"][name]["type"] for name in ("logits", "kv_0_out")} == {short}
    assert network["outputs"]["scores_0_out"]["type"] == "FLOAT"


@pytest.fixture(scope="module")
def planned_folder(build: Any, small_request: EngineRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for TensorRT, and beside it the timing cache of its build."""
    folder = tmp_path_factory.mktemp("planned")
    options = TensorRtOptions(profile=TINY, timing_cache=folder / "timing.cache")
    build_engine(dataclasses.replace(small_request, tensorrt=options), folder / "engine")
    return folder / "engine"


def test_an_engine_for_tensorrt_tells_its_plan(build: Any, planned_folder: Path) -> None:
    """One plan for both phases, its profiles and its builder's version in the manifest, and no graphs beside it."""
    manifest = load_manifest(planned_folder)
    assert manifest.target == "tensorrt"
    assert manifest.plan is not None
    assert manifest.plan.built_by == f"tensorrt {build.trt.__version__}"
    assert [ranges["N"] for ranges in manifest.plan.profiles] == [(1, 16, 32), (33, 64, 128), (1, 2, 4)]
    assert {"model.plan", "network.json", "recipe.json"} <= set(manifest.files)
    assert not (planned_folder / "graphs").exists()
    assert (planned_folder.parent / "timing.cache").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_tensorrt_executor runs the engine")
def test_an_engine_for_tensorrt_does_not_load_without_a_gpu_and_says_so(planned_folder: Path) -> None:
    with pytest.raises(EngineError, match=r"TensorRT cannot load .*model\.plan"):
        Engine.load(planned_folder)


def test_a_graph_that_is_not_the_programs_is_refused(build: Any, exported: tuple[EngineRequest, Path], tmp_path: Path) -> None:
    wanted, graphs = exported
    request = plan_request(build, wanted, graphs, "decode")
    other = tuple(
        (dataclasses.replace(nodes[0], attributes=nodes[0].attributes | {"scale": 1.0}), *nodes[1:])
        for nodes in request.program
    )
    one_more = tuple((*nodes, nodes[0]) for nodes in request.program)
    for changes, said in (
        ({"program": other}, "not the policy's ops"),
        ({"program": one_more}, "not the policy's ops"),
        ({"dtype": "float16"}, "another type or shape"),
        ({"page_size": 16}, "another type or shape"),
        ({"program": request.program[:-1]}, "inputs are not the engine's"),
    ):
        with pytest.raises(EngineError, match=said):
            build.build_plan(dataclasses.replace(request, **changes), tmp_path)
    assert not (tmp_path / "model.plan").exists()


def test_a_node_without_a_field_is_refused_by_name(build: Any, exported: tuple[EngineRequest, Path], tmp_path: Path) -> None:
    """The parser only warns of a field that is missing; the plugin's creator does not let it pass."""
    import onnx

    from trt_kv.export.targets.tensorrt_network import network_from_onnx

    _, graphs = exported
    model = onnx.load(str(graphs / "decode.onnx"))
    node = next(node for node in model.graph.node if node.op_type in ("CachedAttention", "RecallAttention"))
    (scale,) = [attribute for attribute in node.attribute if attribute.name == "scale"]
    node.attribute.remove(scale)
    onnx.save(model, str(tmp_path / "broken.onnx"))
    with pytest.raises(EngineError, match="missing: scale"):
        network_from_onnx(tmp_path / "broken.onnx")


def check_shaped_plugins(network: dict[str, Any], config: ModelConfig, shares: list[float]) -> None:
    ops = set(op_specs()) - {"RecallAttention", "PredictedScores"}
    of_ops = {op: [plugin for plugin in network["plugins"] if plugin["op"] == op] for op in ops}
    assert {op: len(plugins) for op, plugins in of_ops.items()} == dict.fromkeys(ops, config.n_layers)
    assert [plugin["kept_share"] for plugin in of_ops["EvictTokens"]] == pytest.approx(shares)
    assert network["inputs"]["kv_1"]["shape"] == [-1, 2, 8, PAGE_SIZE, 128]
    assert network["outputs"]["logits"]["shape"] == [-1, config.vocab_size]


def with_share(node: OpNode, share: float) -> OpNode:
    return dataclasses.replace(node, attributes={**node.attributes, "kept_share": share})


def shaped_request(build: Any, config: ModelConfig, folder: Path) -> tuple[Any, list[float]]:
    """A prefill graph of ``config`` with the ops of eviction in every layer, and a share of its own on each EvictTokens.

    The policy is PrefixKV with its budgets found from the input, so that the ranking and the budget both read attention.
    """
    shares = [0.2 + 0.5 * layer / config.n_layers for layer in range(config.n_layers)]
    policy = dataclasses.replace(policy_from_name("prefixkv_paper"), budget="unimetric", kept=1.0)
    ops = tuple(
        tuple(with_share(node, share) if node.op == "EvictTokens" else node for node in nodes)
        for nodes, share in zip(program(policy, config, "prefill"), shares, strict=True)
    )
    save_shaped_graph(config, ops, folder / "prefill.onnx", page_size=PAGE_SIZE, dtype=torch.float16)
    request = build.PlanRequest(
        graph=folder / "prefill.onnx",
        program=ops,
        config=config,
        page_size=PAGE_SIZE,
        dtype="float16",
        options=TensorRtOptions(profile=build_profile("datacenter")),
    )
    return request, shares


def test_llama_31_8b_parses_with_plugins_in_every_layer(build: Any, tmp_path: Path) -> None:
    """All 32 layers and the whole vocabulary in fp16."""
    from trt_kv.export.targets.tensorrt_network import check_network, describe_network, network_from_onnx

    request, shares = shaped_request(build, LLAMA_31_8B, tmp_path)
    parsed = network_from_onnx(request.graph)
    check_network(parsed, request.program, LLAMA_31_8B, page_size=PAGE_SIZE, dtype="float16")
    check_shaped_plugins(describe_network(parsed), LLAMA_31_8B, shares)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            dataclasses.replace(LLAMA_31_8B, n_layers=2, vocab_size=1000, bos_token_id=1, eos_token_ids=(2,)), id="2-layers"
        ),
        pytest.param(LLAMA_31_8B, id="32-layers", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_llama_31_8b_builds(build: Any, config: ModelConfig, tmp_path: Path) -> None:
    """The whole model takes a minute or two."""
    request, shares = shaped_request(build, config, tmp_path)
    build.build_plan(request, tmp_path)
    check_shaped_plugins(json.loads((tmp_path / "network.json").read_text()), config, shares)
    assert (tmp_path / "model.plan").stat().st_size > 400e6
    (tmp_path / "model.plan").unlink()
