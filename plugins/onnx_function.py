"""An op's definition in standard ONNX ops: the FunctionProto that an exported graph contains for each of its ops.

Stock ONNX Runtime runs the function; TensorRT uses a registered plugin for the same node, or the function if there is none.
Names, inputs, outputs and attributes come from the op's spec, the nodes from ``body`` in ``plugins/<op>/onnx_op.py``.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from trt_kv.opspec import DOMAIN, PLUGIN_ATTRIBUTES, AttributeSpec, OpSpec

OPSET = 23
"""Version of the standard ops in every graph and function."""

Number = int | float
Operand = ir.Value | Number | Sequence[int]

_ATTRIBUTE_TYPES = {
    "int": ir.AttributeType.INT,
    "float": ir.AttributeType.FLOAT,
    "string": ir.AttributeType.STRING,
    "floats": ir.AttributeType.FLOATS,
}


def onnx_function(spec: OpSpec, *, with_optional_inputs: bool = False) -> ir.Function:
    """The function of ``spec``. Its signature has the optional inputs only ``with_optional_inputs``.

    Attributes that TensorRT needs on the node are in the signature too, because a node may only have attributes that its
    function declares.
    """
    inputs = {t.name: ir.Value(name=t.name) for t in spec.inputs if with_optional_inputs or not t.optional}
    f = FunctionBody(spec.attributes)
    body: Callable[..., Sequence[ir.Value]] = importlib.import_module(f"trt_kv.plugins.{spec.folder}.onnx_op").body
    outputs = body(f, **inputs)
    graph = ir.Graph(list(inputs.values()), list(outputs), nodes=f.nodes, opset_imports={"": OPSET}, name=spec.name)
    for value, name in zip(outputs, spec.output_names, strict=True):
        value.name = name
    attributes = [_declared(a) for a in spec.attributes]
    attributes += [ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()]
    return ir.Function(DOMAIN, spec.name, graph=graph, attributes=attributes)


class FunctionBody:
    """Records the nodes of a body: ``f.Gather(x, 0, axis=1)`` adds one and returns its output.

    Operands are values, int64 scalars, lists for int64 vectors or fp32 scalars; equal constants become one node.
    """

    def __init__(self, attributes: Sequence[AttributeSpec]) -> None:
        self._attribute_types = {a.name: a.type for a in attributes}
        self._tape = Tape()
        self._constants: dict[tuple[str, Any], ir.Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def emit(*operands: Operand, **attributes: Any) -> ir.Value:
            return self._tape.op(op_type, [self._value(operand) for operand in operands], attributes)

        return emit

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def top_k(self, x: ir.Value, k: ir.Value, *, largest: bool) -> tuple[ir.Value, ir.Value]:
        """Values and indices of the k first along the last axis, in order; equal values by index."""
        values, indices = self._tape.op_multi_out("TopK", [x, k], {"largest": int(largest)}, num_outputs=2)
        return values, indices

    def attribute(self, name: str) -> ir.Value:
        """The attribute ``name`` of the node: a scalar, or the vector of its ``floats``."""
        kind = self._attribute_types[name]
        return self._constant(f"value_{kind}", ir.RefAttr(f"value_{kind}", name, _ATTRIBUTE_TYPES[kind]), key=name)

    def _value(self, operand: Operand) -> ir.Value:
        match operand:
            case ir.Value():
                return operand
            case float():
                return self._constant("value_float", operand, key=operand)
            case int():
                return self._constant("value_int", operand, key=operand)
            case _:
                return self._constant("value_ints", list(operand), key=tuple(operand))

    def _constant(self, attribute: str, value: Any, *, key: Any) -> ir.Value:
        if (attribute, key) not in self._constants:
            self._constants[attribute, key] = self._tape.op("Constant", [], {attribute: value})
        return self._constants[attribute, key]


def _declared(attribute: AttributeSpec) -> ir.Attr:
    """The attribute in a function's signature; without a default, nodes must have it."""
    return ir.Attr(attribute.name, _ATTRIBUTE_TYPES[attribute.type], attribute.default)
