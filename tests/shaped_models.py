"""Models with the shapes of large checkpoints and no weights to speak of: all layers share one file of holes."""

import math
from pathlib import Path

import onnx_ir as ir
import torch

from trt_kv.export.checkpoints.huggingface import HuggingFaceCheckpoint
from trt_kv.export.graph import graph_from_checkpoint
from trt_kv.model_config import ModelConfig, RopeConfig
from trt_kv.program import Program

LLAMA_31_8B = ModelConfig(
    architecture="llama",
    n_layers=32,
    hidden_size=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    max_positions=131072,
    rope=RopeConfig(
        theta=500000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
    tie_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    bos_token_id=128000,
    eos_token_ids=(128001,),
)


class ShapedCheckpoint(HuggingFaceCheckpoint):
    """Zeros of the right shapes, in no memory."""

    def tensor(self, name: str) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bfloat16).expand(self.config.tensor_shapes()[name])


def save_shaped_graph(config: ModelConfig, program: Program, path: Path, *, page_size: int, dtype: torch.dtype) -> None:
    """Write the graph; every layer uses layer 0's weights, the head the embedding's, and the file has only holes."""
    checkpoint = ShapedCheckpoint(location=path.parent, config=config, eos_token_ids=config.eos_token_ids, stored={})
    model = graph_from_checkpoint(checkpoint, program, page_size=page_size, dtype=dtype)
    weights = model.graph.initializers
    for name in list(weights):
        kept = weights.get(_shared_name(name))
        if kept is not None and kept is not weights[name]:
            ir.convenience.replace_all_uses_with(weights[name], kept)
            del weights[name]
    offset = 0
    for name, value in weights.items():
        assert value.shape is not None
        assert value.dtype is not None
        shape = value.shape.numpy()
        if math.prod(shape) > 4096:
            n_bytes = int(math.prod(shape) * value.dtype.itemsize)
            value.const_value = ir.ExternalTensor(
                "holes.data", offset, n_bytes, value.dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
            )
            offset += n_bytes
    with (path.parent / "holes.data").open("wb") as file:
        file.truncate(offset)
    ir.save(model, path)


def _shared_name(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join(["model", "layers", "0", *parts[3:]])
    return "model.embed_tokens.weight" if name == "lm_head.weight" else name
