"""The exported graphs: they are whole models that mean what the policy says, and the segments are cut from them."""

import dataclasses
import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.checkpoints import write_checkpoint
from tests.engines import SHARES, assert_nothing_leaked, prefixkv_request, random_ids
from trt_kv.errors import CheckpointError, EngineError, RecipeError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.export.graph import WEIGHTS_FILE, graph_from_checkpoint, save_graphs
from trt_kv.export.split import program_from_graph, save_segments, segments_from_graph
from trt_kv.manifest import load_manifest
from trt_kv.opspec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES, OpSpec
from trt_kv.plugins.registry import kernel, op_specs
from trt_kv.policies import policy_from_name
from trt_kv.program import PHASES, Program, program_of
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

ROOT = Path(__file__).parent.parent
FOLDERS = ("full_folder", "half_folder", "small_folder")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def load_graph(folder: Path, phase: str) -> onnx.ModelProto:
    return onnx.load(folder / "graphs" / f"{phase}.onnx", load_external_data=False)


def test_the_graphs_hold_the_ops_of_their_policy(half_folder: Path, full_folder: Path) -> None:
    """Read back from the files, attribute by attribute; fp32 attributes are the decimal ones rounded."""
    for folder, name, shares in ((half_folder, "prefixkv_paper", SHARES), (full_folder, "full", None)):
        for phase in PHASES:
            found = program_from_graph(load_graph(folder, phase))
            expected = program_of(
                policy_from_name(name), phase=phase, n_layers=len(SHARES), scale=32**-0.5, page_size=32, kept_shares=shares
            )
            assert found == rounded_to_fp32(expected)
            assert load_manifest(folder).programs[phase] == found


def rounded_to_fp32(program: Program) -> Program:
    return tuple(
        tuple(
            type(node)(
                op=node.op,
                attributes={k: float(np.float32(v)) if isinstance(v, float) else v for k, v in node.attributes.items()},
            )
            for node in nodes
        )
        for nodes in program
    )


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_are_valid_onnx_of_opset_23(folder: Path, phase: str) -> None:
    onnx.checker.check_model(folder / "graphs" / f"{phase}.onnx", full_check=True)
    opsets = {opset.domain: opset.version for opset in load_graph(folder, phase).opset_import}
    assert opsets == {"": 23, DOMAIN: OP_VERSION}


def test_segments_are_valid_onnx_without_ops_of_ours(folder: Path) -> None:
    segments = load_manifest(folder).segments
    assert len(segments) == load_manifest(folder).config.n_layers + 1
    for segment in segments:
        path = folder / "graphs" / segment.file
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]


def test_every_attribute_stands_on_the_node(folder: Path) -> None:
    """No default is left out, and inputs and outputs are those of the spec, in its order."""
    for phase in PHASES:
        for node in load_graph(folder, phase).graph.node:
            if node.domain != DOMAIN:
                continue
            spec = op_specs()[node.op_type]
            assert {attribute.name for attribute in node.attribute} == {a.name for a in spec.attributes} | set(
                PLUGIN_ATTRIBUTES
            )
            assert len(node.input) == sum(not tensor.optional for tensor in spec.inputs)
            assert len(node.output) == len(spec.output_names)


def test_both_phases_have_the_same_dense_part(folder: Path) -> None:
    """Node by node: operator, attributes, and the constants it reads, whatever the exporter called them."""

    def dense(phase: str) -> list[tuple[Any, ...]]:
        graph = load_graph(folder, phase).graph
        constants = {weight.name: external_place(weight) for weight in graph.initializer}
        return [
            (node.op_type, [a.SerializeToString() for a in node.attribute], [constants.get(name) for name in node.input])
            for node in graph.node
            if node.domain != DOMAIN
        ]

    assert dense("prefill") == dense("decode")
    assert {op for op, *_ in dense("prefill")} >= {"RMSNormalization", "Gemm", "Gather"}


def external_place(tensor: onnx.TensorProto) -> tuple[str, int | None, int | None] | bytes:
    """Where a tensor's values stand: file, offset and length; small ones are the values themselves."""
    if not uses_external_data(tensor):
        return onnx.numpy_helper.to_array(tensor).tobytes()
    info = ExternalDataInfo(tensor)
    return info.location, info.offset, info.length


def test_big_weights_are_stored_once_beside_the_graphs(folder: Path) -> None:
    """All graphs and segments refer to the same aligned places of one file, which nothing overlaps and nothing outgrows."""
    places = set()
    for path in (folder / "graphs").glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = external_place(tensor)
            if isinstance(place, bytes):
                assert len(place) < 5 * 4096
            else:
                places.add(place)
    assert {location for location, _, _ in places} == {WEIGHTS_FILE}
    spans = sorted((offset or 0, length or 0) for _, offset, length in places)
    assert all(offset % 4096 == 0 for offset, _ in spans)
    ends = [offset + length for offset, length in spans]
    assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
    assert ends[-1] == (folder / "graphs" / WEIGHTS_FILE).stat().st_size


