"""The plugin objects that TensorRT's registry makes: fields, shapes, types, and what enqueue does to bare memory."""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.rig.buffers import GuardedBuffers, output_shapes, padded, padding_slots, poisoned
from tests.tensorrt_plugins import HostMemory, deregister_plugins
from tests.test_op_parity import by_slot, is_per_slot, live_slots, run
from trt_kv.errors import EngineError
from trt_kv.opspec import Case, OpSpec
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.registry import op_specs

SPECS = op_specs()
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS.values() for case in spec.cases]
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def base(tensorrt: ModuleType) -> Iterator[Any]:
    """``tensorrt_base`` with its creators registered for host memory."""
    from trt_kv.plugins import tensorrt_base

    tensorrt_base.register_plugins(HostMemory())
    yield tensorrt_base
    deregister_plugins()


def make_plugin(base: Any, spec: OpSpec, attributes: Mapping[str, Any], phase: str = "RUNTIME") -> Any:
    """A plugin from the creator in TensorRT's registry, made from fields."""
    trt = base.trt
    creator = trt.get_plugin_registry().get_creator(spec.name, "1", "trt_kv")
    fields = [base.field_of(a.name, a.type, attributes[a.name]) for a in spec.attributes]
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), getattr(trt.TensorRTPhase, phase))


