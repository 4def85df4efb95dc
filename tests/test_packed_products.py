"""Products with packed weights: the bits of a plain reference, in any number of rows and with any number of threads."""

import os
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packed_reference import product, random_weights
from trt_kv.errors import EngineError
from trt_kv.export.packing import PackedMatrix
from trt_kv.plugins.packed_products import RoundedRows, gather_packed, multiply_packed, round_activations, rounded_rows
from trt_kv.plugins.packed_weights import PackedWeights, weight_table
from trt_kv.plugins.paging import Floats

FORMATS = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([4, 8]),
        "block_size": st.sampled_from([16, 32, 64, 128]),
        "zeros": st.booleans(),
        "offsets": st.booleans(),
        "bias": st.booleans(),
    }
)
SIZES = st.fixed_dictionaries({"n_columns": st.integers(1, 70), "n_blocks": st.integers(1, 21), "seed": st.integers(0, 99)})


def activations(n_rows: int, n_inputs: int, seed: int) -> Floats:
    """Rows of very different sizes, some units of which are zero."""
    rng = np.random.default_rng(seed)
    x_RK = rng.standard_normal((n_rows, n_inputs), np.float32) * rng.lognormal(0, 4, (n_rows, 1)).astype(np.float32)
    x_RK[:, : rng.integers(0, 40)] = 0
    return x_RK


def products(x_RK: Floats, *matrices: PackedWeights) -> Floats:
    """Of one region, into poisoned memory; the activations were rounded into memory that other rows had used."""
    rows: RoundedRows = rounded_rows(len(x_RK) + 1, x_RK.shape[1] + 300)
    rows.values[:] = 77
    for part in rows[1:]:
        part[:] = np.nan
    round_activations(x_RK, rows)
    out = np.full((len(x_RK), sum(matrix.n_columns for matrix in matrices) + 3), np.nan, np.float32)[:, 1:-2]
    table = weight_table([matrices[0], *matrices])
    multiply_packed(rows, table, 1, len(matrices), out)
    return out


@given(FORMATS, SIZES, st.integers(1, 13))
@settings(deadline=None, max_examples=100)
def test_products_are_those_of_the_reference(how: dict[str, int], sizes: dict[str, int], n_rows: int) -> None:
    weights = random_weights(**sizes, **how)  # type: ignore[arg-type]
    x_RK = activations(n_rows, weights.n_inputs, sizes["seed"])
    np.testing.assert_array_equal(products(x_RK, weights), product(x_RK, weights))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_company(n_threads: int) -> None:
    """Several matrices of different formats in one region, with few rows and with many, some of which are not finite."""
    formats = [(50, 4, 32), (33, 8, 16), (17, 4, 128), (5, 8, 64)]
    matrices = [
        random_weights(n, 384 // size, size, bits, zeros=bits == 4, offsets=size == 32, bias=n == 17, seed=n)
        for n, bits, size in formats
    ]
    x_RK = activations(43, 384, 5)
    expected = np.concatenate([product(x_RK, weights) for weights in matrices], axis=1)
    x_RK[7, 300], x_RK[40, 3] = np.nan, -np.inf
    before = min(numba.get_num_threads(), 2)
    numba.set_num_threads(min(n_threads, before))
    try:
        together = products(x_RK, *matrices)
        assert np.isnan(together[[7, 40]]).all()
        np.testing.assert_array_equal(np.delete(together, [7, 40], 0), np.delete(expected, [7, 40], 0))
        for first, end in ((0, 1), (5, 7), (11, 14), (20, 24), (30, 39)):
            np.testing.assert_array_equal(products(x_RK[first:end], *matrices), together[first:end])
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("extras", [False, True])
def test_gathered_rows_are_the_values_of_the_matrix(bits: int, extras: bool) -> None:
    weights = random_weights(11, 5, 16, bits, zeros=extras, offsets=extras, bias=False, seed=1)
    ids = np.array([3, 10, 0, 3])
    found = np.full((4, weights.n_inputs), np.nan, np.float32)
    gather_packed(weight_table([weights]), 0, ids, found)
    parts = {name: getattr(weights, name) for name in ("zero_points", "offsets")} if extras else {}
    matrix = PackedMatrix(bits=bits, block_size=16, blocks=weights.blocks, scales=weights.scales, **parts)
    np.testing.assert_array_equal(found, matrix.values()[ids])


def test_arrays_that_do_not_fit_are_refused() -> None:
    good: dict[str, Any] = {"bits": 4, "blocks": np.zeros((3, 2, 16), np.uint8), "scales": np.zeros((3, 2), np.float32)}
    PackedWeights(**good)
    for name, bad in {
        "bits": 3,
        "blocks": np.zeros((3, 2, 20), np.uint8),
        "scales": np.zeros((3, 4), np.float32)[:, ::2],
        "zero_points": np.zeros((3, 2), np.uint8),
        "offsets": np.zeros((3, 2), np.float64),
        "bias": np.zeros(2, np.float32),
    }.items():
        with pytest.raises(EngineError, match="do not fit"):
            PackedWeights(**{**good, name: bad})


COMPILE = """
import re, numba
from numba import types as t
from trt_kv.plugins import packed_products as p
rows, table, out, i = numba.typeof(p.rounded_rows(1, 256)), t.int64[:, ::1], t.float32[:, ::1], t.int64
for kernel, counts in ((p._multiply_range, [i] * 3), (p._multiply_lot, [i] * 4)):
    kernel.compile((rows, table, *counts, out))
    code = next(iter(kernel.inspect_asm().values()))
    print("vpdpbusd" in code, "vpmaddubsw" in code)
"""
AVX512 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni"


@pytest.mark.slow
def test_processors_with_vnni_get_its_instruction(tmp_path: Any) -> None:
    """Compiled for another processor than this one, and not run: only the instruction differs from what other tests run."""
    cpu = {"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": AVX512, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**os.environ, **cpu}, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "False"] * 2
