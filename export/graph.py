"""Decoder -> one token-flat ONNX graph per phase, KV ops as nodes, weights streamed from the checkpoint.

The decoder is traced with weights that take no memory. The real weights are read, converted and written one tensor at a
time, so that export needs memory for the largest tensor only.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from trt_kv.decoder import Decoder
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.packed_weights import is_traced_exactly, stored_name
from trt_kv.model_config import ModelConfig
from trt_kv.opspec import DOMAIN
from trt_kv.plugins.graph_io import graph_inputs, graph_outputs, made_by, specs_of, states_of, step_tensors_of
from trt_kv.plugins.onnx_function import OPSET, onnx_function
from trt_kv.plugins.onnx_node import emit_node
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.plugins.registry import op_specs
from trt_kv.program import Program

WEIGHTS_FILE = "weights.data"
ALIGNMENT = 4096

_EXAMPLE_SIZES = {"N": 7, "R": 3, "B": 2, "B+1": 3, "T": 5, "M": 11, "U": 13}
_DTYPES = {"float32": torch.float32, "int64": torch.int64}
_DIMS = {axis: torch.export.Dim(axis) for axis in ("N", "R", "B", "T", "M", "U")}
_DIMS["B+1"] = _DIMS["B"] + 1


def graph_from_checkpoint(
    checkpoint: Checkpoint, program: Program, *, page_size: int, dtype: torch.dtype = torch.float32
) -> ir.Model:
    """The monolithic graph of one phase, computing in ``dtype``, opset 23; big weights are still lazy references into the
    checkpoint. Scores and log-sum-exps are fp32 whatever the ``dtype``.

    Inputs, by name: input_ids [N], positions [N], logit_rows [R], the step tensors the program's ops read, and each layer's
    KV state ``<state>_<layer>``. Outputs: logits [R, V], ``<result>_<layer>`` for results of the layer's ops that the runtime
    reads (such as ``kept`` [B] if it evicts), and ``<state>_<layer>_out``.
    """
    module = _TokenFlatModule(_traceable_decoder(checkpoint, dtype), program)
    sizes = _EXAMPLE_SIZES | _fixed_sizes(checkpoint.config, program, page_size)
    inputs = graph_inputs(program)
    dtypes = _DTYPES | {"float": dtype}
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module,
            tuple(_example([sizes[axis] for axis in t.axes], dtypes[t.dtype]) for t in inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(inputs),
            output_names=list(graph_outputs(program)),
            dynamic_shapes={
                "tensors": tuple({i: _DIMS[a] for i, a in enumerate(t.axes) if a in _DIMS} for t in inputs.values())
            },
        )
    assert exported is not None
    _use_checkpoint_weights(exported.model, checkpoint, dtype)
    there = made_by(program) | set(states_of(program))
    for spec in specs_of(program):
        function = onnx_function(spec, with_optional_inputs=any(t.name in there for t in spec.inputs if t.optional))
        exported.model.functions[function.identifier()] = function
    exported.model.producer_name = "trt-kv"
    for node in exported.model.graph:
        node.metadata_props.clear()  # the exporter's stack traces: paths of this machine
        if node.domain == DOMAIN:
            node.name = f"layer_{node.attributes['layer'].as_int()}/{node.op_type}"
    return exported.model


def save_graphs(
    graphs: Mapping[str, ir.Model],
    folder: Path,
    on_weight: Callable[[int, int], None] | None = None,
    *,
    offsets: Mapping[str, int] | None = None,
) -> None:
    """Write ``<name>.onnx`` for each graph and their shared weights once, as ``weights.data``, streaming tensor by tensor.

    ``offsets``: of each big array, by ``stored_name``, in the file ``weights.data`` that is in ``folder`` already; None: write
    it. The file is read-only, because engines of one checkpoint share it.
    """
    weights = {name: value for graph in graphs.values() for name, value in graph.graph.initializers.items()}
    big = {name: value.const_value for name, value in weights.items() if isinstance(value.const_value, ir.LazyTensor)}
    if offsets is None:
        offsets = {}
        with (folder / WEIGHTS_FILE).open("wb") as file:
            for done, (name, tensor) in enumerate(big.items(), start=1):
                if stored_name(name) not in offsets:
                    offsets[stored_name(name)] = _append_tensor(file, tensor)
                if on_weight is not None:
                    on_weight(done, len(big))
        (folder / WEIGHTS_FILE).chmod(0o444)
    shared = {name: _external(name, tensor, offsets[stored_name(name)], folder) for name, tensor in big.items()}
    for graph_name, model in graphs.items():
        for name, external in shared.items():
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = external
        ir.save(model, folder / f"{graph_name}.onnx")


class _TokenFlatModule(nn.Module):
    """The decoder with its KV ops: flat tensors in, logits and states out."""

    def __init__(self, decoder: Decoder, program: Program) -> None:
        super().__init__()
        self.decoder = decoder
        self._program = program
        self._heads_apart = len(program) // decoder.config.n_layers

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(graph_inputs(self._program), tensors, strict=True))
        step = {name: named[name] for name in step_tensors_of(self._program)}
        layers: list[dict[str, Tensor]] = []

        def attend_in(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nodes = self._program[layer]
            values = {**step, **{name: named[f"{name}_{layer}"] for name in states_of((nodes,))}, "q": q, "k": k, "v": v}
            for node in nodes:
                emit_node(op_specs()[node.op], values, node.attributes)
            layers.append(values)
            return values["out"]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n_apart = self._heads_apart
            if n_apart == 1:
                return attend_in(layer, q, k, v)
            group = q.shape[1] // n_apart
            outs = [
                attend_in(
                    layer * n_apart + head,
                    q[:, head * group : (head + 1) * group],
                    k[:, head : head + 1],
                    v[:, head : head + 1],
                )
                for head in range(n_apart)
            ]
            return torch.cat(outs, dim=1)

        logits = self.decoder(named["input_ids"], named["positions"], named["logit_rows"], attend)
        made = {
            f"{name}_{layer}{end}": v
            for layer, values in enumerate(layers)
            for name, v in values.items()
            for end in ("", "_out")
        }
        return [logits, *(made[name] for name in graph_outputs(self._program) if name != "logits")]


def _example(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory; pages may be as long as the model's context."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def _traceable_decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Decoder:
    """The decoder with an expanded zero scalar (no memory) for every big weight, and the real values of small ones."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    weights = {
        name: checkpoint.tensor(name).to(dtype)
        if is_traced_exactly(tuple(value.shape))
        else torch.zeros((), dtype=dtype).expand(value.shape)
        for name, value in decoder.state_dict().items()
    }
    decoder.load_state_dict(weights, assign=True)
    return decoder.requires_grad_(False).eval()


