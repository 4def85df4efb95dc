"""Small quantised checkpoints, and the values that the libraries or definitions of their formats give their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import edit_config
from trt_kv.export.checkpoints.huggingface import SINGLE_FILE

Tensors = dict[str, Tensor]
Quantise = Callable[[Tensor], tuple[Tensors, Tensor]]
"""The parts that a weight [O, I] is stored as, and the values that they stand for."""

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GROUP = 16
FP8_CONFIG: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def ct_config(**weights: Any) -> dict[str, Any]:
    form = weights.pop("format")
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"group_0": group}}


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [ceil(O / rows), ceil(I / columns)] of one scale per block."""
    rows, columns = block
    n_rows, n_columns = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale, codes = torch.empty(n_rows, n_columns), torch.empty_like(weight)
    for r in range(n_rows):
        for c in range(n_columns):
            part = (slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))
            scale[r, c] = weight[part].abs().max() / 448.0
            codes[part] = weight[part] / scale[r, c]
    return codes.to(torch.float8_e4m3fn), scale


def fp8_blocks(block: tuple[int, int]) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scale = to_fp8(weight, block)
        o, i = (torch.arange(n) // size for n, size in zip(weight.shape, block, strict=True))
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * scale[o][:, i]

    return quantise


def fp8_scaled(form: str) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scale = to_fp8(weight, (len(weight) if form == "tensor" else 1, weight.shape[1]))
        stored = {"tensor": scale[0, 0], "one": scale[0], "channel": scale, "channel, flat": scale[:, 0]}
        if form == "one":
            codes, scale = to_fp8(weight, (len(weight), weight.shape[1]))
            stored["one"] = scale[0]
        parts = {"weight": codes, "weight_scale": stored[form].clone(), "input_scale": torch.tensor(0.5)}
        return parts, codes.float() * scale

    return quantise


def fp8_exponents(weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scale = to_fp8(weight, (16, 16))
    exponents = (scale.log2().ceil() + 127).to(torch.uint8)
    values = (exponents.float() - 127).exp2().repeat_interleave(16, 0).repeat_interleave(16, 1)
    return {"weight": codes, "weight_scale_inv": exponents}, codes.float() * values


def compressed(*, groups: bool = False, **args: Any) -> Quantise:
    """By the library itself; random scales and zero points are as good as calibrated ones."""
    form = args.pop("format")
    compressor = PackedQuantizationCompressor if form == "pack-quantized" else NaiveQuantizationCompressor
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=form)

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        assert scheme.weights is not None
        strategy, n_bits = str(scheme.weights.strategy), scheme.weights.num_bits
        size = scheme.weights.group_size or 1
        shape = {
            "tensor": (1,),
            "channel": (len(weight), 1),
            "group": (len(weight), weight.shape[1] // size),
            "block": (-(-len(weight) // 32), -(-weight.shape[1] // 24)),
        }[strategy]
        generator = torch.Generator().manual_seed(weight.shape[1])
        state = {"weight": weight, "weight_scale": 0.01 + 0.1 * torch.rand(shape, generator=generator)}
        if not scheme.weights.symmetric:
            low = -(1 << (n_bits - 1))
            state["weight_zero_point"] = torch.randint(low, -low, shape, generator=generator, dtype=torch.int8)
        parts = compressor.compress(state, scheme)
        values = compressor.decompress(parts, scheme)["weight"]
        if not groups:
            return parts, values
        order = torch.randperm(weight.shape[1], generator=generator)
        codes = unpack_from_int32(parts["weight_packed"], n_bits, weight.shape)[:, order]
        group_of = (torch.arange(weight.shape[1]) // size)[order].to(torch.int32)
        return parts | {"weight_packed": pack_to_int32(codes, n_bits), "weight_g_idx": group_of}, values[:, order]

    return quantise


def random_words(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def gptq(n_bits: int, *, group_size: int = GROUP, offset: int = 1, permuted: bool = False, bias: bool = False) -> Quantise:
    """By definition, one weight after the other, from random words."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        n_outputs, n_inputs = weight.shape
        n_groups = 1 if group_size == -1 else n_inputs // group_size
        per_word = 32 // n_bits
        parts = {
            "qweight": random_words((n_inputs // per_word, n_outputs), 1),
            "qzeros": random_words((n_groups, n_outputs // per_word), 2),
            "scales": torch.rand(n_groups, n_outputs, generator=torch.Generator().manual_seed(3)).half() / 50,
        }
        group_of = torch.arange(n_inputs) // (n_inputs // n_groups)
        if permuted:
            group_of = group_of[torch.randperm(n_inputs, generator=torch.Generator().manual_seed(4))]
            parts["g_idx"] = group_of.to(torch.int32)
        if bias:
            parts["bias"] = torch.zeros(n_outputs, dtype=torch.float16)
        words, zeros, scales = parts["qweight"].tolist(), parts["qzeros"].tolist(), parts["scales"].tolist()

        def bits(word: int, at: int) -> int:
            return (word >> (n_bits * at)) & ((1 << n_bits) - 1)

        values = [
            [
                (
                    bits(words[i // per_word][o], i % per_word)
                    - bits(zeros[int(group_of[i])][o // per_word], o % per_word)
                    - offset
                )
                * scales[int(group_of[i])][o]
                for i in range(n_inputs)
            ]
            for o in range(n_outputs)
        ]
        return parts, torch.tensor(values)

    return quantise


def awq(*, zero_point: bool = True) -> Quantise:
    """compressed-tensors' reading of random words."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        n_outputs, n_inputs = weight.shape
        parts = {
            "qweight": random_words((n_inputs, n_outputs // 8), 1),
            "scales": torch.rand(n_inputs // GROUP, n_outputs, generator=torch.Generator().manual_seed(3)) / 50,
        }
        if zero_point:
            parts["qzeros"] = random_words((n_inputs // GROUP, n_outputs // 8), 2)
        converter = AutoAWQConverter(bits=4, group_size=GROUP, zero_point=zero_point, version="gemm", ignore=[], targets=[])
        theirs = converter.process({f"x.{name}": tensor for name, tensor in parts.items()})
        scheme = converter._build_quant_config().config_groups["config_group_0"]
        state = {name.removeprefix("x."): tensor for name, tensor in theirs.items()}
        return parts, PackedQuantizationCompressor.decompress(state, scheme)["weight"]

    return quantise


GPTQ_CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ_CONFIG: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
INT4: dict[str, Any] = {"format": "pack-quantized", "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
INT8: dict[str, Any] = {"format": "int-quantized", "num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT: dict[str, Any] = {"format": "float-quantized", "num_bits": 8, "type": "float"}

SCHEMES: dict[str, tuple[dict[str, Any], Quantise]] = {
    "fp8 blocks": (FP8_CONFIG | {"weight_block_size": [16, 24]}, fp8_blocks((16, 24))),
    "fp8 blocks that do not divide": (FP8_CONFIG | {"weight_block_size": [17, 13]}, fp8_blocks((17, 13))),
    "fp8 blocks larger than the matrix": (FP8_CONFIG | {"weight_block_size": [128, 128]}, fp8_blocks((128, 128))),
    "fp8 exponents": (FP8_CONFIG | {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"}, fp8_exponents),
    "fp8 per tensor": (FP8_CONFIG, fp8_scaled("tensor")),
    "fp8 per tensor, a vector": (FP8_CONFIG, fp8_scaled("one")),
    "fp8 per channel": ({"quant_method": "fbgemm_fp8"}, fp8_scaled("channel")),
    "fp8 per channel, a vector": ({"quant_method": "fp8"}, fp8_scaled("channel, flat")),
    "ct float per tensor": (ct_config(**FLOAT, strategy="tensor"), compressed(**FLOAT, strategy="tensor")),
    "ct float per channel": (ct_config(**FLOAT, strategy="channel"), compressed(**FLOAT, strategy="channel")),
    "ct float blocks": (
        ct_config(**FLOAT, strategy="block", block_structure=[32, 24]),
        compressed(**FLOAT, strategy="block", block_structure=[32, 24]),
    ),
    "ct int8 per channel": (ct_config(**INT8), compressed(**INT8)),
    "ct int8 with zero points": (ct_config(**INT8, symmetric=False), compressed(**INT8, symmetric=False)),
    "ct int8 groups": (
        ct_config(**INT8 | {"format": "naive-quantized", "strategy": "group", "group_size": GROUP}),
        compressed(**INT8 | {"format": "naive-quantized", "strategy": "group", "group_size": GROUP}),
    ),
    "ct int4 groups": (ct_config(**INT4), compressed(**INT4)),
    "ct int4 with zero points": (ct_config(**INT4, symmetric=False), compressed(**INT4, symmetric=False)),
    "ct int4 per channel": (
        ct_config(**INT4 | {"strategy": "channel", "group_size": None}),
        compressed(**INT4 | {"strategy": "channel", "group_size": None}),
    ),
    "ct int4 in activation order": (
        ct_config(**INT4, symmetric=False, actorder="group"),
        compressed(**INT4, symmetric=False, groups=True),
    ),
    "ct int8 packed": (ct_config(**INT4 | {"num_bits": 8}), compressed(**INT4 | {"num_bits": 8})),
    "gptq": (GPTQ_CONFIG, gptq(4)),
    "gptq with biases of zeros": (GPTQ_CONFIG, gptq(4, bias=True)),
    "gptq in activation order": (GPTQ_CONFIG | {"desc_act": True}, gptq(4, permuted=True)),
    "gptq version 2": (GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, gptq(4, offset=0)),
    "gptq 8 bits, one group": (GPTQ_CONFIG | {"bits": 8, "group_size": -1}, gptq(8, group_size=-1)),
    "gptq 2 bits": (GPTQ_CONFIG | {"bits": 2}, gptq(2)),
    "awq": (AWQ_CONFIG, awq()),
    "awq without zero points": (AWQ_CONFIG | {"zero_point": False}, awq(zero_point=False)),
}


def quantised(folder: Path, config: dict[str, Any], quantise: Quantise) -> Tensors:
    """Rewrite the projections of the checkpoint in ``folder``; returns the values of all weights."""
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        if name.endswith("proj.weight"):
            parts, values[name] = quantise(tensor)
            stored |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = values[name] = tensor
    save_file(stored, folder / SINGLE_FILE)
    edit_config(folder, quantization_config=config)
    return values
