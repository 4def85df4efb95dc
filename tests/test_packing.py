"""Matrices in blocks of integers: the layout of ONNX Runtime, with no greater error than its own quantiser has."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trt_kv.errors import UsageError
from trt_kv.export.packing import block_format, packed, packed_bits, unpacked
from trt_kv.manifest import Quantization
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.weight_index import BlockFormat

FORMATS = [(bits, block_size, zeros) for bits in (4, 8) for block_size in (16, 32, 128) for zeros in (False, True)]


def how(bits: int = 4, block_size: int = 32, zero_points: bool = True) -> BlockFormat:
    return BlockFormat(bits=bits, block_size=block_size, zero_points=zero_points, offsets=False)


@pytest.mark.parametrize(("bits", "block_size", "zeros"), FORMATS)
def test_the_error_is_at_most_that_of_onnxruntimes_quantiser(bits: int, block_size: int, zeros: bool) -> None:
    rng = np.random.default_rng(bits * block_size + zeros)
    x_NK = (rng.standard_t(4, size=(40, 384)) * rng.lognormal(size=(40, 1))).astype(np.float32)
    n_blocks = 384 // block_size
    blocks = np.zeros((40, n_blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros(40 * n_blocks, np.float32)
    zero_points = np.zeros((40, -(-n_blocks * bits // 8)), np.uint8)
    theirs_of = ort.capi._pybind_state
    quantise = {4: theirs_of.quantize_matmul_4bits, 8: theirs_of.quantize_matmul_8bits}[bits]
    quantise(blocks, np.ascontiguousarray(x_NK.T), scales, zero_points.reshape(-1), block_size, 40, 384, not zeros)
    zero = unpacked(zero_points, bits)[:, :n_blocks, None].astype(np.float32) if zeros else np.float32(2 ** (bits - 1))
    theirs = (unpacked(blocks, bits).astype(np.float32) - zero) * scales.reshape(40, n_blocks, 1)
    ours = packed(x_NK, how(bits, block_size, zeros))
    assert (unpacked(ours.blocks, bits) == unpacked(blocks, bits)).mean() > 0.99
    errors = [float(np.square(values.reshape(40, 384) - x_NK).sum()) for values in (ours.values(), theirs)]
    assert errors[0] < errors[1]


@given(arrays(np.float32, (3, 64), elements=st.floats(-1e4, 1e4, width=32)), st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_stay_near_whatever_they_are(x_NK: np.ndarray, bits: int, zeros: bool) -> None:
    matrix = packed(x_NK, how(bits, 32, zeros))
    values = matrix.values()
    assert np.isfinite(values).all()
    x_NMS = x_NK.reshape(3, 2, 32)
    step = np.abs(x_NMS).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (np.abs(values.reshape(3, 2, 32) - x_NMS) <= 1.6 * step + 1e-6).all()
    assert (values.reshape(3, 2, 32)[(x_NMS == 0).all(-1)] == 0).all()


def test_integers_are_packed_the_earlier_one_low() -> None:
    q = np.arange(1, 6, dtype=np.uint8)
    assert packed_bits(q, 4).tolist() == [0x21, 0x43, 0x05]
    assert unpacked(packed_bits(q, 4), 4).tolist() == [1, 2, 3, 4, 5, 0]


def test_rows_take_the_largest_blocks_that_they_are_a_multiple_of() -> None:
    def found(n_columns: int) -> int | None:
        quantization = Quantization(bits=4, block_size=128, symmetric=True, accuracy_level=4)
        chosen = block_format(n_columns, quantization)
        return None if chosen is None else chosen.block_size

    assert [found(n) for n in (4096, 576, 1536, 48, 16, 24)] == [128, 64, 128, 16, 16, None]


def test_large_matrices_are_quantised_in_pieces() -> None:
    x_NK = np.ones((8192, 1024), np.float32)
    tracemalloc.start()
    packed(x_NK, how())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x_NK.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bad bits of a weight"),
        ({"block_size": 48}, "bad block size"),
        ({"accuracy_level": 5}, "bad accuracy level"),
        ({"bits": 8, "accuracy_level": 0}, "activations in int8 only"),
    ],
    ids=str,
)
def test_other_quantisations_are_refused(change: dict[str, int], message: str) -> None:
    fields: dict[str, int] = {"bits": 4, "block_size": 32, "accuracy_level": 4, **change}
    with pytest.raises(UsageError, match=message):
        Quantization(symmetric=True, **fields).check(UsageError)
