"""The parts of an engine for ONNX Runtime other than its graphs: the graph segments, and the index of its weights.

The index refers to big weights in the graphs' external data. Small weights, which graphs hold inside, are copied to a file.
"""

from pathlib import Path

import onnx
import torch

from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.packed_weights import PackedWeights, stored_name
from trt_kv.export.split import save_segments, segments_from_graph
from trt_kv.export.targets.parts import Parts
from trt_kv.weight_index import PackedWeight, StoredWeight, WeightIndex

SMALL_WEIGHTS_FILE = "small_weights.data"


def save_onnxruntime_parts(
    checkpoint: Checkpoint, graph: onnx.ModelProto, folder: Path, *, dtype: str, packed: PackedWeights | None
) -> Parts:
    """Write the segments of ``graph``, the decode graph in ``folder``, and the index of weights."""
    models, segments, ports = segments_from_graph(graph)
    save_segments(models, segments, folder)
    save_weight_index(checkpoint, graph, folder, dtype=dtype, packed=packed)
    return Parts(segments=tuple(segments), ports=tuple(ports))


def save_weight_index(
    checkpoint: Checkpoint, graph: onnx.ModelProto, folder: Path, *, dtype: str, packed: PackedWeights | None
) -> None:
    """Write ``weights.json`` and ``small_weights.data`` beside the graphs in ``folder``, of which ``graph`` is one."""
    places = {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places[stored_name(tensor.name)] = entries["location"], int(entries.get("offset", "0"))
    formats = {} if packed is None else packed.formats
    weights, matrices = [], []
    with (folder / SMALL_WEIGHTS_FILE).open("wb") as file:
        for name, shape in checkpoint.config.tensor_shapes().items():
            if name in formats:
                parts = [places[f"{name}.{part}"] for part in formats[name].part_shapes(shape)]
                offsets = tuple(offset for _, offset in parts)
                matrices.append(
                    PackedWeight(name=name, file=parts[0][0], shape=tuple(shape), format=formats[name], offsets=offsets)
                )
                continue
            if name not in places:
                places[name] = SMALL_WEIGHTS_FILE, file.tell()
                tensor = checkpoint.tensor(name).to(getattr(torch, dtype)).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            location, offset = places[name]
            weights.append(StoredWeight(name=name, file=location, offset=offset, shape=tuple(shape)))
    WeightIndex(dtype=dtype, weights=tuple(weights), packed=tuple(matrices)).save(folder)
