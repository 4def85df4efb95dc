"""The whole decoder as one graph for ONNX Runtime alone, the baseline of the split.

B sequences of S cached tokens decode one token each. H query heads, K KV heads, D head size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from benchmarks.models import ExportedModel
from trt_kv.opspec import DOMAIN
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.onnx_runtime import ort

STEP_INPUTS = ("input_ids", "positions", "logit_rows")
MICROSOFT = "com.microsoft"
Shape = list[str | int]


def graph_without_attention(model: ExportedModel) -> ModelProto:
    """Every attention replaced by out = q. k and v become graph outputs, else they would not be computed."""
    graph = model.graph
    infos = {info.name: info for info in graph.graph.value_info}
    outputs = [infos[name] for port in model.ports for name in (port.k, port.v)]
    ports = model.ports
    return _with_attention(
        graph, lambda layer: [helper.make_node("Identity", [ports[layer].q], [ports[layer].out])], outputs=outputs
    )


def graph_with_onnx_attention(model: ExportedModel) -> ModelProto:
    """Attention of opset 23 over ``past_key_<l>`` and ``past_value_<l>`` [B, K, S, D]; gives ``present_...`` [B, K, S+1, D]."""
    graph = model.graph
    cache = [f"past_{kind}_{layer}" for layer in range(len(model.ports)) for kind in ("key", "value")]
    shape: Shape = ["B", model.config.n_kv_heads, "S", model.config.head_dim]
    grown: Shape = ["B", model.config.n_kv_heads, "S+1", model.config.head_dim]
    graph.graph.initializer.append(helper.make_tensor("time_axis", TensorProto.INT64, [1], [2]))
    return _with_attention(
        graph,
        lambda layer: _onnx_attention(model, layer),
        inputs=[_float_info(name, shape) for name in cache],
        outputs=[_float_info(name.replace("past", "present"), grown) for name in cache],
    )


def graph_with_group_query_attention(model: ExportedModel, cache_tokens: int) -> ModelProto:
    """ONNX Runtime's own GroupQueryAttention, which writes the new token into a cache of ``cache_tokens`` in place.

    Inputs ``past_...`` and outputs ``present_...`` [B, K, cache_tokens, D] must be bound to the same memory; ``past_len`` [B]
    int32 is the number of cached tokens, ``total_len`` int32 that number plus one.
    """
    graph = model.graph
    cache = [f"past_{kind}_{layer}" for layer in range(len(model.ports)) for kind in ("key", "value")]
    shape: Shape = ["B", model.config.n_kv_heads, cache_tokens, model.config.head_dim]
    graph.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    graph.graph.initializer.append(helper.make_tensor("flat_3d", TensorProto.INT64, [3], [0, 1, -1]))
    graph.graph.initializer.append(
        helper.make_tensor("heads_3d", TensorProto.INT64, [3], [0, model.config.n_heads, model.config.head_dim])
    )
    lengths = [
        helper.make_tensor_value_info("past_len", TensorProto.INT32, ["B"]),
        helper.make_tensor_value_info("total_len", TensorProto.INT32, []),
    ]
    return _with_attention(
        graph,
        lambda layer: _group_query_attention(model, layer),
        inputs=[*lengths, *(_float_info(name, shape) for name in cache)],
        outputs=[_float_info(name.replace("past", "present"), shape) for name in cache],
    )


def session_from_graph(graph: ModelProto, path: Path, session_options: Mapping[str, str]) -> ort.InferenceSession:
    """A CPU session of ``graph``, saved at ``path`` in the folder of its weights."""
    path.write_bytes(graph.SerializeToString())
    options = ort.SessionOptions()
    for name, value in session_options.items():
        options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def bound_step(
    session: ort.InferenceSession, step: dict[str, np.ndarray], cache: dict[str, Floats], *, in_place: bool
) -> Callable[[], Floats]:
    """A decode step with everything bound beforehand: caches ``past_...`` in, ``present_...`` out; returns logits [B, V].

    Repeats the same step: output caches are not fed back.
    """
    binding = session.io_binding()
    for name, array in step.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, array in cache.items():
        past = ort.OrtValue.ortvalue_from_numpy(array)
        n_B, n_kv_heads, n_cached, head_size = array.shape
        grown = ort.OrtValue.ortvalue_from_shape_and_type([n_B, n_kv_heads, n_cached + 1, head_size], np.float32)
        binding.bind_ortvalue_input(name, past)
        binding.bind_ortvalue_output(name.replace("past", "present"), past if in_place else grown)
    binding.bind_output("logits")

    def run() -> Floats:
        session.run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits

    return run


def _with_attention(
    graph: ModelProto,
    attention: Callable[[int], Iterable[NodeProto]],
    *,
    inputs: Sequence[ValueInfoProto] = (),
    outputs: Sequence[ValueInfoProto] = (),
) -> ModelProto:
    """``graph`` with ``attention(layer)`` in place of each KV op, and ``inputs`` and ``outputs`` in place of the KV state."""
    nodes: list[NodeProto] = []
    layers = itertools.count()
    for node in graph.graph.node:
        nodes += [node] if node.domain != DOMAIN else attention(next(layers))
    step = [info for info in graph.graph.input if info.name in STEP_INPUTS]
    logits = [info for info in graph.graph.output if info.name == "logits"]
    made = helper.make_graph(nodes, "monolithic", [*step, *inputs], [*outputs, *logits], list(graph.graph.initializer))
    opsets = [opset for opset in graph.opset_import if opset.domain != DOMAIN]
    return helper.make_model(made, opset_imports=opsets, ir_version=graph.ir_version)


def _onnx_attention(model: ExportedModel, layer: int) -> Iterator[NodeProto]:
    port, cache = model.ports[layer], (f"past_key_{layer}", f"past_value_{layer}")
    flat = (port.q, port.k, port.v)
    for name in flat:
        yield helper.make_node("Unsqueeze", [name, "time_axis"], [f"{name}_4d"])
    yield helper.make_node(
        "Attention",
        [*(f"{name}_4d" for name in flat), "", *cache],
        [f"{port.out}_4d", *(name.replace("past", "present") for name in cache)],
        scale=model.config.scale,
    )
    yield helper.make_node("Squeeze", [f"{port.out}_4d", "time_axis"], [port.out])


def _group_query_attention(model: ExportedModel, layer: int) -> Iterator[NodeProto]:
    port, cache = model.ports[layer], (f"past_key_{layer}", f"past_value_{layer}")
    flat = (port.q, port.k, port.v)
    for name in flat:
        yield helper.make_node("Reshape", [name, "flat_3d"], [f"{name}_3d"])
    yield helper.make_node(
        "GroupQueryAttention",
        [*(f"{name}_3d" for name in flat), *cache, "past_len", "total_len"],
        [f"{port.out}_3d", *(name.replace("past", "present") for name in cache)],
        domain=MICROSOFT,
        num_heads=model.config.n_heads,
        kv_num_heads=model.config.n_kv_heads,
        scale=model.config.scale,
    )
    yield helper.make_node("Reshape", [f"{port.out}_3d", "heads_3d"], [port.out])


def _float_info(name: str, shape: Shape) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
