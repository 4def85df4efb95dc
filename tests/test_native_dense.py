"""Dense layers in kernels of our own: what the decoder computes with rounded activations, in every family, row by row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from tests.checkpoints import _SIZES, FAMILY_SAMPLES, SAMPLES
from tests.packed_reference import product
from trt_kv.decoder import Decoder
from trt_kv.errors import UsageError
from trt_kv.export.packing import PackedMatrix, packed
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.packed_weights import PackedWeights
from trt_kv.plugins.paging import Floats
from trt_kv.rotation import RotaryEmbedding
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.native.executor import NativeExecutor
from trt_kv.runtime.backends.host.native.weights import Weights
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.weight_index import BlockFormat

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = [
    BlockFormat(bits=bits, block_size=16, zero_points=zeros, offsets=offsets)
    for bits, zeros, offsets in ((4, False, True), (8, False, False), (4, True, False))
]


def config_of(sample: str) -> ModelConfig:
    fields = {**_SIZES, **{**SAMPLES, **FAMILY_SAMPLES}[sample]}
    if fields.get("head_dim") == 12:
        fields["head_dim"] = 8  # rows of whole blocks
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    return model_config_from_hf(config.to_dict(), source="config.json")


def matrix_of(values: Floats, how: BlockFormat, rng: np.random.Generator) -> PackedMatrix:
    matrix = packed(values, dataclasses.replace(how, offsets=False))
    if not how.offsets:
        return matrix
    spread = np.float32(0.2 * values.std())
    return dataclasses.replace(matrix, offsets=spread * rng.standard_normal(matrix.scales.shape, np.float32))


class Model:
    """Random weights of a config, in blocks of several formats, for both executors."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(3)
        self.values: dict[str, Floats] = {}
        vectors: dict[str, Floats] = {}
        matrices: dict[str, PackedMatrix] = {}
        for number, (name, shape) in enumerate(config.tensor_shapes().items()):
            noise = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                vectors[name] = self.values[name] = np.float32(not name.endswith("bias")) + np.float32(0.3) * noise
            else:
                spread = np.float32(2 / shape[1] ** 0.5)
                matrices[name] = matrix_of(spread * noise, FORMATS[number % len(FORMATS)], rng)
                self.values[name] = matrices[name].values()
        self.matrices = {
            name.removesuffix(".weight"): PackedWeights(bits=matrix.bits, **matrix.parts, **_bias(vectors, name))
            for name, matrix in matrices.items()
        }
        ends = np.cumsum([0, *map(len, vectors.values())]).tolist()
        places = dict(zip(vectors, ends, strict=False))
        weights = Weights(matrices=self.matrices, constants=np.concatenate([*vectors.values()]), places=places)
        self.native = NativeExecutor(config, weights)
        self.config = config

    def reference(self) -> DenseExecutor:
        """The decoder in torch, whose products are those of ``tests/packed_reference.py``."""
        with torch.device("meta"):
            decoder = Decoder(self.config)
        named = {name: torch.from_numpy(values) for name, values in self.values.items()}
        decoder.load_state_dict(named, assign=True)
        decoder.requires_grad_(requires_grad=False)
        decoder.rotary = RotaryEmbedding(self.config.rope, self.config.head_dim)
        if self.config.local_rope is not None:
            decoder.local_rotary = RotaryEmbedding(self.config.local_rope, self.config.head_dim)
        by_address = {named[f"{name}.weight"].data_ptr(): matrix for name, matrix in self.matrices.items()}

        def decode(*arguments: Any) -> torch.Tensor:
            with RoundedProducts(by_address):
                logits: torch.Tensor = decoder(*arguments)
            return logits

        return TorchDecoderExecutor(decode)


def _bias(vectors: dict[str, Floats], name: str) -> dict[str, Any]:
    bias = vectors.get(f"{name.removesuffix('.weight')}.bias")
    return {} if bias is None else {"bias": bias}


class RoundedProducts(TorchFunctionMode):
    """Replaces products with matrices, by the address of their values."""

    def __init__(self, matrices: dict[int, PackedWeights]) -> None:
        super().__init__()
        self._matrices = matrices

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return torch.from_numpy(product(args[0].numpy(), self._matrices[args[1].data_ptr()]))
        return func(*args, **(kwargs or {}))


def mixed(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
    """In place of attention: what is computed of each token depends on that token alone, and on all that it is given."""
    group = q.shape[1] // v.shape[1]
    return v.repeat(group, axis=1) + np.float32(0.1) * q * k.repeat(group, axis=1)


def run(dense: DenseExecutor, ids: np.ndarray, logit_rows: np.ndarray) -> Floats:
    return dense.run(ids, ids * 3 % 101, logit_rows, mixed)


@pytest.mark.parametrize("sample", [*SAMPLES, *FAMILY_SAMPLES])
def test_every_family_is_computed_as_its_decoder_computes_it(sample: str) -> None:
    """Nearly every row within the rounding of fp32. A number that is halfway between two integers may be rounded either way,
    which changes the rest of its row by as much as rounding does.
    """
    model = Model(config_of(sample))
    ids = np.arange(30) * 7 % model.config.vocab_size
    rows = np.arange(len(ids))[::-2].copy()
    wanted = run(model.reference(), ids, rows)
    errors = np.abs(run(model.native, ids, rows) - wanted).max(axis=1) / wanted.std()
    assert np.median(errors) < 1e-4
    assert errors.max() < 0.2


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(config_of("gemma3"))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), n_rows=st.integers(1, 40))
def test_a_row_has_the_same_bits_in_any_number_of_rows(model: Model, data: st.DataObject, n_rows: int) -> None:
    ids = np.arange(40) * 7 % model.config.vocab_size
    whole = run(model.native, ids, np.arange(40))
    chosen = np.array(data.draw(st.lists(st.integers(0, 39), min_size=n_rows, max_size=n_rows)))
    logit_rows = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), max_size=n_rows)), np.int64)
    np.testing.assert_array_equal(run(model.native, ids[chosen], logit_rows), whole[chosen[logit_rows]])


def test_results_are_the_callers_own(model: Model) -> None:
    """Nothing that a step returned, or passed to attention, changes in a later step."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        seen.extend((array, array.copy()) for array in (q, k, v))
        return mixed(layer, q, k, v)

    for ids in (np.arange(8), np.arange(8) + 9):
        logits = model.native.run(ids, np.arange(8), np.arange(8), attend)
        seen.append((logits, logits.copy()))
    for array, copy in seen:
        np.testing.assert_array_equal(array, copy)


def test_numbers_that_would_be_read_out_of_bounds_are_refused(model: Model) -> None:
    for ids, rows in (([0, model.config.vocab_size], [0]), ([-1], [0]), ([0], [1]), ([0], [-1])):
        with pytest.raises(UsageError, match="out of range"):
            run(model.native, np.array(ids), np.array(rows))
