"""The types in which an engine stores and computes, as ``trt-kv inspect`` shows them."""

import math
from collections import defaultdict
from pathlib import Path

from trt_kv.manifest import GRAPHS, INT8_ACTIVATIONS, Manifest
from trt_kv.weight_index import FILE_NAME, BlockFormat, load_weight_index


def described_types(folder: Path, manifest: Manifest) -> list[str]:
    """Lines on the types of weights with their bytes, of activations, of the KV cache and of sums."""
    products = manifest.dtype
    if manifest.quantization is not None and manifest.quantization.accuracy_level == INT8_ACTIVATIONS:
        products += ", products with quantised weights of activations in int8"
    return [
        *_weights(folder, manifest),
        f"computes  in {products}",
        f"stores    keys and values in {manifest.kv_dtype}; attention, scores and sums of products are float32",
        *_runs(folder, manifest),
    ]


def _runs(folder: Path, manifest: Manifest) -> list[str]:
    """Of quantised weights: what runs the dense layers on a CPU by default, and why if it is not the kernels for them."""
    if manifest.quantization is None:
        return []
    from trt_kv.runtime.backends.host.dense import why_not_native

    reason = why_not_native(folder, manifest)
    return [f"runs      dense layers in {'kernels of our own' if reason is None else f'ONNX Runtime, because of {reason}'}"]


def _weights(folder: Path, manifest: Manifest) -> list[str]:
    """How many weights are stored in each format, and the bytes that they take."""
    if f"{GRAPHS}/{FILE_NAME}" not in manifest.files:
        return []
    index = load_weight_index(folder / GRAPHS, manifest.config.tensor_shapes())
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for matrix in index.packed:
        counts[_named(matrix.format)] += math.prod(matrix.shape)
        sizes[_named(matrix.format)] += sum(matrix.part_sizes.values())
    for weight in index.weights:
        counts[index.dtype] += math.prod(weight.shape)
        sizes[index.dtype] += index.n_bytes(weight)
    lines = [
        f"{name}: {count / 1e6:.2f} M, {sizes[name] / 2**20:.1f} MiB, {8 * sizes[name] / count:.2f} bits each"
        for name, count in counts.items()
    ]
    return [f"{'' if number else 'weights':<10}{line}" for number, line in enumerate(lines)]


def _named(how: BlockFormat) -> str:
    kind = "with a minimum" if how.offsets else "with a zero point" if how.zero_points else "symmetric"
    return f"int{how.bits} in blocks of {how.block_size}, {kind}"
