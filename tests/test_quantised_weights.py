"""Engines with quantised weights compute what their dequantised weights say, alone and in company."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch

from tests.engines import build_for_test
from tests.gguf_files import write_sample
from tests.packed_engines import ValuesOnly, logits_of, packed_matrices
from tests.serving import Recorder, prompts_of, steps_changed
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import CheckpointError, EngineError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint, QuantizedBlocks
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.export.gguf_packing import FORMATS, packed_blocks
from trt_kv.export.packed_weights import PackedWeights
from trt_kv.manifest import Quantization, load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.cuda import load as cuda_load
from trt_kv.runtime.backends.devices import DeviceOptions
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions

pytestmark = pytest.mark.usefixtures("one_thread")

INT4 = Quantization(bits=4, block_size=32, symmetric=False, accuracy_level=0)
INT8 = Quantization(bits=8, block_size=32, symmetric=True, accuracy_level=4)
EMBEDDING = "model.embed_tokens.weight"
Build = Callable[..., Path]


@pytest.fixture
def build(small_checkpoint_folder: Path, tmp_path: Path) -> Build:
    def build_one(
        name: str, quantization: Quantization | None, checkpoint: Checkpoint | None = None, *, share: bool = False
    ) -> Path:
        opened = checkpoint or open_checkpoint(small_checkpoint_folder)
        request = EngineRequest(checkpoint=opened, policy=policy_from_name("full"), page_size=5, quantization=quantization)
        return build_for_test(request, tmp_path / name, share=share)

    return build_one


def dense_of(engine: Path) -> OnnxRuntimeExecutor:
    manifest = load_manifest(engine)
    return OnnxRuntimeExecutor(engine / "graphs", manifest.segments, manifest.attention_ports, n_threads=1)


def dense_in(engine: Engine) -> DenseExecutor:
    executor = engine.runner._executor
    assert isinstance(executor, SplitStepExecutor)
    return executor.dense


def ids_of(engine: Path, n_tokens: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, load_manifest(engine).config.vocab_size, n_tokens)


@pytest.mark.parametrize(("quantization", "allowed"), [(INT4, 1e-5), (INT8, 0.05)], ids=["int4", "int8"])
def test_logits_are_those_of_the_dequantised_weights(
    quantization: Quantization, allowed: float, build: Build, small_checkpoint_folder: Path
) -> None:
    """With biases, and a head of its own. With activations in int8 within their rounding, relative to the logits' spread."""
    engine = build("packed", quantization)
    matrices = packed_matrices(engine)
    assert {matrix.bits for matrix in matrices.values()} == {quantization.bits}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= matrices.keys()
    stored = open_checkpoint(small_checkpoint_folder)
    values = {name: matrix.values() for name, matrix in matrices.items()}
    for name, matrix in values.items():
        original = stored.tensor(name).float().numpy()
        assert np.abs(matrix - original).mean() < 0.12 * original.std()
    expected = build("values", None, ValuesOnly(stored, values))
    ids = ids_of(engine, 11)
    got, wanted = logits_of(dense_of(engine), ids), logits_of(dense_of(expected), ids)
    assert (got - wanted).std() < allowed * wanted.std()
    assert load_manifest(engine).quantization == quantization


