"""Cost of TokenScores in the prefill of a layer of Llama 3 8B, relative to its attention and to the whole layer; and attention
over pages compared with torch's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu.decode_attention import DTYPE, Shape
from benchmarks.gpu.device import check_kernel, device, on_gpu, times
from benchmarks.harness import Report, Row, Target
from trt_kv.opspec import Case
from trt_kv.plugins.registry import device_kernel

CHUNK = 2048
SIDES = {"without scores": None, "all queries": 0, "last 32 queries": 32}
"""The ``window`` of TokenScores by name of the side."""


class Prefill:
    """One layer that prefills a prompt in chunks."""

    def __init__(self, shape: Shape, n_tokens: int, chunk: int) -> None:
        self.shape, self.n_tokens, self.chunk = shape, n_tokens, chunk
        width = -(-n_tokens // shape.page_size)
        on = device()
        torch.manual_seed(0)
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        self.q, self.k, self.v = (torch.randn(n_tokens, n, shape.head_size, dtype=DTYPE, device=on) for n in heads)
        self.kv = torch.zeros(width, 2, shape.n_kv_heads, shape.page_size, shape.head_size, dtype=DTYPE, device=on)
        self.token_positions = torch.zeros(width, shape.n_kv_heads, shape.page_size, dtype=torch.int64, device=on)
        self.scores = torch.zeros(self.token_positions.shape, device=on)
        self.table_LBT = torch.randperm(width, device=on).view(1, 1, width)
        self.positions = torch.arange(n_tokens, device=on)
        pages = self.table_LBT[0, 0, self.positions // shape.page_size]
        self.slots = (pages * shape.page_size + self.positions % shape.page_size).view(1, -1)
        starts = range(0, n_tokens, chunk)
        self.lengths = {s: torch.full((1, 1), min(s + chunk, n_tokens), device=on) for s in starts}
        self.cu_tokens = {s: torch.tensor([0, min(chunk, n_tokens - s)], device=on) for s in starts}

    def run(self, window: int | None) -> None:
        """The KV ops of all chunks; ``window`` None: without TokenScores."""
        cached_attention, token_scores = device_kernel("CachedAttention"), device_kernel("TokenScores")
        assert cached_attention is not None
        assert token_scores is not None
        for start, kv_len in self.lengths.items():
            rows = slice(start, start + self.chunk)
            cache = {"page_table": self.table_LBT, "kv_len": kv_len, "kv": self.kv, "token_positions": self.token_positions}
            step = {"positions": self.positions[rows], "cu_tokens": self.cu_tokens[start], "slots": self.slots[:, rows]}
            attributes = {"layer": 0, "scale": self.shape.head_size**-0.5, "page_size": self.shape.page_size}
            q = self.q[rows]
            _, lse = cached_attention(q=q, k=self.k[rows], v=self.v[rows], **step, **cache, **attributes)
            if window is not None:
                remaining = self.n_tokens - 1 - self.positions[rows]
                scored = {"scores": self.scores, "prompt_remaining": remaining, "window": window}
                token_scores(q=q, lse=lse, **step, **cache, **scored, **attributes)

    def gathered(self) -> None:
        """The pages of each chunk's tokens copied side by side, then torch's attention."""
        for start in self.lengths:
            kv_len = min(start + self.chunk, self.n_tokens)
            pages = self.table_LBT[0, 0, : -(-kv_len // self.shape.page_size)]
            k, v = (self.kv[pages, part].transpose(0, 1).flatten(1, 2)[None, :, :kv_len] for part in range(2))
            q = self.q[start:kv_len].transpose(0, 1)[None]
            _sdpa(q, k, v, attn_mask=causal_lower_right(q.shape[2], kv_len))

    def contiguous(self) -> None:
        """torch's attention over the whole prompt in one call."""
        _sdpa(*(t.transpose(0, 1)[None] for t in (self.q, self.k, self.v)), is_causal=True)


