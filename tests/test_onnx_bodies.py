"""The function body of every op, in standard ONNX ops, means what the op's reference means."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from tests.rig.buffers import padded, padding_slots
from tests.test_op_parity import CASES, SPECS, by_slot, is_per_slot, live_slots, run, untouched
from trt_kv.opspec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES, Case, OpSpec, TensorSpec
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.onnx_function import OPSET, onnx_function
from trt_kv.policy import kept_tokens

Run = Callable[[onnx.ModelProto, dict[str, np.ndarray]], Sequence[np.ndarray]]


def run_in_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Sequence[np.ndarray] = session.run(None, feeds)
    return outputs


def run_in_reference_evaluator(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
    with np.errstate(invalid="ignore"):  # numpy's matmul raises the flag on some CPUs, for finite numbers
        return list(ReferenceEvaluator(model).run(None, feeds))


RUNTIMES = [
    pytest.param(run_in_onnxruntime, id="onnxruntime"),
    pytest.param(run_in_reference_evaluator, id="reference-evaluator"),
]


def one_node_model(
    spec: OpSpec, inputs: dict[str, Any], *, plugin_attributes: dict[str, str] = PLUGIN_ATTRIBUTES
) -> onnx.ModelProto:
    """A model of one node that runs the op on ``inputs`` (tensors and attributes by name), with the op's function."""
    tensors = [t for t in spec.inputs if t.name in inputs]
    float_type = onnx.helper.np_dtype_to_tensor_dtype(inputs["kv"].dtype)
    node = onnx.helper.make_node(
        spec.name,
        [t.name for t in tensors],
        spec.output_names,
        domain=DOMAIN,
        **{a.name: inputs[a.name] for a in spec.attributes},
        **plugin_attributes,
    )
    graph = onnx.helper.make_graph(
        [node],
        spec.name,
        [value_info(t.name, t, float_type) for t in tensors],
        [value_info(name, t, float_type) for name, t in zip(spec.output_names, (*spec.outputs, *spec.states), strict=True)],
    )
    function = onnx_function(spec, with_optional_inputs=any(t.optional for t in tensors))
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = onnx.helper.make_model(graph, functions=[ir.to_proto(function)], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def value_info(name: str, tensor: TensorSpec, float_type: int) -> onnx.ValueInfoProto:
    types = {"float": float_type, "float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    shape = [int(axis) if axis.isdigit() else axis for axis in tensor.axes]
    return onnx.helper.make_tensor_value_info(name, types[tensor.dtype], shape)


def feeds_of(spec: OpSpec, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    return {t.name: inputs[t.name] for t in spec.inputs if t.name in inputs}


def assert_body_equals_reference(
    spec: OpSpec, inputs: dict[str, Any], execute: Run, *, atol: float | None = None, **options: Any
) -> None:
    model = one_node_model(spec, inputs, **options)
    results = dict(zip(spec.output_names, execute(model, feeds_of(spec, inputs)), strict=True))
    expected = run(spec, "reference", inputs)
    live = live_slots(spec, inputs, expected)
    for name, reference in expected.items():
        where = live if is_per_slot(name) else ...
        got = by_slot(name, results[name])[where]
        np.testing.assert_allclose(
            got,
            reference[where],
            atol=spec.tolerance.atol if atol is None else atol,
            rtol=spec.tolerance.rtol if atol is None else atol,
            err_msg=name,
        )


@pytest.mark.parametrize("execute", RUNTIMES)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_body_equals_reference(spec: OpSpec, case: Case, execute: Run) -> None:
    assert_body_equals_reference(spec, case_inputs(spec, case), execute)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_body_leaves_other_layers_and_sequences_alone(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    results = run_in_onnxruntime(one_node_model(spec, inputs), feeds_of(spec, inputs))
    outputs = dict(zip(spec.output_names, results, strict=True))
    for state in spec.states:
        others = untouched(state, inputs)
        np.testing.assert_array_equal(outputs[f"{state.name}_out"][others], inputs[state.name][others])


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_padding_behind_the_last_token_and_sequence_changes_nothing(spec: OpSpec, case: Case) -> None:
    """Nor do sequences without a token in this step: what the step tensors say about them may be anything."""
    inputs = case_inputs(spec, case)
    step = padded(inputs, n_tokens=5, n_sequences=2)
    results = run_in_onnxruntime(one_node_model(spec, step), feeds_of(spec, step))
    expected = run(spec, "reference", inputs)
    live = live_slots(spec, inputs, expected) & ~padding_slots(inputs, step, n_tokens=5)
    for name, got in zip(spec.output_names, results, strict=True):
        reference = expected[name]
        where = live if is_per_slot(name) else ...
        np.testing.assert_allclose(
            by_slot(name, got)[: len(reference)][where],
            reference[where],
            atol=spec.tolerance.atol,
            rtol=spec.tolerance.rtol,
            err_msg=name,
        )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_node_without_the_plugin_attributes_runs_the_same_body(spec: OpSpec) -> None:
    assert_body_equals_reference(spec, case_inputs(spec, spec.cases[0]), run_in_onnxruntime, plugin_attributes={})


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_body_computes_in_fp32_when_the_engine_is_fp16(spec: OpSpec) -> None:
    inputs = copy.deepcopy(case_inputs(spec, spec.cases[0]))
    for tensor in spec.inputs:
        if tensor.dtype == "float":
            inputs[tensor.name] = inputs[tensor.name].astype(np.float16)
    assert_body_equals_reference(spec, inputs, run_in_onnxruntime, atol=2e-3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_signature_of_the_function_is_the_one_the_spec_tells(spec: OpSpec) -> None:
    function = ir.to_proto(onnx_function(spec))
    assert list(function.input) == [t.name for t in spec.inputs if not t.optional]
    assert list(function.output) == list(spec.output_names)
    defaults = {a.name: onnx.helper.get_attribute_value(a) for a in function.attribute_proto}
    assert set(function.attribute) | set(defaults) == {a.name for a in spec.attributes} | set(PLUGIN_ATTRIBUTES)
    assert defaults == pytest.approx(
        {a.name: a.default for a in spec.attributes if a.default is not None}
        | {name: value.encode() for name, value in PLUGIN_ATTRIBUTES.items()}
    )
    assert {node.domain for node in function.node} == {""}


@settings(max_examples=40)
@given(
    kept_share=st.floats(2**-7, 1.0, width=32) | st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1 / 3]),
    tokens=st.integers(-900, 900) | st.just(0),
    floor=st.just(0) | st.integers(0, 400),
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=12),
)
def test_eviction_keeps_the_number_of_tokens_that_the_policy_tells(
    kept_share: float, tokens: int, floor: int, lengths: list[int]
) -> None:
    spec = SPECS["EvictTokens"]
    page_size = 700
    n = len(lengths)
    attributes = {a.name: a.default for a in spec.attributes} | {"layer": 0, "page_size": page_size}
    attributes |= {"kept_share": kept_share, "kept_tokens": tokens, "floor": floor, "sinks": 0, "recent": 0}
    inputs: dict[str, Any] = {
        "evict": np.ones(n, np.int64),
        "page_table": np.arange(n).reshape(1, n, 1),
        "kv_len": np.array([lengths]),
        "kv": np.zeros((n, 2, 1, page_size, 1), np.float32),
        "token_positions": np.tile(np.arange(page_size), (n, 1, 1)),
        "scores": np.ones((n, 1, page_size), np.float32),
    } | attributes
    kept = run_in_onnxruntime(one_node_model(spec, inputs), feeds_of(spec, inputs))[0]
    assert kept.tolist() == [kept_tokens(length, kept_share, tokens, max(1, floor)) for length in lengths]
