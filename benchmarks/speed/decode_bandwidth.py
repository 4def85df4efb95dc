"""How much of the memory's bandwidth decode attention uses, in every type of the KV cache (a part of ``attention_kernels``)."""

from collections.abc import Callable

import numba
import numpy as np

from benchmarks.harness import Check, Row, check_close, rounded, take_turns
from trt_kv.manifest import KV_DTYPES
from trt_kv.plugins.decode_cpu import NO_WINDOW, attend_one
from trt_kv.plugins.kv_rows import KvDtype, load, store
from trt_kv.plugins.paging import Floats

SHAPES = {"SmolLM2 135M": (9, 3, 64), "Llama 3.2 1B": (32, 8, 64), "Llama 3.1 8B": (32, 8, 128)}
"""Query heads, KV heads, head size."""
PAGE_SIZES = (32, 8)
READ_BYTES = 2**28
"""Of pages in fp32 that a side reads in a round, more than CPUs cache, and of the probe."""


@numba.njit(parallel=True, fastmath=True)
def total_of(parts_PN: Floats) -> np.float32:
    """The sum of a large array, which reads it once, as fast as memory allows."""
    total = np.float32(0.0)
    for p in numba.prange(len(parts_PN)):
        part, sum_of_part = parts_PN[p], np.float32(0.0)
        for i in range(len(part)):
            sum_of_part += part[i]
        total += sum_of_part
    return total


def bandwidth(lengths: tuple[int, ...], rounds: int, read_bytes: int = READ_BYTES) -> tuple[list[Row], list[Check]]:
    """One query attends to ``lengths`` tokens in pages in random order; ``share_of_probe`` compares GB/s with ``total_of``."""
    probe = np.ones((256, read_bytes // 1024), np.float32)
    rows: list[Row] = []
    checks: list[Check] = []
    for model, (n_heads, n_kv_heads, head_size) in SHAPES.items():
        for page_size in PAGE_SIZES:
            for n_tokens in lengths:
                rng = np.random.default_rng(0)
                n_pages = -(-n_tokens // page_size)
                layer_bytes = n_pages * 2 * n_kv_heads * page_size * head_size * 4
                n_layers = max(1, read_bytes // layer_bytes)
                q_BHD = rng.standard_normal((1, n_heads, head_size), np.float32)
                pages = rng.permutation(n_layers * n_pages).reshape(n_layers, 1, 1, n_pages)
                tables = np.ascontiguousarray(np.broadcast_to(pages, (n_layers, 1, n_kv_heads, n_pages)))
                numbers = rng.standard_normal((n_layers * n_pages, 2, n_kv_heads, page_size, head_size), np.float32)
                pools = {name: store(numbers, KvDtype(name)) for name in KV_DTYPES}
                sides = {name: _decoding(q_BHD, tables, kv, n_tokens) for name, kv in pools.items()}
                what = f"{model}, {n_tokens} tokens, pages of {page_size}"
                for name, kv in pools.items():
                    if n_tokens == min(lengths):
                        exact = _decoding(q_BHD, tables, load(kv), n_tokens)()
                        checks.append(check_close(f"{what}, {name}", sides[name](), exact, within=1e-5))
                timings = take_turns({**sides, "probe": lambda: total_of(probe)}, rounds=rounds, warmup=1)
                probed = probe.nbytes / np.median(timings.samples_ms["probe"]) / 1e6
                for name, kv in pools.items():
                    reached = kv.nbytes / np.median(timings.samples_ms[name]) / 1e6
                    median_ms = rounded(np.median(timings.samples_ms[name]) / n_layers)
                    rows.append(
                        {
                            "model": model,
                            "page_tokens": page_size,
                            "cached_tokens": n_tokens,
                            "kv_dtype": name,
                            "median_ms_per_layer": median_ms,
                            "gb_per_s": rounded(reached),
                            "probe_gb_per_s": rounded(probed),
                            "share_of_probe": rounded(reached / probed),
                        }
                    )
    return rows, checks


def _decoding(q_BHD: Floats, tables: np.ndarray, kv: np.ndarray, n_tokens: int) -> Callable[[], Floats]:
    """One step's attention of all layers; returns the last one's output."""
    out, lse = np.empty(q_BHD.shape, np.float32), np.empty(q_BHD.shape[:2], np.float32)
    row, length, scale = np.zeros(1, np.int64), np.array([n_tokens]), np.float32(q_BHD.shape[2] ** -0.5)

    def decode() -> Floats:
        for table_BKT in tables:
            attend_one(q_BHD, row, table_BKT, length, kv, scale, np.float32(0.0), *NO_WINDOW, out, lse)
        return out.copy()

    return decode