def _use_checkpoint_weights(model: ir.Model, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Name initializers as in the checkpoint, and make the big ones lazy: they are read from it when they are written."""
    for value in list(model.graph.initializers.values()):
        name = (value.name or "").removeprefix("decoder.")
        value.name = name
        if _is_big(value):
            value.const_value = _lazy_weight(checkpoint, name, dtype)


def _lazy_weight(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> ir.LazyTensor:
    shape = ir.Shape(checkpoint.config.tensor_shapes()[name])
    return ir.LazyTensor(
        lambda: ir.tensor_adapters.TorchTensor(checkpoint.tensor(name).to(dtype), name=name),
        dtype=ir.tensor_adapters.from_torch_dtype(dtype),
        shape=shape,
        name=name,
    )


def _is_big(value: ir.Value) -> bool:
    assert value.shape is not None
    return not is_traced_exactly(value.shape.numpy())


def _append_tensor(file: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """Write one tensor at the next aligned offset, so that ONNX Runtime can map it; returns the offset."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(tensor.numpy().reshape(-1).view(np.uint8).data)
    return offset


def _external(name: str, tensor: ir.TensorProtocol, offset: int, folder: Path) -> ir.ExternalTensor:
    """The tensor as the graphs refer to it."""
    return ir.ExternalTensor(
        WEIGHTS_FILE, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=folder
    )


def _fixed_sizes(config: ModelConfig, program: Program, page_size: int) -> dict[str, int]:
    """Sizes of states and step tensors, which are of the layers of the cache."""
    n_apart = len(program) // config.n_layers
    of_heads = {"K": config.n_kv_heads // n_apart, "H": config.n_heads // n_apart}
    rows = most_rows(program, page_size, "float32")  # of every type that graphs compute in
    return {"2": 2, "S": rows, **of_heads, "D": config.head_dim, "P": page_size, "L": len(program)}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's log of missing optional packages, which users cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