def run(*, quick: bool) -> Report:
    """8k and 32k tokens, in an engine's chunks."""
    shape = Shape(n_heads=4, n_kv_heads=2, head_size=16, page_size=4) if quick else Shape()
    chunk = 16 if quick else CHUNK
    dims = {"H": shape.n_heads, "K": shape.n_kv_heads, "D": shape.head_size, "P": shape.page_size, "L": 1}
    n_cached, n_new = (20, 9) if quick else (300, 200)
    case = Case(
        name="chunk",
        cached=(n_cached,),
        new=(n_new,),
        dims=dims,
        values={"prompt_remaining": tuple(range(n_new - 1, -1, -1))},
        in_order=True,
    )
    checks = [check_kernel(op, case, DTYPE, within=1e-2) for op in ("CachedAttention", "TokenScores")]
    dense = _dense_layer(shape, quick)
    rows: list[Row] = []
    beside: list[Row] = []
    for n_tokens in (24, 40) if quick else (8192, 32768):
        prefill = Prefill(shape, n_tokens, chunk)
        rows += _rows(prefill, dense, rounds=2 if quick else 10)
        beside.append(_beside_torch(prefill, rounds=2 if quick else 10))
    worst = max(row["ratio_of_layer"] for row in rows if row["tokens"] == rows[-1]["tokens"])
    return Report(
        title="Prefill with TokenScores beside prefill without",
        settings={"shape": vars(shape), "dtype": str(DTYPE), "chunk": chunk},
        checks=checks,
        tables={"one layer, medians on the device": rows, "attention without scores beside torch's": beside},
        targets=[] if quick else [Target(what="a layer's prefill at 32k, scores over none", measured=worst, limit=1.3)],
    )


def _rows(prefill: Prefill, dense: Callable[[int], object], *, rounds: int) -> list[Row]:
    sides: dict[str, Callable[[], object]] = {name: functools.partial(prefill.run, window) for name, window in SIDES.items()}
    sides["dense"] = lambda: [dense(len(q)) for q in prefill.q.split(prefill.chunk)]
    timings = times(sides, rounds=rounds)
    medians = {name: timings.row(name)["median_ms"] for name in sides}
    base = medians["without scores"]
    return [
        {
            "tokens": prefill.n_tokens,
            "scores": name,
            "kv_ops_ms": medians[name],
            "dense_ms": medians["dense"],
            "ratio_of_kv_ops": float(f"{medians[name] / base:.3g}"),
            "ratio_of_layer": float(f"{(medians[name] + medians['dense']) / (base + medians['dense']):.3g}"),
        }
        for name in SIDES
    ]


def _beside_torch(prefill: Prefill, *, rounds: int) -> Row:
    """Attention over pages, which also appends; torch's over gathered copies of the pages, and over the contiguous prompt."""
    sides: dict[str, Callable[[], object]] = {
        "ours": functools.partial(prefill.run, None),
        "torch_contiguous": prefill.contiguous,
    }
    if on_gpu():  # elsewhere torch's attention has no such mask for grouped heads
        sides["torch_gathered"] = prefill.gathered
    timings = times(sides, rounds=rounds)
    return {"tokens": prefill.n_tokens} | {f"{name}_ms": timings.row(name)["median_ms"] for name in sides}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)


def _dense_layer(shape: Shape, quick: bool) -> Callable[[int], Tensor]:
    """The matrix products of a layer for a number of tokens, to compare attention's time with."""
    width, inner = shape.n_heads * shape.head_size, 32 if quick else 14336
    kv_width = 2 * shape.n_kv_heads * shape.head_size
    sizes = {"qkv": (width + kv_width, width), "o": (width, width), "gate_up": (2 * inner, width), "down": (width, inner)}
    weights = {name: torch.randn(size, dtype=DTYPE, device=device()) * size[1] ** -0.5 for name, size in sizes.items()}
    x_ND = torch.randn(CHUNK, width, dtype=DTYPE, device=device())

    def layer(n_tokens: int) -> Tensor:
        x = x_ND[:n_tokens]
        x = functional.linear(functional.linear(x, weights["qkv"])[:, :width], weights["o"])
        gate, up = functional.linear(x, weights["gate_up"]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, weights["down"])

    return layer
