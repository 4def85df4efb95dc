"""Pass: read big matrices of a monolithic graph from blocks of integers.

requires: ``Gemm(x, weight, [bias], transB=1)`` for each product with a weight, ``Gather(weight, ids)`` for the embedding.
ensures: each of them is a MatMulNBits or GatherBlockQuantized of the same output; of blocks with offsets also the product of
the offsets and the sums of x over blocks. A matrix that is used by both has its blocks in the file once.
modified: the graph; the weights' arrays are lazy.
"""

import numpy as np
import onnx_ir as ir

from trt_kv.export.packed_weights import ROWS, PackedWeights
from trt_kv.weight_index import BlockFormat

DOMAIN = "com.microsoft"


def quantize_graph(model: ir.Model, weights: PackedWeights) -> None:
    """Replace the matrices in ``weights`` that ``model`` reads."""
    pass_ = _Pass(model.graph, weights)
    for node in list(model.graph):
        name = next((value.name or "" for value in node.inputs if value is not None and value.name in weights.formats), None)
        if name is not None:
            replace = {"Gemm": pass_.replace_product, "Gather": pass_.replace_gather}[node.op_type]
            replace(node, name, weights.formats[name])
    for name in weights.formats:
        model.graph.initializers.pop(name, None)
    model.graph.opset_imports[DOMAIN] = 1


class _Pass:
    def __init__(self, graph: ir.Graph, weights: PackedWeights) -> None:
        self._graph = graph
        self._weights = weights
        self._sums: dict[tuple[str | None, int], ir.Value] = {}

    def replace_product(self, node: ir.Node, name: str, how: BlockFormat) -> None:
        x, _, *bias = node.inputs
        assert node.attributes["transB"].as_int() == 1
        assert x is not None
        arrays = {part: self._initializer(name, part) for part in self._weights.shapes(name)}
        n_rows, n_columns = self._weights.shapes(name)["blocks"][0], self._weights.shapes(name)["blocks"][1] * how.block_size
        inputs = [x, arrays["blocks"], arrays["scales"], arrays.get("zero_points"), None, *bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {
            "K": n_columns,
            "N": n_rows,
            "bits": how.bits,
            "block_size": how.block_size,
            "accuracy_level": self._weights.accuracy_level,
        }
        nodes = [_node("MatMulNBits", inputs, attributes, domain=DOMAIN)]
        if how.offsets:
            sums = self._sums_over_blocks(x, n_columns, how, before=node)
            nodes.append(_node("Gemm", [sums, arrays["offsets"], nodes[0].outputs[0]], {"transB": 1}))
        self._replace(node, nodes)

    def replace_gather(self, node: ir.Node, name: str, how: BlockFormat) -> None:
        _, ids = node.inputs
        rows = self._initializer(name, ROWS)
        arrays = {part: self._initializer(name, part) for part in self._weights.shapes(name) if part != "blocks"}
        inputs = [rows, ids, arrays["scales"], arrays.get("zero_points")]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"bits": how.bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
        nodes = [_node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN)]
        if how.offsets:
            n_blocks = self._weights.shapes(name)["blocks"][1]
            in_blocks = _node("Reshape", [nodes[0].outputs[0], self._constant([-1, n_blocks, how.block_size])], {})
            offsets = _node("Gather", [arrays["offsets"], ids], {"axis": 0})
            columns = _node("Unsqueeze", [offsets.outputs[0], self._constant([2])], {})
            added = _node("Add", [in_blocks.outputs[0], columns.outputs[0]], {})
            whole = _node("Reshape", [added.outputs[0], self._constant([-1, n_blocks * how.block_size])], {})
            nodes += [in_blocks, offsets, columns, added, whole]
        self._replace(node, nodes)

    def _sums_over_blocks(self, x: ir.Value, n_columns: int, how: BlockFormat, *, before: ir.Node) -> ir.Value:
        """``[N, M]``, made once for all weights that ``x`` is multiplied with."""
        key = x.name, how.block_size
        if key not in self._sums:
            shape = self._constant([-1, n_columns // how.block_size, how.block_size])
            blocks = _node("Reshape", [x, shape], {})
            sums = _node("ReduceSum", [blocks.outputs[0], self._constant([2])], {"keepdims": 0})
            self._graph.insert_before(before, [blocks, sums])
            self._sums[key] = sums.outputs[0]
        return self._sums[key]

    def _replace(self, node: ir.Node, nodes: list[ir.Node]) -> None:
        """Put ``nodes``, of which the last makes the result, in the place of ``node``."""
        (old,), (new,) = node.outputs, nodes[-1].outputs
        name, new.shape, new.type = old.name, old.shape, old.type
        self._graph.insert_before(node, nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        new.name = name

    def _initializer(self, weight: str, part: str) -> ir.Value:
        """An array of a weight, which is read from the checkpoint when it is written."""
        name = f"{weight}.{part}"
        if name not in self._graph.initializers:
            shapes = self._weights.shapes(weight)
            blocks = shapes["blocks"]
            shape = ir.Shape((blocks[0], blocks[1] * blocks[2]) if part == ROWS else shapes[part])
            dtype = ir.DataType.UINT8 if part in ("blocks", "zero_points", ROWS) else ir.DataType.FLOAT
            tensor = ir.LazyTensor(self._reader(weight, part, shape), dtype=dtype, shape=shape, name=name)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _reader(self, weight: str, part: str, shape: ir.Shape) -> "_Reader":
        return _Reader(self._weights, weight, "blocks" if part == ROWS else part, tuple(shape.numpy()))

    def _constant(self, numbers: list[int]) -> ir.Value:
        name = f"sizes_{'_'.join(map(str, numbers))}"
        if name not in self._graph.initializers:
            array = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
            value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(array.dtype), const_value=array)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


class _Reader:
    """Reads an array of a weight, when it is called."""

    def __init__(self, weights: PackedWeights, weight: str, part: str, shape: tuple[int, ...]) -> None:
        self._weights, self._weight, self._part, self._shape = weights, weight, part, shape

    def __call__(self) -> ir.TensorProtocol:
        array = np.ascontiguousarray(self._weights.part(self._weight, self._part))
        return ir.Tensor(array.reshape(self._shape), name=f"{self._weight}.{self._part}")


def _node(op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int], *, domain: str = "") -> ir.Node:
    listed = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    return ir.Node(domain, op_type, inputs, listed, num_outputs=1)
