"""Every implementation of every op agrees with its reference on every case of its spec."""

import copy
import dataclasses
import importlib
from dataclasses import MISSING
from typing import Any, get_origin, get_type_hints

import numpy as np
import pytest

from trt_kv.manifest import KV_DTYPES
from trt_kv.opspec import Case, OpSpec, TensorSpec
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.registry import IMPLEMENTATIONS, kernel, op_specs
from trt_kv.plugins.tensors import Array

SPECS = op_specs()
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS.values() for case in spec.cases]
STORED_AS = [pytest.param(name, marks=pytest.mark.slow if "float16" in name else ()) for name in KV_DTYPES]
"""Kernels of a type take long to compile; those of float32 and int8 differ the most."""
KERNELS = [name for name in IMPLEMENTATIONS if name != "reference"]


def run(spec: OpSpec, implementation: str, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """All outputs by name, updated states included."""
    inputs = copy.deepcopy(inputs)
    results = kernel(spec.name, implementation)(**inputs)
    return dict(zip(spec.output_names, [*results, *(by_slot(t.name, inputs[t.name]) for t in spec.states)], strict=True))


def is_per_slot(name: str) -> bool:
    """Whether a tensor, a state before or after the op (``kv``, ``kv_out``), holds something for each slot."""
    states = {t.name: t for spec in SPECS.values() for t in spec.states}
    state = states.get(name.removesuffix("_out"))
    return state is not None and "P" in state.axes


def by_slot(name: str, state: np.ndarray) -> np.ndarray:
    """A state with its slot, if it has any, as the first two axes [M, P, ...]: kv is [M, 2, K, P, D], others are [M, K, P]."""
    if not is_per_slot(name):
        return state
    return state.transpose(0, 3, 1, 2, 4) if state.ndim == 5 else state.transpose(0, 2, 1)


def untouched(state: TensorSpec, inputs: dict[str, Any]) -> np.ndarray:
    """Indices into a state's first axis that belong to other layers or to nobody: pages, or remembered queries."""
    mine = inputs["query_rows" if state.axes[0] == "U" else "page_table"][inputs["layer"]]
    return np.setdiff1d(np.arange(len(inputs[state.name])), mine[mine >= 0])


def live_slots(spec: OpSpec, inputs: dict[str, Any], outputs: dict[str, np.ndarray]) -> np.ndarray:
    """[M, P] bool: slots whose content the op defines (an eviction frees the slots behind the survivors)."""
    n_pages, page_size = inputs["kv"].shape[0], inputs["kv"].shape[3]
    live = np.ones((n_pages, page_size), bool)
    if "kept" in outputs:
        for b, kept in enumerate(outputs["kept"]):
            for slot in range(kept, inputs["kv_len"][inputs["layer"], b]):
                live[inputs["page_table"][inputs["layer"], b, slot // page_size], slot % page_size] = False
    return live


@pytest.mark.parametrize("kv_dtype", STORED_AS)
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernel_equals_reference(spec: OpSpec, case: Case, implementation: str, kv_dtype: str) -> None:
    """Also in the bytes that it stores: a kernel and the reference write and read the same rows."""
    inputs = case_inputs(spec, case, kv_dtype=kv_dtype)
    expected, got = run(spec, "reference", inputs), run(spec, implementation, inputs)
    live = live_slots(spec, inputs, expected)
    for name, reference in expected.items():
        where = live if is_per_slot(name) else ...
        if name == "kv_out":
            np.testing.assert_array_equal(got[name][where], reference[where])
            continue
        np.testing.assert_allclose(
            got[name][where], reference[where], atol=spec.tolerance.atol, rtol=spec.tolerance.rtol, err_msg=name
        )


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_op_leaves_other_layers_and_sequences_alone(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    for implementation in IMPLEMENTATIONS:
        outputs = run(spec, implementation, inputs)
        for state in spec.states:
            others = untouched(state, inputs)
            before = by_slot(state.name, inputs[state.name])
            np.testing.assert_array_equal(outputs[f"{state.name}_out"][others], before[others])


def arguments_of(spec: OpSpec) -> Any:
    """The op's dataclass."""
    return importlib.import_module(f"trt_kv.plugins.{spec.folder}.arguments").Arguments


def taken_by(spec: OpSpec, implementation: str) -> list[Any]:
    """The classes that ``run`` of an implementation takes."""
    hints = get_type_hints(importlib.import_module(f"trt_kv.plugins.{spec.folder}.{implementation}").run)
    return [get_origin(hint) for name, hint in hints.items() if name != "return"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_arguments_are_the_inputs_and_attributes_of_the_spec(spec: OpSpec) -> None:
    """By name, type and default, in the spec's order."""
    types: dict[str, Any] = {"int": int, "float": float, "string": str, "floats": tuple[float, ...]}
    expected: list[tuple[str, Any, Any]] = [
        (t.name, Array | None if t.optional else Array, None if t.optional else MISSING) for t in spec.inputs
    ]
    expected += [(a.name, types[a.type], MISSING if a.default is None else a.default) for a in spec.attributes]
    assert [(field.name, field.type, field.default) for field in dataclasses.fields(arguments_of(spec))] == expected


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_implementations_take_the_arguments_of_their_op(spec: OpSpec) -> None:
    for implementation in IMPLEMENTATIONS:
        assert taken_by(spec, implementation) == [arguments_of(spec)]


def test_each_case_dimension_is_somewhere_the_largest() -> None:
    for spec in SPECS.values():
        largest = {max(case.dims, key=case.dims.__getitem__) for case in spec.cases}
        assert len(largest) >= 3, f"{spec.name}: only {largest} is ever the largest dimension"