def test_no_file_of_an_engine_names_this_machine(full_folder: Path, half_folder: Path) -> None:
    secrets = {str(ROOT), str(Path.home()), "site-packages", str(full_folder.parent.parent), f"/home/{getpass.getuser()}"}
    for folder in (full_folder, half_folder):
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert [secret for secret in secrets if secret.encode() in content] == [], path


def reference_op(spec: OpSpec) -> type[OpRun]:
    """The op for ONNX's own interpreter: the spec's reference on copies of the states."""

    def run(_self: OpRun, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        given = [tensor for tensor in spec.inputs if not tensor.optional]
        named = {t.name: a.copy() if t.state else a for t, a in zip(given, inputs, strict=True)}
        results = kernel(spec.name, "reference")(**named, **{a.name: attributes[a.name] for a in spec.attributes})
        return (*results, *(named[state.name] for state in spec.states))

    return type(spec.name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


class MonolithicRun:
    """One sequence through the whole graphs in ONNX's interpreter, the states carried from output to input."""

    def __init__(self, folder: Path) -> None:
        manifest = load_manifest(folder)
        ops = [reference_op(spec) for spec in op_specs().values()]
        self._graphs = {
            phase: ReferenceEvaluator(onnx.load(folder / "graphs" / f"{phase}.onnx"), new_ops=ops) for phase in PHASES
        }
        config = manifest.config
        pool = HostKvPool(n_pages=60, page_size=manifest.page_size, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
        pool.kv[:] = np.nan
        pool.scores[:] = np.nan
        pool.token_positions[:] = -(2**40)
        self.sequence = SequenceCache(pool, n_layers=config.n_layers)
        self._states = {
            f"{name}_{layer}": getattr(pool, name)
            for name in ("kv", "token_positions", "scores")
            for layer in range(config.n_layers)
        }
        self.kept_shares = manifest.kept_shares

    def step(self, phase: str, ids: Sequence[int], *, remaining: int = 0) -> np.ndarray:
        """Logits [N, V]; ``remaining`` prompt tokens follow. The last chunk of a prompt evicts."""
        graph, n, first = self._graphs[phase], len(ids), self.sequence.num_computed_tokens
        slots = self.sequence.append(n)
        values = {
            "input_ids": np.array(ids),
            "positions": np.arange(first, first + n),
            "logit_rows": np.arange(n),
            "cu_tokens": np.array([0, n]),
            "slots": slots,
            "page_table": self.sequence.page_table[:, None],
            "kv_len": self.sequence.kv_len[:, None],
            "evict": np.array([int(remaining == 0)]),
            "prompt_remaining": remaining + np.arange(n)[::-1],
            **self._states,
        }
        outputs = graph.run(None, {name: values[name] for name in graph.input_names})
        named = dict(zip(graph.output_names, outputs, strict=True))
        self._states |= {name.removesuffix("_out"): value for name, value in named.items() if name.endswith("_out")}
        if phase == "prefill" and remaining == 0:
            kept = [int(named[f"kept_{layer}"][0]) for layer in range(self.sequence.n_layers)]
            self.sequence.shrink(np.array(kept), self.kept_shares)
        logits: np.ndarray = named["logits"]
        return logits


def test_the_monolithic_graphs_compute_what_the_engine_computes(small_folder: Path, small_engine: Engine) -> None:
    """Two chunks of prefill, eviction, 12 decode steps: ONNX's interpreter with the ops' references against the engine."""
    prompt, generated = random_ids(small_engine, 24, seed=1), random_ids(small_engine, 12, seed=2)
    graph = MonolithicRun(small_folder)
    ours = [graph.step("prefill", prompt[:14], remaining=10), graph.step("prefill", prompt[14:])]
    ours += [graph.step("decode", [token_id]) for token_id in generated]
    runner = small_engine.runner
    sequence = runner.new_sequence()
    theirs = [runner.prefill(sequence, prompt, all_logits=True)]
    theirs += [runner.decode([sequence], [token_id]) for token_id in generated]
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=1e-4)
    assert graph.sequence.kv_len.tolist() == sequence.kv_len.tolist()
    sequence.release()
    assert_nothing_leaked(small_engine)


@pytest.mark.parametrize("sample", ["llama3-rope", "llama-biases", "qwen3"])
def test_segments_of_every_kind_of_model_equal_the_torch_decoder(sample: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / sample, sample))
    config = checkpoint.config
    scale = config.scale
    programs = {
        phase: program_of(policy_from_name("full"), phase=phase, n_layers=config.n_layers, scale=scale, page_size=7)
        for phase in PHASES
    }
    save_graphs({"decode": graph_from_checkpoint(checkpoint, programs["decode"], page_size=7)}, tmp_path)
    models, segments, ports = segments_from_graph(onnx.load(tmp_path / "decode.onnx", load_external_data=False))
    save_segments(models, segments, tmp_path)
    pool = HostKvPool(n_pages=90, page_size=7, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
    logits = []
    executors = (
        OnnxRuntimeExecutor(tmp_path, segments, ports, n_threads=1),
        TorchDecoderExecutor(decoder_from_checkpoint(checkpoint)),
    )
    for executor in executors:
        runner = host_runner(executor, pool, programs, chunk=16)
        sequence = runner.new_sequence()
        ids = [int(i) for i in np.random.default_rng(0).integers(0, config.vocab_size, 50)]
        steps = [runner.prefill(sequence, ids[:45], all_logits=True)]
        steps += [runner.decode([sequence], [token_id]) for token_id in ids[45:]]
        logits.append(np.concatenate(steps))
        sequence.release()
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def attention_graph(*, parallel: bool, typed: bool) -> onnx.ModelProto:
    """Two attentions, one after the other or side by side, with or without the types of the values between them."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = []
    for layer in range(2):
        source = "x" if parallel or layer == 0 else "out_0"
        nodes += [helper.make_node("Neg", [source], [f"q_{layer}"])]
        inputs, outputs = [f"q_{layer}"] * 3, [f"out_{layer}"]
        nodes += [helper.make_node("CachedAttention", inputs, outputs, domain=DOMAIN, layer=layer)]
    nodes += [helper.make_node("Add", ["out_0", "out_1"], ["y"])]
    infos = [helper.make_tensor_value_info(name, kind, ["N"]) for name in ("q_0", "q_1", "out_0", "out_1")]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", kind, ["N"])],
        [helper.make_tensor_value_info("y", kind, ["N"])],
        value_info=infos if typed else [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)])


def test_a_graph_is_cut_at_its_attentions() -> None:
    models, segments, ports = segments_from_graph(attention_graph(parallel=False, typed=True))
    assert [[node.op_type for node in model.graph.node] for model in models] == [["Neg"], ["Neg"], ["Add"]]
    assert [(segment.inputs, segment.outputs) for segment in segments] == [
        (("x",), ("q_0",)),
        (("out_0",), ("q_1",)),
        (("out_0", "out_1"), ("y",)),
    ]
    assert [(port.q, port.out) for port in ports] == [("q_0", "out_0"), ("q_1", "out_1")]


def test_a_graph_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(EngineError, match="do not follow one another"):
        segments_from_graph(attention_graph(parallel=True, typed=True))
    with pytest.raises(EngineError, match="has no types for values"):
        segments_from_graph(attention_graph(parallel=False, typed=False))


@pytest.mark.parametrize("changes", [{"kept": 0.4}, {"budget": "uniform"}], ids=str)
def test_a_recipe_for_another_policy_builds_nothing(bundled_checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    request = prefixkv_request(bundled_checkpoint, SHARES, budget=0.5)
    with pytest.raises(RecipeError, match="the recipe is not for policy 'prefixkv_paper'"):
        dataclasses.replace(request, policy=dataclasses.replace(request.policy, **changes))


def test_impossible_requests_build_nothing(bundled_checkpoint: Checkpoint) -> None:
    for page_size in (0, bundled_checkpoint.config.max_positions + 1):
        with pytest.raises(UsageError, match="the page size is out of range"):
            EngineRequest(checkpoint=bundled_checkpoint, policy=policy_from_name("full"), page_size=page_size)
    EngineRequest(checkpoint=bundled_checkpoint, policy=policy_from_name("full"), page_size=1)
    EngineRequest(
        checkpoint=bundled_checkpoint, policy=policy_from_name("full"), page_size=bundled_checkpoint.config.max_positions
    )
    with pytest.raises(RecipeError, match="needs a recipe"):
        EngineRequest(checkpoint=bundled_checkpoint, policy=policy_from_name("prefixkv_paper"))


def test_examples_do_not_grow_with_the_pages(small_checkpoint_folder: Path) -> None:
    """The tensors of a page of a billion tokens would not fit into any memory."""
    checkpoint, page_size = open_checkpoint(small_checkpoint_folder), 10**9
    config = checkpoint.config
    program = program_of(
        policy_from_name("h2o"), phase="prefill", n_layers=config.n_layers, scale=config.scale, page_size=page_size
    )
    graph = graph_from_checkpoint(checkpoint, program, page_size=page_size)
    (kv,) = [value for value in graph.graph.inputs if value.name == "kv_0"]
    assert kv.shape is not None
    assert page_size in list(kv.shape)


def test_a_checkpoint_without_tokenizer_makes_no_engine(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    request = EngineRequest(checkpoint=open_checkpoint(folder), policy=policy_from_name("full"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        build_engine(request, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
