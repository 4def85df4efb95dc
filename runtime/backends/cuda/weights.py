"""Loads the decoder as a torch module with an engine's weights, on a given device and in a given dtype."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from trt_kv.decoder import Decoder
from trt_kv.errors import EngineError
from trt_kv.model_config import ModelConfig
from trt_kv.safe_path import safe_join
from trt_kv.weight_index import WeightIndex, load_weight_index


def decoder_from_engine(
    graphs: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_weight: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The decoder whose weights are in the folder ``graphs``, in evaluation mode, without gradients.

    Weights are mapped, moved and converted one by one: the host holds none of them afterwards, unless ``device`` is the CPU.
    ``on_weight`` is called with (done, total). ``EngineError`` if a weight is missing.
    """
    index = load_weight_index(graphs, config.tensor_shapes())
    with torch.device("meta"):
        decoder = Decoder(config)
    weights = {}
    for done, (name, tensor) in enumerate(_tensors(graphs, index), start=1):
        weights[name] = tensor.to(device).to(dtype)
        if on_weight is not None:
            on_weight(done, len(index.weights))
    decoder.load_state_dict(weights, assign=True)
    return decoder.to(device).requires_grad_(False).eval()


def _tensors(folder: Path, index: WeightIndex) -> Iterator[tuple[str, Tensor]]:
    """Each weight by name, mapped from its file: bytes are read from disk when they are used, and never written."""
    files: dict[str, Tensor] = {}
    for weight in index.weights:
        if weight.file not in files:
            path = safe_join(folder, weight.file, error=EngineError)
            files[weight.file] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        flat = files[weight.file][weight.offset : weight.offset + index.n_bytes(weight)]
        yield weight.name, flat.view(getattr(torch, index.dtype)).view(weight.shape)
