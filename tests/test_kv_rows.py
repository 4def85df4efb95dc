"""Stored rows of a KV cache: in numpy and in kernels."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trt_kv.errors import UsageError
from trt_kv.manifest import KV_DTYPES
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import KvDtype, dtype_of, head_size_of, load, number, put, scale_of, store

BOUND = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}
"""Largest error of a number, as a share of the row's largest absolute value."""


@njit(fastmath={"contract", "reassoc"})
def loaded_by_kernel(rows_NW: Any, values_ND: Any) -> None:
    for n in range(len(values_ND)):
        scale = scale_of(rows_NW[n])
        for d in range(values_ND.shape[1]):
            values_ND[n, d] = scale * number(rows_NW[n, d])


@njit()
def stored_by_kernel(values_ND: Any, rows_NW: Any) -> None:
    for n in range(len(values_ND)):
        put(rows_NW[n], values_ND[n])


@pytest.mark.parametrize("name", KV_DTYPES)
@given(values=arrays.arrays(np.float32, (2, 5), elements=st.floats(width=32) | st.floats(-9, 9, width=32)))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_kernels_store_the_same_bits(name: str, values: Any) -> None:
    """Of any numbers, the largest, the smallest and those that are none among them."""
    values[np.isnan(values)] = np.nan  # one NaN: what a conversion makes of its payload is not said
    rows = np.empty((2, KvDtype(name).row_length(5)), KvDtype(name).stored_as)
    stored_by_kernel(values, rows)
    np.testing.assert_array_equal(rows.view(np.uint8), store(values, KvDtype(name)).view(np.uint8))


@pytest.mark.parametrize("name", KV_DTYPES)
@given(values=arrays.arrays(np.float32, (3, 7), elements=st.floats(-1e4, 1e4, width=32)))
@settings(max_examples=50, deadline=None)
def test_a_row_is_within_the_rounding_of_its_type_and_kernels_load_the_same_numbers(name: str, values: Any) -> None:
    rows = store(values, KvDtype(name))
    assert (rows.dtype, rows.shape) == (KvDtype(name).stored_as, (3, KvDtype(name).row_length(7)))
    assert (dtype_of(rows).name, head_size_of(rows)) == (name, 7)
    loaded = load(rows)
    tiny = 2.0**-24 if name == "float16" else 2.0**-133  # steps of the smallest numbers
    assert (np.abs(loaded - values) <= BOUND[name] * (1 + 1e-5) * np.abs(values).max(axis=1, keepdims=True) + tiny).all()
    in_kernel = np.empty_like(values)
    loaded_by_kernel(rows, in_kernel)
    np.testing.assert_array_equal(in_kernel, loaded)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_round_as_torch_does(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((50, 64), np.float32) * np.float32(7)
    expected = torch.from_numpy(values).to(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(load(store(values, KvDtype(name))), expected)


@pytest.mark.parametrize("name", KV_DTYPES)
def test_odd_rows(name: str) -> None:
    dtype = KvDtype(name)
    rows = np.array([[0, 0, 0], [np.nan, 1, 2], [-3, 0, 3]], np.float32)
    loaded = load(store(rows, dtype))
    assert (loaded[0] == 0).all()
    assert np.isnan(loaded[1]).any()
    np.testing.assert_allclose(loaded[2], rows[2], rtol=1e-6)
    assert load(store(np.empty((0, 4), np.float32), dtype)).shape == (0, 4)
    copies = np.concatenate([store(rows[2:], dtype)] * 2)
    np.testing.assert_array_equal(load(copies)[1], load(copies)[0])


def test_float16_saturates_and_unknown_types_are_refused() -> None:
    assert load(store(np.array([[1e6, -1e6]], np.float32), KvDtype("float16"))).tolist() == [[65504, -65504]]
    with pytest.raises(UsageError, match="unsupported type of the KV cache"):
        KvDtype("fp8")