@pytest.mark.parametrize(
    ("sample", "scheme", "level", "allowed"),
    [("llama", "Q4_0", 0, 1e-5), ("llama-tied-biases", "Q4_1", 0, 1e-5), ("phi3", "Q8_0", 4, 0.05)],
)
def test_blocks_of_a_gguf_file_are_not_rounded_again(
    sample: str, scheme: str, level: int, allowed: float, build: Build, tmp_path: Path
) -> None:
    """Dequantised, they are the file's values bit by bit; tied, with biases, with minima, and in fused matrices."""
    checkpoint = open_checkpoint(write_sample(tmp_path / "model.gguf", sample, scheme=scheme))
    engine = build("packed", dataclasses.replace(INT4, accuracy_level=level), checkpoint)
    matrices = packed_matrices(engine)
    shapes = checkpoint.config.tensor_shapes()
    assert matrices.keys() == {name for name, shape in shapes.items() if len(shape) == 2 and np.prod(shape) > 4096}
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(matrix.values(), checkpoint.tensor(name).numpy())
    ids = ids_of(engine, 11)
    got = logits_of(dense_of(engine), ids)
    wanted = logits_of(dense_of(build("values", None, checkpoint)), ids)
    assert (got - wanted).std() < allowed * wanted.std()


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q4_k", "q6_k", "q8_0"])
def test_any_blocks_have_the_values_that_the_gguf_package_reads(scheme: str) -> None:
    """Blocks of random bytes, whose halves of 16 bits are made finite. Values with a minimum within a rounding of fp32."""
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(7).integers(0, 256, (30, 3, n_bytes), dtype=np.uint8)
    for place in {"q4_0": [0], "q4_1": [0, 2], "q4_k": [0, 2], "q6_k": [208], "q8_0": [0]}[scheme]:
        blocks[..., place + 1] &= 0b10111011
    blocks[3, 1, :4] = 0
    expected = gguf.dequantize(blocks.reshape(30, -1), kind)
    matrix = packed_blocks(QuantizedBlocks(scheme=scheme, blocks=blocks, shape=(30, 3 * n_values)))
    how = FORMATS[scheme]
    assert {name: part.shape for name, part in matrix.parts.items()} == how.part_shapes((30, 3 * n_values))
    if matrix.offsets is not None:
        largest = np.abs(matrix.scales).max() * 15 + np.abs(matrix.offsets).max()
        np.testing.assert_allclose(matrix.values(), expected, rtol=0, atol=2**-23 * largest)
    else:
        np.testing.assert_array_equal(matrix.values(), expected)


def test_other_blocks_of_a_gguf_file_are_rounded_to_enough_bits(tmp_path: Path) -> None:
    """Those of more than 4 bits and a half to 8; those of another size as asked for; below level 4 none have 8."""

    def formats(scheme: str, quantization: Quantization) -> set[tuple[int, int, bool]]:
        checkpoint = open_checkpoint(write_sample(tmp_path / f"{scheme}.gguf", scheme=scheme))
        weights = PackedWeights(checkpoint, quantization)
        for name in weights.formats:
            assert weights.part(name, "blocks").shape == weights.shapes(name)["blocks"]
        return {(how.bits, how.block_size, how.offsets) for how in weights.formats.values()}

    level_4 = dataclasses.replace(INT4, accuracy_level=4)
    assert formats("Q5_1", level_4) == {(8, 32, False)}
    assert formats("F16", level_4) == {(4, 32, False)}
    assert formats("Q4_1", level_4) == formats("Q4_1", INT8) == formats("Q4_1", INT4) == {(4, 32, True)}
    assert formats("Q4_1", dataclasses.replace(level_4, block_size=16)) == {(4, 16, False)}
    assert formats("Q8_0", INT4) == set()


