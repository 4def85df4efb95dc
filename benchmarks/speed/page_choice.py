"""What choosing pages costs in a step, by the summaries they are ranked by: all layers of SmolLM2, one sequence.

Keys are random. The choice is the kernel's own call, with the page table of one layer after the other.
"""

from pathlib import Path

import numpy as np

from benchmarks.harness import Check, Report, Row, take_turns
from benchmarks.peers.subjects import smollm2
from trt_kv.plugins.kv_rows import KvDtype
from trt_kv.plugins.recall_attention.choice import choose_pages, summaries_of
from trt_kv.program import GROUP_POOLINGS, PAGE_SUMMARIES

PAGE_SIZE = 8
SHARE = 0.1
N_HEADS = 9
SIDES = {
    "minmax, mean_softmax": ("minmax", "mean_softmax"),
    "minmax, max_raw": ("minmax", "max_raw"),
    "codes, mean_softmax": ("codes", "mean_softmax"),
    "codes, max_raw": ("codes", "max_raw"),
}


def run(folder: Path, *, quick: bool) -> Report:  # noqa: ARG001  (every benchmark is given a folder)
    """Sides in turn on the same keys."""
    lengths, types, rounds = ((512,), ("float32",), 3) if quick else ((8192, 32768), ("float32",), 15)
    n_layers, n_kv_heads, head_size = (2, 3, 64) if quick else _shape()
    tables: dict[str, list[Row]] = {}
    wrong = 0
    for dtype in types:
        for n_tokens in lengths:
            rows, n_wrong = _timed(n_tokens, dtype, rounds, n_layers, n_kv_heads, head_size)
            tables[f"{n_tokens} tokens in pages of {PAGE_SIZE}, {dtype}, {n_layers} layers"] = rows
            wrong += n_wrong
    return Report(
        title="Choosing pages in a step",
        settings={"chosen_share": SHARE, "heads": N_HEADS, "kv_heads": n_kv_heads, "head_size": head_size},
        checks=[Check(what="chosen pages that are not ascending", error=wrong, allowed=0)],
        tables=tables,
    )


def _shape() -> tuple[int, int, int]:
    subject = smollm2()
    return subject.n_layers, subject.n_kv_heads, subject.head_size


def _timed(n_tokens: int, dtype: str, rounds: int, n_layers: int, n_kv_heads: int, head_size: int) -> tuple[list[Row], int]:
    rng = np.random.default_rng(0)
    n_pages = n_tokens // PAGE_SIZE
    k_MKPD = rng.standard_normal((n_pages, n_kv_heads, PAGE_SIZE, head_size), np.float32)
    of_layer = {name: summaries_of(k_MKPD, PAGE_SUMMARIES[name], KvDtype(dtype)) for name in ("minmax", "codes")}
    summaries = {name: np.tile(rows, (n_layers, 1, 1, 1)) for name, rows in of_layer.items()}
    table_LT = np.arange(n_layers * n_pages).reshape(n_layers, n_pages)
    probe_BHD = rng.standard_normal((1, N_HEADS, head_size), np.float32)
    first_B, n_pages_B, n_chosen_B = np.array([0, n_pages, int(SHARE * n_pages)])[:, None]

    def chosen(summary: str, pooling: str) -> list[np.ndarray]:
        return [
            choose_pages(
                *(probe_BHD, table_LT[[layer]], first_B, n_pages_B, n_chosen_B),
                *(summaries[summary], GROUP_POOLINGS[pooling], 1.0),
            )
            for layer in range(n_layers)
        ]

    wrong = sum(int((np.diff(pages, axis=2) <= 0).sum()) for side in SIDES.values() for pages in chosen(*side))
    sides = {name: lambda side=side: chosen(*side) for name, side in SIDES.items()}
    rows = take_turns(sides, rounds=rounds).rows("minmax, mean_softmax")
    n_bytes = {name: summary.nbytes for name, summary in of_layer.items()}
    for row in rows:
        row["summary_bytes_per_key"] = n_bytes[SIDES[row["side"]][0]] / (n_tokens * n_kv_heads)
    return rows, wrong
