"""Emits a spec's op as one node of domain ``trt_kv`` in a torch program that is being exported."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trt_kv.opspec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES, AttributeValue, DType, OpSpec


def emit_node(spec: OpSpec, tensors: dict[str, Tensor], attributes: Mapping[str, AttributeValue]) -> None:
    """Emit the op on ``tensors`` (by the spec's names) and put its results there; an updated state replaces its old value.

    An optional input is connected if ``tensors`` has it: as an output of an earlier op, or as state of the layer. The node has
    every attribute, defaults included, because the TensorRT plugin sees only those of the node.
    """
    inputs = [t for t in spec.inputs if not t.optional or t.name in tensors]
    sizes = {axis: size for t in inputs for axis, size in zip(t.axes, tensors[t.name].shape, strict=True)}
    compute_dtype = tensors["kv"].dtype
    outputs = (*spec.outputs, *spec.states)
    results = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{spec.name}",
        [tensors[t.name] for t in inputs],
        attrs={**{a.name: attributes[a.name] for a in spec.attributes}, **PLUGIN_ATTRIBUTES},
        dtypes=[_torch_dtype(t.dtype, compute_dtype) for t in outputs],
        shapes=[[sizes[axis] for axis in t.axes] for t in outputs],
        version=OP_VERSION,
    )
    tensors.update(zip((t.name for t in outputs), results, strict=True))


def _torch_dtype(dtype: DType, compute_dtype: torch.dtype) -> torch.dtype:
    return {"float": compute_dtype, "float32": torch.float32, "int64": torch.int64}[dtype]