def test_weights_without_a_value_cannot_be_quantised(small_checkpoint_folder: Path) -> None:
    stored = open_checkpoint(small_checkpoint_folder)
    broken = stored.tensor(EMBEDDING).float().numpy().copy()
    broken[3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has values that cannot be quantised"):
        PackedWeights(ValuesOnly(stored, {EMBEDDING: broken}), INT4).part(EMBEDDING, "blocks")


def test_tied_blocks_are_stored_once_and_graphs_are_valid(build: Build, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sample(tmp_path / "model.gguf", "llama-tied-biases", scheme="Q4_1"))
    engine = build("tied", INT4, checkpoint)
    places = {}
    for path in (engine / "graphs").glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                places[tensor.name] = int(entries.get("offset", 0)), int(entries["length"])
    assert places[f"{EMBEDDING}.rows"] == places[f"{EMBEDDING}.blocks"]
    assert places.keys() == {f"{EMBEDDING}.rows"} | {
        f"{name}.{part}" for name in packed_matrices(engine) for part in ("blocks", "scales", "offsets")
    }
    ends = sorted(offset + length for offset, length in set(places.values()))
    assert ends[-1] == (engine / "graphs" / "weights.data").stat().st_size


def test_engines_of_one_quantisation_share_their_weights(build: Build) -> None:
    engines = [build("first", INT4, share=True), build("second", INT4, share=True), build("third", INT8, share=True)]
    first, second, third = ((engine / "graphs/weights.data").stat().st_ino for engine in engines)
    assert first == second
    assert third != first
    assert build("whole", None, share=True).joinpath("graphs/weights.data").stat().st_ino not in (first, third)


@pytest.fixture
def loaded(build: Build) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []
    folders: dict[Quantization, Path] = {}

    def load(quantization: Quantization, batch_invariant: bool | None = None) -> Engine:
        if quantization not in folders:
            folders[quantization] = build(f"packed {len(folders)}", quantization)
        engines.append(
            Engine.load(folders[quantization], cache_tokens=900, n_threads=1, chunk=16, batch_invariant=batch_invariant)
        )
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    "quantization", [INT4, dataclasses.replace(INT4, accuracy_level=4), INT8], ids=["level 0", "level 4", "int8"]
)
def test_requests_get_the_same_logits_alone_and_in_company(quantization: Quantization, loaded: Callable[..., Engine]) -> None:
    engine = loaded(quantization)
    prompts = prompts_of(engine, (37, 5, 16, 1, 50))
    together = Recorder()
    with steps_changed(engine, together):
        results = engine.generate_batch(prompts, max_new_tokens=7)
    for prompt, result, logits in zip(prompts, results, together.logits.values(), strict=True):
        alone = Recorder()
        with steps_changed(engine, alone):
            assert engine.generate(prompt, max_new_tokens=7).token_ids == result.token_ids
        assert list(alone.logits.values()) == [logits]


def test_rows_are_added_only_where_they_are_needed_and_wanted(loaded: Callable[..., Engine]) -> None:
    """Products of one row in fp32 sum in another order than those of several, on every CPU known."""
    engine = loaded(INT4)
    dense = dense_in(engine)
    if "in groups of" not in engine.runner.description:
        pytest.skip("rows of this CPU do not depend on their number")
    as_it_is = loaded(INT4, batch_invariant=False)
    assert "in groups of" not in as_it_is.runner.description
    ids = np.arange(5) + 40
    alone = logits_of(dense, ids[:1])
    assert np.array_equal(alone, logits_of(dense, ids)[:1])
    assert not np.array_equal(logits_of(dense_in(as_it_is), ids[:1]), alone)
    with pytest.raises(UsageError, match="bad batch_invariant"):
        loaded(INT4, batch_invariant="yes")


def test_gpus_and_other_types_refuse_quantised_weights(build: Build, small_checkpoint_folder: Path) -> None:
    engine = build("packed", INT8)
    with pytest.raises(UsageError, match="has quantised weights, which run on a CPU only"):
        cuda_load.load(engine, load_manifest(engine), LoadOptions(), DeviceOptions(), torch.device("cpu"), lambda *_: None)
    checkpoint = open_checkpoint(small_checkpoint_folder)
    with pytest.raises(UsageError, match="quantised weights are for ONNX Runtime on a CPU"):
        EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), dtype="float16", quantization=INT8)


def test_inspect_tells_each_type(build: Build) -> None:
    told = describe_engine(build("packed", INT8))
    assert "int8 in blocks of 16, symmetric: " in told
    assert "computes  in float32, products with quantised weights of activations in int8" in told
    assert "runs      dense layers in ONNX Runtime, because of model." in told


def test_a_damaged_index_of_blocks_is_refused(build: Build) -> None:
    engine = build("packed", INT8)
    path = engine / "graphs" / "weights.json"
    original = path.read_text()
    for old, new in (
        ('"bits": 8', '"bits": 5'),
        ('"block_size": 16', '"block_size": 32'),
        ('"offsets": [', '"offsets": [-4, '),
    ):
        assert old in original
        path.write_text(original.replace(old, new, 1))
        with pytest.raises(EngineError, match="does not match the model's weights"):
            packed_matrices(engine)