def attributes_of(spec: OpSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {a.name: inputs[a.name] for a in spec.attributes}


def describe(base: Any, arrays: list[np.ndarray], type_of: Any = None) -> list[Any]:
    """TensorRT's descriptors of host arrays."""
    trt = base.trt
    descs = []
    for array in arrays:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.format = trt.Dims(array.shape), trt.TensorFormat.LINEAR
        desc.type = type_of or {"float32": trt.float32, "int64": trt.int64}[array.dtype.name]
        descs.append(desc)
    return descs


def enqueue(base: Any, spec: OpSpec, inputs: Mapping[str, Any], *, in_place: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the op's plugin on guarded memory; returns the outputs by name and the inputs as they are afterwards."""
    buffers = GuardedBuffers()
    names = [t.name for t in spec.inputs if t.name in inputs]
    for name in names:
        buffers.add(name, inputs[name])
    targets = []
    for t, (name, shape) in zip([*spec.outputs, *spec.states], output_shapes(spec, inputs).items(), strict=True):
        if in_place and t in spec.states:
            targets.append(t.name)
        else:
            buffers.add(name, poisoned(shape, np.dtype("int64" if t.dtype == "int64" else "float32")))
            targets.append(name)
    plugin = make_plugin(base, spec, attributes_of(spec, inputs)).attach_to_context(None)
    descs = describe(base, [buffers.arrays[n] for n in names]), describe(base, [buffers.arrays[n] for n in targets])
    plugin.on_shape_change(*descs)
    plugin.enqueue(*descs, [buffers.address(n) for n in names], [buffers.address(n) for n in targets], 0, 0)
    buffers.check_guards()
    outputs = {name: buffers.arrays[target] for name, target in zip(spec.output_names, targets, strict=True)}
    return outputs, {name: buffers.arrays[name] for name in names}


def assert_equals_reference(spec: OpSpec, inputs: dict[str, Any], outputs: dict[str, np.ndarray], written: Any = ...) -> None:
    """``outputs`` may have more rows and sequences than ``inputs``; ``written`` [M, P] are slots of padding."""
    expected = run(spec, "reference", inputs)
    live = live_slots(spec, inputs, expected)
    if written is not ...:
        live &= ~written
    for name, reference in expected.items():
        got = by_slot(name, outputs[name])[: len(reference)]
        where = live if is_per_slot(name) else ...
        np.testing.assert_allclose(
            got[where], reference[where], atol=spec.tolerance.atol, rtol=spec.tolerance.rtol, err_msg=name
        )


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "copied"])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_enqueue_equals_reference(base: Any, spec: OpSpec, case: Case, in_place: bool) -> None:
    """Same address in and out, or two; nothing outside the tensors is touched, no input changes but a state in place."""
    inputs = case_inputs(spec, case)
    before = base.OpPlugin.n_state_copies
    outputs, inputs_after = enqueue(base, spec, inputs, in_place=in_place)
    assert_equals_reference(spec, inputs, outputs)
    assert base.OpPlugin.n_state_copies - before == (0 if in_place else len(spec.states))
    updated = {state.name for state in spec.states} if in_place else set()
    for name in set(inputs_after) - updated:
        np.testing.assert_array_equal(inputs_after[name], inputs[name], err_msg=name)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_padding_behind_the_last_token_and_sequence_changes_nothing(base: Any, spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    step = padded(inputs, n_tokens=5, n_sequences=2)
    outputs, _ = enqueue(base, spec, step, in_place=True)
    assert_equals_reference(spec, inputs, outputs, padding_slots(inputs, step, n_tokens=5))


@EACH_SPEC
def test_a_plugin_made_for_building_touches_no_memory(base: Any, spec: OpSpec) -> None:
    """TensorRT may time plugins on garbage, and a machine that builds may have no GPU: null pointers are fine."""
    inputs = case_inputs(spec, spec.cases[0])
    plugin = make_plugin(base, spec, attributes_of(spec, inputs), "BUILD")
    arrays = [inputs[t.name] for t in spec.inputs if t.name in inputs]
    outputs = [np.empty(shape, np.float32) for shape in output_shapes(spec, inputs).values()]
    plugin.enqueue(describe(base, arrays), describe(base, outputs), [0] * len(arrays), [0] * len(outputs), 0, 0)


@EACH_SPEC
def test_a_plugin_made_from_its_own_fields_is_the_same(base: Any, spec: OpSpec) -> None:
    attributes = attributes_of(spec, case_inputs(spec, spec.cases[0]))
    plugin = make_plugin(base, spec, attributes)
    again = base.OpCreator(spec, None).create_plugin("node", plugin.get_fields_to_serialize(), base.trt.TensorRTPhase.BUILD)
    assert again.attributes == plugin.attributes
    assert again.attributes.keys() == attributes.keys()
    assert all(again.attributes[name] == pytest.approx(value) for name, value in attributes.items())
    assert plugin.clone().attributes == plugin.attributes


@EACH_SPEC
def test_a_missing_an_unknown_and_a_mistyped_field_are_named(base: Any, spec: OpSpec) -> None:
    attributes = attributes_of(spec, case_inputs(spec, spec.cases[0]))
    fields = {a.name: base.field_of(a.name, a.type, attributes[a.name]) for a in spec.attributes}
    without = [field for name, field in fields.items() if name != "layer"]
    for given, problem in (
        (without, "missing: layer"),
        ([*fields.values(), base.field_of("sigma", "float", 0.5)], "unknown: sigma"),
        ([*without, base.field_of("layer", "float", 1.0)], "of the wrong type: layer"),
        ([*fields.values(), fields["layer"]], "given twice: layer"),
    ):
        with pytest.raises(EngineError, match=problem) as caught:
            base.attributes_of(spec, given)
        assert spec.name in str(caught.value)


@EACH_SPEC
def test_tensors_that_disagree_about_an_axis_are_refused(base: Any, spec: OpSpec) -> None:
    inputs = case_inputs(spec, spec.cases[0])
    inputs["kv_len"] = np.concatenate([inputs["kv_len"]] * 2, axis=1)
    names = [t.name for t in spec.inputs if t.name in inputs]
    outputs = [np.empty(shape) for shape in output_shapes(spec, inputs).values()]
    plugin = make_plugin(base, spec, attributes_of(spec, inputs))
    descs = describe(base, [inputs[n] for n in names]), describe(base, outputs, base.trt.float32)
    with pytest.raises(EngineError, match=rf"{spec.name}: .*axis B"):
        plugin.on_shape_change(*descs)


@EACH_SPEC
def test_compute_type_is_one_for_all_float_tensors(base: Any, spec: OpSpec) -> None:
    """fp32, fp16 and bf16 are taken, mixtures are not; scores, lse and integers keep their types."""
    trt = base.trt
    plugin = make_plugin(base, spec, attributes_of(spec, case_inputs(spec, spec.cases[0])))
    inputs = [t for t in spec.inputs if not t.optional]
    tensors = [*inputs, *spec.outputs, *spec.states]
    for compute in (trt.float32, trt.float16, trt.bfloat16):
        types = [{"float": compute, "float32": trt.float32, "int64": trt.int64}[t.dtype] for t in tensors]
        assert all(supports(base, plugin, types, pos, len(inputs)) for pos in range(len(types)))
        assert plugin.get_output_data_types(types[: len(inputs)]) == types[len(inputs) :]
        for pos in range(len(types)):
            wrong = types.copy()
            wrong[pos] = trt.int8
            assert not supports(base, plugin, wrong, pos, len(inputs))


def supports(base: Any, plugin: Any, types: list[Any], pos: int, n_inputs: int) -> bool:
    descs = []
    for dtype in types:
        dynamic = base.trt.DynamicPluginTensorDesc()
        desc = base.trt.PluginTensorDesc()
        desc.type, desc.format = dtype, base.trt.TensorFormat.LINEAR
        dynamic.desc = desc
        descs.append(dynamic)
    return bool(plugin.supports_format_combination(pos, descs, n_inputs))
