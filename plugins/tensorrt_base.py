"""One TensorRT plugin per op, all derived from the OpSpec: names, fields, shapes, types and in-place states.

An op's own part is ``plugins/<op>/tensorrt.py``, the kernels that its enqueue runs. Importing this module requires TensorRT;
without it, ``trt_kv.require.require_tensorrt`` raises an error that names the package to install.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_kv.errors import EngineError
from trt_kv.opspec import PLUGIN_ATTRIBUTES, AttributeValue, OpSpec, TensorSpec
from trt_kv.plugins.registry import op_specs
from trt_kv.plugins.tensorrt_memory import Buffer, CudaMemory, Memory, PluginCall, PluginKernels
from trt_kv.require import require_tensorrt

trt: Any = require_tensorrt()

NAMESPACE = PLUGIN_ATTRIBUTES["plugin_namespace"]
VERSION = PLUGIN_ATTRIBUTES["plugin_version"]
_COMPUTE_TYPES = (trt.float32, trt.float16, trt.bfloat16)
_FIXED_TYPES = {"float32": trt.float32, "int64": trt.int64}
_NAMES = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16", trt.int64: "int64"}
_FIELD_TYPES = {
    "int": (trt.PluginFieldType.INT32, np.int32),
    "float": (trt.PluginFieldType.FLOAT32, np.float32),
    "string": (trt.PluginFieldType.CHAR, np.int8),
    "floats": (trt.PluginFieldType.FLOAT32, np.float32),
}
_registered: dict[str, "OpCreator"] = {}


class OpPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):  # type: ignore[misc]
    """One node of an engine. Created by a builder it runs nothing, not even when TensorRT times it. Created by a runtime it
    runs the op's kernels on ``memory``.
    """

    n_state_copies = 0
    """Number of state copies, over all plugins of the process, because an output was not at the address of its input."""

    def __init__(self, spec: OpSpec, attributes: Mapping[str, AttributeValue], memory: Memory | None) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuildV2.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.spec = spec
        self.attributes = dict(attributes)
        self.memory = memory
        self.plugin_name, self.plugin_version, self.plugin_namespace = spec.name, VERSION, NAMESPACE
        self.num_outputs = len(spec.output_names)
        self.timing_cache_id = ""
        self.metadata_string = ", ".join(f"{name}={value}" for name, value in self.attributes.items())

    def clone(self) -> "OpPlugin":
        return OpPlugin(self.spec, self.attributes, self.memory)

    def get_capability_interface(self, _type: Any) -> "OpPlugin":
        return self

    def get_fields_to_serialize(self) -> Any:
        # A collection holds pointers to the fields' values without owning them, and TensorRT reads it after this call.
        self._serialized_fields = [field_of(a.name, a.type, self.attributes[a.name]) for a in self.spec.attributes]
        return trt.PluginFieldCollection(self._serialized_fields)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        inputs = dict(zip((t.name for t in self._inputs(len(input_types))), input_types, strict=True))
        return [_FIXED_TYPES.get(t.dtype, inputs["kv"]) for t in self._outputs()]

    def get_output_shapes(self, inputs: Sequence[Any], _shape_inputs: Sequence[Any], _builder: Any) -> list[Any]:
        sizes = {a: shape[i] for t, shape in zip(self._inputs(len(inputs)), inputs, strict=True) for i, a in enumerate(t.axes)}
        return [trt.DimsExprs([sizes[axis] for axis in t.axes]) for t in self._outputs()]

    def get_aliased_input(self, output_index: int) -> int:
        """The input that an output shares its memory with, or -1: states are updated in place."""
        names = [t.name for t in self._inputs(len(self.spec.inputs))]
        results = len(self.spec.outputs)
        return -1 if output_index < results else names.index(self.spec.states[output_index - results].name)

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        tensors = [*self._inputs(num_inputs), *self._outputs()]
        desc = in_out[pos].desc
        if desc.format != trt.TensorFormat.LINEAR:
            return False
        if tensors[pos].dtype in _FIXED_TYPES:
            return bool(desc.type == _FIXED_TYPES[tensors[pos].dtype])
        first = next(i for i, t in enumerate(tensors) if t.dtype == "float")
        return desc.type in _COMPUTE_TYPES and bool(desc.type == in_out[first].desc.type)

    def configure_plugin(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
        """Nothing depends on the profile."""

    def get_workspace_size(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, _tactic: int) -> None:
        """There are no tactics: nothing to choose."""

    def attach_to_context(self, _context: Any) -> "OpPlugin":
        return self.clone()

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Raise ``EngineError`` if tensors disagree on the size of an axis."""
        tensors = [*self._inputs(len(inputs)), *self._outputs()]
        sizes: dict[str, int] = {}
        for tensor, desc in zip(tensors, [*inputs, *outputs], strict=True):
            for axis, size in zip(tensor.axes, tuple(desc.dims), strict=True):
                expected = sizes["B"] + 1 if axis == "B+1" and "B" in sizes else sizes.setdefault(axis, size)
                if size != expected:
                    raise EngineError(
                        f"{self.spec.name}: tensor {tensor.name!r} has the wrong size on axis {axis}",
                        got=size,
                        expected=expected,
                    )

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        _workspace: int,
        stream: int,
    ) -> None:
        if self.memory is None:
            return
        call = PluginCall(
            spec=self.spec,
            attributes=self.attributes,
            inputs=_buffers([t.name for t in self._inputs(len(inputs))], input_desc, inputs),
            outputs=_buffers(self.spec.output_names, output_desc, outputs),
            stream=stream,
        )
        OpPlugin.n_state_copies += len(call.moved_states)
        self.memory.run(call, kernels_of(self.spec))

    def _inputs(self, n_inputs: int) -> list[TensorSpec]:
        """The node's inputs: the required ones, then the optional ones that the node has."""
        given = [t for t in self.spec.inputs if not t.optional] + [t for t in self.spec.inputs if t.optional]
        return given[:n_inputs]

    def _outputs(self) -> list[TensorSpec]:
        return [*self.spec.outputs, *self.spec.states]


class OpCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """Creates an op's plugins from the fields of its nodes or from those stored in an engine."""

    def __init__(self, spec: OpSpec, memory: Memory) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.spec = spec
        self.memory = memory
        self.refusals: list[str] = []
        """Errors of refused nodes, because TensorRT's parser does not report them."""
        self.name, self.plugin_version, self.plugin_namespace = spec.name, VERSION, NAMESPACE
        self.field_names = trt.PluginFieldCollection(
            [trt.PluginField(a.name, np.array([]), _FIELD_TYPES[a.type][0]) for a in spec.attributes]
        )

    def create_plugin(self, _name: str, fields: Any, phase: Any) -> OpPlugin:
        """Raises ``EngineError`` for fields that are missing, unknown or of the wrong type."""
        try:
            attributes = attributes_of(self.spec, list(fields))
        except EngineError as error:
            self.refusals.append(str(error))
            raise
        return OpPlugin(self.spec, attributes, self.memory if phase == trt.TensorRTPhase.RUNTIME else None)


def register_plugins(memory: Memory | None = None) -> dict[str, OpCreator]:
    """Register one creator per op, by op name. Plugins that a runtime creates work on ``memory``; default: the GPU's.

    May be called again: plugins created afterwards use the new memory.
    """
    for name, spec in op_specs().items():
        if name not in _registered:
            _registered[name] = OpCreator(spec, CudaMemory())
            if not trt.get_plugin_registry().register_creator(_registered[name], NAMESPACE):
                raise EngineError(f"TensorRT refused the plugin {name!r}", fix="check that no other plugin has this name")
        _registered[name].memory = memory or CudaMemory()
    return dict(_registered)


def kernels_of(spec: OpSpec) -> PluginKernels:
    """``KERNELS`` of ``plugins/<op>/tensorrt.py``."""
    kernels: PluginKernels = importlib.import_module(f"trt_kv.plugins.{spec.folder}.tensorrt").KERNELS
    return kernels


def field_of(name: str, type_name: str, value: AttributeValue) -> Any:
    """A plugin field that holds one attribute."""
    field_type, dtype = _FIELD_TYPES[type_name]
    data = np.frombuffer(value.encode(), dtype) if isinstance(value, str) else np.atleast_1d(np.array(value, dtype))
    return trt.PluginField(name, data, field_type)


def attributes_of(spec: OpSpec, fields: Sequence[Any]) -> dict[str, AttributeValue]:
    """The spec's attributes from plugin fields; ``EngineError`` names those that are missing, unknown or of the wrong type."""
    types = {a.name: a.type for a in spec.attributes}
    names = [field.name for field in fields]
    problems = {
        "missing": sorted(set(types) - set(names)),
        "unknown": sorted(set(names) - set(types)),
        "given twice": sorted({name for name in names if names.count(name) > 1}),
        "of the wrong type": sorted(f.name for f in fields if f.name in types and f.type != _FIELD_TYPES[types[f.name]][0]),
    }
    if any(problems.values()):
        raise EngineError(
            f"plugin {spec.name!r} cannot be made from these fields",
            got="; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names),
            expected=", ".join(f"{name} ({type_name})" for name, type_name in types.items()),
            fix="export the graph with this version of trt-kv",
        )
    return {field.name: _value(field, types[field.name]) for field in fields}


def _value(field: Any, type_name: str) -> AttributeValue:
    if type_name == "string":
        return bytes(np.asarray(field.data, np.int8)).decode()
    if type_name == "floats":
        return tuple(np.asarray(field.data, np.float32).tolist())
    (value,) = np.asarray(field.data).tolist()
    return float(value) if type_name == "float" else int(value)


def _buffers(names: Sequence[str], descs: Sequence[Any], pointers: Sequence[int]) -> dict[str, Buffer]:
    return {
        name: Buffer(pointer=int(pointer), shape=tuple(desc.dims), dtype=_NAMES[desc.type])
        for name, desc, pointer in zip(names, descs, pointers, strict=True)
    }
