"""An ONNX graph as TensorRT's parser reads it, checked against the program of the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import EngineError
from trt_kv.model_config import ModelConfig
from trt_kv.opspec import TensorSpec
from trt_kv.plugins.graph_io import graph_inputs, graph_outputs
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.plugins.tensorrt_base import OpPlugin, register_plugins, trt
from trt_kv.program import OpNode, Program

FLOAT32_ROUNDING = 1e-6
"""Plugin fields are fp32; recipes and policies are written in decimal."""

_COMPUTE_TYPES = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}


class CollectingLogger(trt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's errors and warnings for the message of our own error, instead of printing them."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)


@dataclass(frozen=True, kw_only=True)
class ParsedNetwork:
    """A network and the objects it depends on: TensorRT's objects hold raw pointers to one another."""

    network: Any
    builder: Any
    parser: Any
    logger: CollectingLogger

    def plugins(self) -> list[tuple[str, OpPlugin]]:
        """Name and plugin of every plugin layer, in order."""
        found = []
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type == trt.LayerType.PLUGIN_V3:
                layer.__class__ = trt.IPluginV3Layer
                found.append((layer.name, layer.plugin))
        return found


def network_from_onnx(path: Path, *, plugins: bool = True) -> ParsedNetwork:
    """Parse a graph, with weights beside it. Without ``plugins`` none are registered: the ops' ONNX functions are used.

    Raises ``EngineError`` with the messages of the parser and its plugins.
    """
    creators = register_plugins() if plugins else {}
    for creator in creators.values():
        creator.refusals.clear()
    logger = CollectingLogger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        said = [refusal for creator in creators.values() for refusal in creator.refusals]
        said += [parser.get_error(index).desc() for index in range(parser.num_errors)] + logger.errors
        raise EngineError(f"TensorRT cannot read {path}", got="; ".join(dict.fromkeys(said)), fix="export the graph again")
    return ParsedNetwork(network=network, builder=builder, parser=parser, logger=logger)


def check_network(parsed: ParsedNetwork, program: Program, config: ModelConfig, *, page_size: int, dtype: str) -> None:
    """Compare inputs, outputs and plugins with the program. Raises ``EngineError`` naming the first that differs."""
    sizes = {"2": 2, "K": config.n_kv_heads, "D": config.head_dim, "H": config.n_heads, "P": page_size}
    sizes |= {"L": config.n_layers, "V": config.vocab_size, "S": most_rows(program, page_size, dtype)}
    network = parsed.network
    for kind, found, expected in (
        ("input", [network.get_input(i) for i in range(network.num_inputs)], graph_inputs(program)),
        ("output", [network.get_output(i) for i in range(network.num_outputs)], graph_outputs(program)),
    ):
        _check_tensors(kind, {tensor.name: tensor for tensor in found}, expected, sizes, _COMPUTE_TYPES[dtype])
    got = [OpNode(op=plugin.spec.name, attributes=plugin.attributes) for _, plugin in parsed.plugins()]
    wanted = [node for nodes in program for node in nodes]
    for index in range(max(len(got), len(wanted))):
        pair = [nodes[index] if index < len(nodes) else None for nodes in (got, wanted)]
        if not _same_node(*pair):
            raise EngineError("the network's plugins are not the policy's ops", got=pair[0], expected=pair[1])


def describe_network(parsed: ParsedNetwork) -> dict[str, Any]:
    """The network as JSON: its tensors, and its plugin layers with their fields."""
    network = parsed.network

    def tensors(count: int, tensor: Any) -> dict[str, Any]:
        return {tensor(i).name: {"type": tensor(i).dtype.name, "shape": list(tensor(i).shape)} for i in range(count)}

    return {
        "layers": network.num_layers,
        "inputs": tensors(network.num_inputs, network.get_input),
        "outputs": tensors(network.num_outputs, network.get_output),
        "plugins": [{"node": name, "op": plugin.spec.name, **plugin.attributes} for name, plugin in parsed.plugins()],
    }


def _check_tensors(
    kind: str, found: Mapping[str, Any], expected: Mapping[str, TensorSpec], sizes: Mapping[str, int], compute_type: Any
) -> None:
    if set(found) != set(expected):
        raise EngineError(f"the network's {kind}s are not the engine's", got=sorted(found), expected=sorted(expected))
    types = {"float": compute_type, "float32": trt.float32, "int64": trt.int64}
    for name, spec in expected.items():
        shape = [sizes.get(axis, -1) for axis in spec.axes]
        if found[name].dtype != types[spec.dtype] or not _same_shape(list(found[name].shape), shape):
            raise EngineError(
                f"{kind} {name!r} of the network has another type or shape",
                got=f"{found[name].dtype} {list(found[name].shape)}",
                expected=f"{types[spec.dtype]} {shape}",
            )


def _same_shape(found: Sequence[int], expected: Sequence[int]) -> bool:
    return len(found) == len(expected) and all(a == b or -1 in (a, b) for a, b in zip(found, expected, strict=True))


def _same_node(node: OpNode | None, other: OpNode | None) -> bool:
    if node is None or other is None or node.op != other.op or node.attributes.keys() != other.attributes.keys():
        return False
    return all(
        abs(float(value) - float(other.attributes[name])) <= FLOAT32_ROUNDING
        if isinstance(value, float | int)
        else value == other.attributes[name]
        for name, value in node.attributes.items()
    )
