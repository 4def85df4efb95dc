"""Weights made of several stored tensors, in place of those tensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.quantized.layouts import Layout
from trt_kv.export.checkpoints.quantized.schemes import Scheme
from trt_kv.export.checkpoints.safetensors_file import WEIGHT_DTYPES, StoredTensor

if TYPE_CHECKING:
    import torch

_OF_ACTIVATIONS = frozenset(
    {
        *("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
        *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
    }
)
"""Scales of activations and of the KV cache: the runtime rounds neither."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(StoredTensor):
    """A weight whose ``parts`` are stored as ``layout`` says; ``dtype`` and ``shape`` are those of its values."""

    layout: Layout
    parts: Mapping[str, StoredTensor]

    def chunks(self) -> Iterator[bytes]:
        """The layout, and the parts as they are stored."""
        yield json.dumps(repr(self.layout)).encode()
        for name in self.layout.parts:
            part = self.parts[name]
            yield json.dumps([name, part.dtype, part.shape]).encode()
            yield from part.chunks()

    def read(self) -> "torch.Tensor":
        """The dequantised weight [O, I] fp32."""
        try:
            return self.layout.weight_of({name: self.parts[name].read() for name in self.layout.parts})
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.name!r} of {self.path}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
            ) from error


def assembled(stored: Mapping[str, StoredTensor], scheme: Scheme, folder: Path) -> dict[str, StoredTensor]:
    """``stored`` with each quantised weight as one ``QuantizedTensor`` in place of its parts, without scales of activations.

    Everything else is passed as it is. ``CheckpointError`` if parts are missing or do not fit together, or if nothing is
    quantised, although config.json says so.
    """
    of_module: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        of_module.setdefault(module, {})[part] = tensor
    found: dict[str, StoredTensor] = {}
    n_quantized = 0
    for module, parts in of_module.items():
        layout = scheme.layout_of(module, parts)
        left = {part: tensor for part, tensor in parts.items() if part not in _OF_ACTIVATIONS}
        if layout is not None:
            n_quantized += 1
            found[f"{module}.weight"] = _assembled_one(module, parts, layout)
            read = {*layout.parts, *scheme.unread_parts}
            left = {part: tensor for part, tensor in left.items() if part not in read and not _is_void(part, tensor, scheme)}
        found |= {f"{module}.{part}" if module else part: tensor for part, tensor in left.items()}
    if not n_quantized:
        raise CheckpointError(
            f"config.json in {folder} describes {scheme.name} weights, but none of its tensors is stored in that way",
            got=", ".join(sorted({tensor.dtype for tensor in stored.values()})),
            expected=scheme.name,
            fix="take config.json and the weights from the same checkpoint; if these are the original weights, remove its "
            "quantization_config",
        )
    return found


def _assembled_one(module: str, parts: Mapping[str, StoredTensor], layout: Layout) -> QuantizedTensor:
    missing = [part for part in layout.parts if part not in parts]
    first = next(iter(parts.values()))
    if missing:
        raise CheckpointError(
            f"the quantised weight of {module!r} in {first.path} is not complete",
            got="no " + ", ".join(f"{module}.{part}" for part in missing),
            expected=", ".join(layout.parts),
            fix="download the checkpoint again",
        )
    shape = layout.shape_of(parts)
    codes = parts[layout.parts[0]]
    n_bytes = sum(parts[part].n_bytes for part in layout.parts)
    used = {part: parts[part] for part in layout.parts}
    return QuantizedTensor(
        path=codes.path,
        name=f"{module}.weight",
        dtype="F32",
        shape=shape,
        start=codes.start,
        n_bytes=n_bytes,
        layout=layout,
        parts=used,
    )


def _is_void(part: str, tensor: StoredTensor, scheme: Scheme) -> bool:
    """Whether it is a bias of zeros, which quantisers add to every layer, whether the model has biases or not."""
    return part == "bias" and scheme.adds_biases and tensor.dtype in WEIGHT_DTYPES and not tensor.read().any()
