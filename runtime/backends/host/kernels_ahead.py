"""Compiles the kernels of CPU engines into numba's cache before an engine is loaded.

Compiling takes about a minute of one processor, once per machine and version; a build leaves a processor free.
``python -m trt_kv.runtime.backends.host.kernels_ahead KV_DTYPE OP...`` does it; ``native`` among the ops stands for the dense
layers of quantised engines.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

from trt_kv.model_config import ModelConfig
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.jit import cache_folder
from trt_kv.plugins.packed_weights import PackedWeights
from trt_kv.plugins.registry import kernel, op_specs
from trt_kv.rope_config import RopeConfig
from trt_kv.runtime.backends.host.attention_layers import AttentionLayers
from trt_kv.runtime.backends.host.native.executor import NativeExecutor
from trt_kv.runtime.backends.host.native.weights import Weights
from trt_kv.runtime.kernel_threads import kernel_threads_bound
from trt_kv.runtime.sampling import SamplingParams
from trt_kv.runtime.sampling.choice import next_token

NATIVE = "native"
_SIZE = 32
"""Of everything in the smallest model whose weights can be packed."""


def marker_of(kv_dtype: str, ops: Sequence[str]) -> Path | None:
    """The file that says that these kernels are in the cache, for this processor and these sources; None without a cache."""
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(repr((numba.__version__, get_host_cpu_name(), str(get_host_cpu_features()))).encode())
    package = Path(__file__).parents[3]
    for path in sorted([*package.glob("plugins/**/*.py"), *package.glob("runtime/**/*.py")]):
        digest.update(path.read_bytes())
    digest.update(repr((kv_dtype, sorted(ops))).encode())
    return Path(folder) / f"kernels_{digest.hexdigest()[:16]}"


def compile_kernels(kv_dtype: str, ops: Sequence[str]) -> None:
    """Run the ``ops`` on every case of their specs, and for ``native`` a model of one layer; bind threads, choose tokens."""
    specs, zero = op_specs(), np.zeros(1, np.float32)
    for name in ops:
        if name == NATIVE:
            _smallest_model().warm_up(kv_dtype, AttentionLayers(zero, zero, np.zeros(1, np.int64)))
            continue
        for case in specs[name].cases:
            kernel(name, "cpu")(**case_inputs(specs[name], case, kv_dtype=kv_dtype))
    with kernel_threads_bound():
        pass
    rng, logits_V = np.random.default_rng(0), np.zeros(_SIZE, np.float32)
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_k=4, top_p=0.9)):
        next_token(logits_V, params, rng)


def _smallest_model() -> NativeExecutor:
    config = ModelConfig(
        architecture="llama",
        n_layers=1,
        hidden_size=_SIZE,
        n_heads=1,
        n_kv_heads=1,
        head_dim=_SIZE,
        intermediate_size=_SIZE,
        vocab_size=_SIZE,
        rms_norm_eps=1e-5,
        max_positions=_SIZE,
        rope=RopeConfig(theta=10000.0),
        tie_embeddings=True,
    )
    shapes = config.tensor_shapes()
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    matrix = PackedWeights(bits=4, blocks=np.zeros((_SIZE, 1, _SIZE // 2), np.uint8), scales=np.ones((_SIZE, 1), np.float32))
    weights = Weights(
        matrices={name.removesuffix(".weight"): matrix for name, shape in shapes.items() if len(shape) == 2},
        constants=np.ones(_SIZE * len(vectors), np.float32),
        places={name: _SIZE * i for i, name in enumerate(vectors)},
    )
    return NativeExecutor(config, weights)


if __name__ == "__main__":
    compile_kernels(sys.argv[1], sys.argv[2:])
    if (marker := marker_of(sys.argv[1], sys.argv[2:])) is not None:
        marker.touch()
