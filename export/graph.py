"""Decoder -> one token-flat ONNX graph per phase, KV ops as nodes, weights streamed from the checkpoint.

The decoder is traced with weights that take no memory; the real ones are read, converted and written one tensor at a time,
so that exporting needs memory for the largest tensor and not for the model.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor, nn

from trt_kv.export.checkpoint import Checkpoint
from trt_kv.export.decoder import Decoder
from trt_kv.model_config import ModelConfig
from trt_kv.opspec import DOMAIN, TensorSpec
from trt_kv.plugins.onnx_function import OPSET, onnx_function
from trt_kv.plugins.onnx_node import emit_node
from trt_kv.plugins.registry import op_specs
from trt_kv.plugins.tensors import POSITIONS
from trt_kv.program import Program

WEIGHTS_FILE = "weights.data"
TRACED_EXACTLY = 4096
"""Weights of at most this many elements are traced with their values: the exporter shares small tensors that are equal."""

ALIGNMENT = 4096

LOGIT_ROWS = TensorSpec(name="logit_rows", axes=("R",), dtype="int64", doc="rows of this step whose logits are wanted")
_EXAMPLE_SIZES = {"N": 7, "R": 3, "B": 2, "B+1": 3, "T": 5, "M": 11}
_DTYPES = {"float": torch.float32, "float32": torch.float32, "int64": torch.int64}
_DIMS = {axis: torch.export.Dim(axis) for axis in ("N", "R", "B", "T", "M")}
_DIMS["B+1"] = _DIMS["B"] + 1


def graph_from_checkpoint(checkpoint: Checkpoint, program: Program, *, page_size: int) -> ir.Model:
    """The monolithic graph of one phase, fp32, opset 23; big weights are still lazy references into the checkpoint.

    Inputs, by name: input_ids [N], positions [N], logit_rows [R], the step tensors the program's ops read, and each layer's
    KV state ``<state>_<layer>``. Outputs: logits [R, V], ``kept_<layer>`` [B] where the program evicts, and
    ``<state>_<layer>_out``.
    """
    module = _TokenFlatModule(_traceable_decoder(checkpoint), program)
    sizes = _EXAMPLE_SIZES | _fixed_sizes(checkpoint.config, page_size)
    inputs = module.inputs
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module,
            tuple(torch.zeros([sizes[axis] for axis in t.axes], dtype=_DTYPES[t.dtype]) for t in inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(inputs),
            output_names=module.output_names,
            dynamic_shapes={
                "tensors": tuple({i: _DIMS[a] for i, a in enumerate(t.axes) if a in _DIMS} for t in inputs.values())
            },
        )
    assert exported is not None
    _use_checkpoint_weights(exported.model, checkpoint)
    for spec in module.specs:
        function = onnx_function(spec)
        exported.model.functions[function.identifier()] = function
    exported.model.producer_name = "trt-kv"
    for node in exported.model.graph:
        node.metadata_props.clear()  # the exporter's stack traces: paths of this machine
        if node.domain == DOMAIN:
            node.name = f"layer_{node.attributes['layer'].as_int()}/{node.op_type}"
    return exported.model


def save_graphs(graphs: Mapping[str, ir.Model], folder: Path, on_weight: Callable[[int, int], None] | None = None) -> None:
    """Write ``<name>.onnx`` for each graph and the weights they share once, as ``weights.data``, streaming tensor by tensor."""
    shared: dict[str, ir.ExternalTensor] = {}
    weights = {name: value for graph in graphs.values() for name, value in graph.graph.initializers.items()}
    big = [name for name, value in weights.items() if _is_big(value)]
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for done, name in enumerate(big, start=1):
            shared[name] = _append_tensor(file, name, weights[name].const_value, folder)
            if on_weight is not None:
                on_weight(done, len(big))
    for graph_name, model in graphs.items():
        for name, tensor in shared.items():
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = tensor
        ir.save(model, folder / f"{graph_name}.onnx")


class _TokenFlatModule(nn.Module):
    """The decoder with its KV ops: flat tensors in, logits and states out."""

    def __init__(self, decoder: Decoder, program: Program) -> None:
        super().__init__()
        self.decoder = decoder
        self._program = program
        used = {node.op for nodes in program for node in nodes}
        self.specs = [spec for name, spec in op_specs().items() if name in used]
        made = {"q", "k", "v"} | {t.name for spec in self.specs for t in spec.outputs}
        read = {t.name: t for spec in self.specs for t in spec.inputs if not t.optional and t.name not in made}
        self._states = {t.name: t for spec in self.specs for t in spec.states}
        self._step = {name: t for name, t in read.items() if name not in self._states}
        self._results = [t.name for spec in self.specs if spec.name == "EvictTokens" for t in spec.outputs]
        self._n_layers = len(program)

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """Graph inputs in order."""
        flat = {"input_ids": POSITIONS, "positions": POSITIONS, "logit_rows": LOGIT_ROWS} | self._step
        return flat | {f"{name}_{layer}": t for name, t in self._states.items() for layer in range(self._n_layers)}

    @property
    def output_names(self) -> list[str]:
        """Graph outputs in order."""
        results = [f"{name}_{layer}" for name in self._results for layer in range(self._n_layers)]
        return ["logits", *results, *(f"{name}_{layer}_out" for name in self._states for layer in range(self._n_layers))]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(self.inputs, tensors, strict=True))
        step = {name: named[name] for name in self._step}
        layers: list[dict[str, Tensor]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            values = {**step, **{name: named[f"{name}_{layer}"] for name in self._states}, "q": q, "k": k, "v": v}
            for node in self._program[layer]:
                emit_node(op_specs()[node.op], values, node.attributes)
            layers.append(values)
            return values["out"]

        logits = self.decoder(named["input_ids"], named["positions"], named["logit_rows"], attend)
        results = [values[name] for name in self._results for values in layers]
        return [logits, *results, *(values[name] for name in self._states for values in layers)]


def _traceable_decoder(checkpoint: Checkpoint) -> Decoder:
    """The decoder with one zero, repeated without memory, for every big weight, and the real values of the small ones."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    weights = {
        name: checkpoint.tensor(name).float() if value.numel() <= TRACED_EXACTLY else torch.zeros(()).expand(value.shape)
        for name, value in decoder.state_dict().items()
    }
    decoder.load_state_dict(weights, assign=True)
    return decoder.requires_grad_(False).eval()


