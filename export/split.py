"""Pass: cut a monolithic graph at its KV ops into graph segments that ONNX Runtime can run.

requires: one op that attends in each of the layers 0 .. L-1, each depending on the one before it.
ensures: segment l computes everything between layer l-1's attention and layer l's; segments refer to the same external weights.
modified: nothing; the segments are new models.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from trt_kv.errors import EngineError
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.opspec import DOMAIN, PLUGIN_ATTRIBUTES, AttributeValue
from trt_kv.plugins.registry import op_specs
from trt_kv.program import OpNode, Program


def program_from_graph(model: ModelProto) -> Program:
    """The KV ops of the graph, by layer, with the attributes of their nodes."""
    layers: dict[int, list[OpNode]] = {}
    for node in _kv_nodes(model.graph):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name not in PLUGIN_ATTRIBUTES}
        decoded = {name: _plain(value) for name, value in attributes.items()}
        layers.setdefault(int(attributes["layer"]), []).append(OpNode(op=node.op_type, attributes=decoded))
    return tuple(tuple(layers[layer]) for layer in sorted(layers))


def _plain(value: Any) -> AttributeValue:
    """An attribute's value as ``OpNode`` has it."""
    if isinstance(value, bytes):
        return value.decode()
    plain: AttributeValue = tuple(value) if isinstance(value, list) else value
    return plain


def segments_from_graph(model: ModelProto) -> tuple[list[ModelProto], list[GraphSegment], list[AttentionPort]]:
    """The L+1 graph segments, their descriptions, and the values each layer's attention reads and writes.

    Raises ``EngineError`` if a segment would need values of a later one.
    """
    graph = model.graph
    attentions = [node for node in _kv_nodes(graph) if _attends(node)]
    stage_of = _stages(graph, attentions)
    made_in = {name: stage_of[node.output[0]] for node in graph.node if node.domain != DOMAIN for name in node.output}
    read_in = _readers(graph, stage_of)
    models, segments = [], []
    for stage in range(len(attentions) + 1):
        nodes = [node for node in graph.node if node.domain != DOMAIN and stage_of[node.output[0]] == stage]
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        weights = [w for w in graph.initializer if w.name in read]
        inputs = [name for name in read if name not in made and name not in {w.name for w in weights}]
        outputs = [name for node in nodes for name in node.output if read_in.get(name, set()) - {stage}]
        segment = GraphSegment(file=f"segment_{stage:02d}.onnx", inputs=tuple(inputs), outputs=tuple(outputs))
        _check_order(segment, stage, made_in)
        models.append(_segment_model(model, segment, nodes, weights))
        segments.append(segment)
    ports = [AttentionPort(q=node.input[0], k=node.input[1], v=node.input[2], out=node.output[0]) for node in attentions]
    return models, segments, ports


def save_segments(models: Iterable[ModelProto], segments: Iterable[GraphSegment], folder: Path) -> None:
    """Write the segments into the folder of the weights they refer to."""
    for model, segment in zip(models, segments, strict=True):
        (folder / segment.file).write_bytes(model.SerializeToString(deterministic=True))


def _kv_nodes(graph: GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.domain == DOMAIN]


def _attends(node: NodeProto) -> bool:
    """Whether the node is a KV op that computes a layer's attention output."""
    return node.domain == DOMAIN and any(t.name == "out" for t in op_specs()[node.op_type].outputs)


def _stages(graph: GraphProto, attentions: list[NodeProto]) -> dict[str, int]:
    """For each node, by its first output, how many attention ops precede it (0 .. L); nodes are in topological order."""
    after: dict[str, int] = {}
    stages = {}
    for node in graph.node:
        stage = max((after.get(name, 0) for name in node.input), default=0)
        stages[node.output[0]] = stage
        after.update(dict.fromkeys(node.output, stage + _attends(node)))
    in_order = [stages[node.output[0]] for node in attentions]
    if in_order != list(range(len(attentions))):
        raise EngineError("the graph's attention ops do not follow one another", got=in_order, expected="stages 0, 1, 2 ...")
    return stages


def _readers(graph: GraphProto, stage_of: dict[str, int]) -> dict[str, set[int]]:
    """For each value the segments that read it; KV ops and graph outputs count as segment -1."""
    readers: dict[str, set[int]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(-1 if node.domain == DOMAIN else stage_of[node.output[0]])
    for output in graph.output:
        readers.setdefault(output.name, set()).add(-1)
    return readers


def _check_order(segment: GraphSegment, stage: int, made_in: dict[str, int]) -> None:
    late = [name for name in segment.inputs if made_in.get(name, -1) >= stage]
    if late:
        raise EngineError(f"{segment.file} reads values that a later segment computes", got=late)


def _segment_model(
    model: ModelProto, segment: GraphSegment, nodes: list[NodeProto], weights: list[onnx.TensorProto]
) -> ModelProto:
    infos = {info.name: info for info in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    graph = onnx.helper.make_graph(
        nodes, segment.file.removesuffix(".onnx"), _infos(segment.inputs, infos), _infos(segment.outputs, infos), weights
    )
    opsets = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version, producer_name=model.producer_name)


def _infos(names: Iterable[str], infos: dict[str, ValueInfoProto]) -> list[ValueInfoProto]:
    missing = [name for name in names if name not in infos]
    if missing:
        raise EngineError("the graph has no types for values at a cut", got=missing)
    return [infos[name] for name in names]