def _use_checkpoint_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Name initializers as the checkpoint does, and let the big ones read from it when they are written."""
    for value in list(model.graph.initializers.values()):
        name = (value.name or "").removeprefix("decoder.")
        value.name = name
        if _is_big(value):
            value.const_value = _lazy_weight(checkpoint, name)


def _lazy_weight(checkpoint: Checkpoint, name: str) -> ir.LazyTensor:
    shape = ir.Shape(checkpoint.config.tensor_shapes()[name])
    return ir.LazyTensor(
        lambda: ir.tensor(checkpoint.tensor(name).float().numpy()), dtype=ir.DataType.FLOAT, shape=shape, name=name
    )


def _is_big(value: ir.Value) -> bool:
    assert value.shape is not None
    return math.prod(value.shape.numpy()) > TRACED_EXACTLY


def _append_tensor(file: BinaryIO, name: str, tensor: ir.TensorProtocol | None, folder: Path) -> ir.ExternalTensor:
    """Write one tensor at the next aligned offset, so that ONNX Runtime can map it."""
    assert tensor is not None
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    array = tensor.numpy()
    file.write(array.data)
    return ir.ExternalTensor(
        WEIGHTS_FILE, offset, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name, base_dir=folder
    )


def _fixed_sizes(config: ModelConfig, page_size: int) -> dict[str, int]:
    return {"2": 2, "K": config.n_kv_heads, "D": config.head_dim, "H": config.n_heads, "P": page_size, "L": config.n_layers}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs which optional packages it did without; nobody can act on that."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
