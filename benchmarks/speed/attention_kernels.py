"""CPU kernels compared with the obvious alternatives: decode attention, attention and scores of a prefill chunk.

And how near decode attention comes to the memory's bandwidth.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Check, Report, Row, check_close, take_turns
from benchmarks.speed.decode_bandwidth import READ_BYTES, bandwidth
from trt_kv.opspec import Case
from trt_kv.plugins.attention_cpu import attend_chunk
from trt_kv.plugins.cached_attention.spec import SPEC
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import Floats, gather_kv, pages_of
from trt_kv.plugins.registry import kernel
from trt_kv.plugins.token_scores.cpu import attention_received

HEADS = {"H": 32, "K": 8, "D": 64, "P": 32}
N_LAYERS = 4
"""Layers used in turn, as in a model, because a single layer's pages would stay in the CPU cache."""
CHUNK = 512
AGREE_WITHIN = 1e-4


def run(folder: Path, *, quick: bool) -> Report:  # noqa: ARG001  every benchmark is called alike
    """Kernels of the shapes of Llama 3.2 1B's attention."""
    lengths, rounds = ((256, 1024), 3) if quick else ((1024, 4096, 16384), 15)
    checks: list[Check] = []
    tables: dict[str, list[Row]] = {}
    for n_cached in lengths:
        attend, score = _chunk_sides(n_cached)
        kernels = {
            "decode, batch 1": _decode_sides(n_cached, 1),
            "decode, batch 4": _decode_sides(n_cached, 4),
            "attention of a chunk": attend,
            "scores of a chunk": score,
        }
        for caption, sides in kernels.items():
            checks += _agreements(f"{caption}, {n_cached} cached tokens", sides)
            timings = take_turns(sides, rounds=rounds)
            rows = ({"cached_tokens": n_cached, **row} for row in timings.rows(next(iter(sides))))
            tables.setdefault(caption, []).extend(rows)
    contexts, read_bytes = ((512,), 2**24) if quick else ((8192, 32768, 131072), READ_BYTES)
    tables["decode in the types of the KV cache"], agreed = bandwidth(contexts, 3 if quick else 9, read_bytes)
    checks += agreed
    return Report(
        title="CPU attention kernels",
        settings={"heads": HEADS, "chunk_tokens": CHUNK, "rounds": rounds, "decode_steps_per_round": N_LAYERS},
        checks=checks,
        tables=tables,
    )


def _agreements(what: str, sides: Mapping[str, Callable[[], Floats]]) -> list[Check]:
    """Check that every side computes the result of the first one, ours."""
    ours, *others = sides
    expected = sides[ours]()
    return [check_close(f"{what}: {other}", sides[other](), expected, within=AGREE_WITHIN) for other in others]


def _decode_sides(n_cached: int, n_sequences: int) -> dict[str, Callable[[], Floats]]:
    """One new token for each of the sequences, which all have ``n_cached`` tokens: the op, and variants that gather K and V."""
    case = Case(
        name="decode", cached=(n_cached // n_sequences,) * n_sequences, new=(1,) * n_sequences, dims={**HEADS, "L": N_LAYERS}
    )
    inputs, attention = case_inputs(SPEC, case), kernel(SPEC.name, "cpu")
    return {
        "numba, pages in place": _in_turn(lambda layer: attention(**{**inputs, "layer": layer})[0]),
        "torch, gathered pages, matmul": _in_turn(lambda layer: _gathered(inputs, layer, _softmax_matmul)),
        "torch, gathered pages, flash": _in_turn(lambda layer: _gathered(inputs, layer, _flash)),
    }


def _in_turn(attend: Callable[[int], Floats]) -> Callable[[], Floats]:
    """Calls ``attend`` for all layers, so that no layer's pages are still in the CPU cache."""
    return lambda: np.stack([attend(layer) for layer in range(N_LAYERS)])


def _gathered(inputs: Mapping[str, Any], layer: int, attend: Callable[..., Floats]) -> Floats:
    """CachedAttention for one token per sequence, by gathering each sequence's pages."""
    kv, page_size = inputs["kv"], HEADS["P"]
    pages_B, offsets_B = np.divmod(inputs["slots"][layer], page_size)
    kv[pages_B, 0, :, offsets_B] = inputs["k"]
    kv[pages_B, 1, :, offsets_B] = inputs["v"]
    inputs["token_positions"][pages_B, :, offsets_B] = inputs["positions"][:, None]
    out = []
    for b, q_HD in enumerate(inputs["q"]):
        n_cached = int(inputs["kv_len"][layer, b])
        k_KSD, v_KSD = gather_kv(kv, pages_of(inputs["page_table"], layer, b, n_cached, page_size), n_cached)
        out.append(attend(q_HD[None], k_KSD, v_KSD, inputs["scale"]))
    return np.concatenate(out)


def _softmax_matmul(q_NHD: Floats, k_KSD: Floats, v_KSD: Floats, scale: float, visible_NS: Any = None) -> Floats:
    """Attention in three torch calls, [N, H, D]; holds one KV head's weights [N * G, S] at a time."""
    n_tokens, n_heads, head_size = q_NHD.shape
    group = n_heads // len(k_KSD)
    q_KRD = torch.from_numpy(q_NHD).view(n_tokens, -1, group, head_size).permute(1, 0, 2, 3).reshape(len(k_KSD), -1, head_size)
    hidden = None if visible_NS is None else torch.from_numpy(~visible_NS).repeat_interleave(group, dim=0)
    out = []
    for q_RD, k_SD, v_SD in zip(q_KRD, torch.from_numpy(k_KSD), torch.from_numpy(v_KSD), strict=True):
        logits_RS = (q_RD * scale) @ k_SD.T
        if hidden is not None:
            logits_RS.masked_fill_(hidden, float("-inf"))
        out.append((logits_RS.softmax(dim=-1) @ v_SD).view(n_tokens, group, head_size))
    out_NHD: Floats = torch.cat(out, dim=1).numpy()
    return out_NHD


def _flash(q_NHD: Floats, k_KSD: Floats, v_KSD: Floats, scale: float, visible_NS: np.ndarray | None = None) -> Floats:
    """torch's flash attention, [N, H, D], KV heads as batch so that grouped queries share K and V without a copy."""
    n_tokens, n_heads, head_size = q_NHD.shape
    group = n_heads // len(k_KSD)
    q_KGND = torch.from_numpy(q_NHD).view(n_tokens, -1, group, head_size).permute(1, 2, 0, 3)
    k_KGSD, v_KGSD = (torch.from_numpy(x)[:, None].expand(-1, group, -1, -1) for x in (k_KSD, v_KSD))
    mask_11NS = None
    if visible_NS is not None:
        mask_11NS = torch.zeros(visible_NS.shape).masked_fill_(torch.from_numpy(~visible_NS), float("-inf"))[None, None]
    out_KGND, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGND, k_KGSD, v_KGSD, 0.0, False, attn_mask=mask_11NS, scale=scale
    )
    out_NHD: Floats = out_KGND.permute(2, 0, 1, 3).reshape(q_NHD.shape).numpy()
    return out_NHD


def _chunk_sides(n_cached: int) -> tuple[dict[str, Callable[[], Floats]], dict[str, Callable[[], Floats]]]:
    """Sides for the attention and the scores of the last chunk of a prompt of ``n_cached`` tokens, which pages hold.

    The sides in torch need contiguous K and V.
    """
    rng = np.random.default_rng(0)
    n_heads, n_kv_heads, head_size, page_size = (HEADS[axis] for axis in "HKDP")
    n_tokens, scale = min(CHUNK, n_cached), head_size**-0.5
    q_NHD = rng.standard_normal((n_tokens, n_heads, head_size), np.float32)
    pages_T = rng.permutation(-(-n_cached // page_size))
    kv = rng.standard_normal((len(pages_T), 2, n_kv_heads, page_size, head_size), np.float32)
    positions_N, positions_KS = np.arange(n_cached - n_tokens, n_cached), np.tile(np.arange(n_cached), (n_kv_heads, 1))
    visible_NS = positions_KS[0] <= positions_N[:, None]
    _, lse_NH = attend_chunk(q_NHD, positions_N, pages_T, kv, positions_KS, scale)
    scaled_NHD = q_NHD * np.float32(scale)

    def gathered() -> tuple[Floats, Floats]:
        return gather_kv(kv, pages_T, n_cached)

    return {
        "numba, block by block": lambda: attend_chunk(q_NHD, positions_N, pages_T, kv, positions_KS, scale)[0],
        "torch, flash attention": lambda: _flash(q_NHD, *gathered(), scale, visible_NS),
        "torch, matmul, head by head": lambda: _softmax_matmul(q_NHD, *gathered(), scale, visible_NS),
    }, {
        "numba, block by block": lambda: attention_received(q_NHD, lse_NH, positions_N, pages_T, kv, positions_KS, scale),
        "torch, products and sums of exps": lambda: _received_by_products(scaled_NHD, lse_NH, gathered()[0], visible_NS),
        "torch, flash attention, roles exchanged": lambda: _received_by_flash(scaled_NHD, lse_NH, gathered()[0], visible_NS),
    }


def _received_by_products(q_NHD: Floats, lse_NH: Floats, k_KSD: Floats, visible_NS: np.ndarray) -> Floats:
    """``attention_received`` as a product of 1024 tokens at a time with all queries, and its exponentials: [K, S]."""
    n_tokens, n_heads, _ = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    q_KCM = torch.from_numpy(q_NHD).view(n_tokens, n_kv_heads, -1, q_NHD.shape[2]).permute(1, 3, 2, 0).flatten(2).contiguous()
    lse_KM = torch.from_numpy(lse_NH).view(n_tokens, n_kv_heads, group).permute(1, 2, 0).flatten(1)
    mask_SN = torch.zeros(n_cached, n_tokens).masked_fill_(torch.from_numpy(~visible_NS.T), float("-inf"))
    received_KS = torch.empty(n_kv_heads, n_cached)
    for head, k_SD in enumerate(torch.from_numpy(k_KSD)):
        for first in range(0, n_cached, 1024):
            exponents_TM = torch.addmm(-lse_KM[head], k_SD[first : first + 1024], q_KCM[head])
            if first + 1024 > n_cached - n_tokens:
                exponents_TM.view(-1, group, n_tokens).add_(mask_SN[first : first + 1024, None])
            received_KS[head, first : first + 1024] = exponents_TM.exp_().sum(dim=1) / group
    received: Floats = received_KS.numpy()
    return received


def _received_by_flash(q_NHD: Floats, lse_NH: Floats, k_KSD: Floats, visible_NS: np.ndarray) -> Floats:
    """``attention_received`` as the softmax denominators of an attention with the roles of keys and queries exchanged: [K, S].

    Cached tokens before the chunk are seen by all its queries and need no mask.
    """
    n_tokens, n_heads, _ = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    # With a channel -lse in q and a channel 1 in k, the product is the logarithm of the weight.
    q_NHC = torch.cat([torch.from_numpy(q_NHD), -torch.from_numpy(lse_NH)[:, :, None]], dim=-1)
    q_KGNC = q_NHC.view(n_tokens, n_kv_heads, group, -1).permute(1, 2, 0, 3).contiguous()
    k_KGSC = torch.cat([torch.from_numpy(k_KSD), torch.ones(n_kv_heads, n_cached, 1)], dim=-1)[:, None].expand(
        -1, group, -1, -1
    )
    hidden_TN = torch.from_numpy(~visible_NS[:, n_cached - n_tokens :].T)
    mask_TN = torch.zeros(hidden_TN.shape).masked_fill_(hidden_TN, float("-inf"))
    parts = [(k_KGSC[:, :, : n_cached - n_tokens], None), (k_KGSC[:, :, n_cached - n_tokens :], mask_TN[None, None])]
    sums = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asking, q_KGNC, q_KGNC, 0.0, False, attn_mask=mask, scale=1.0
        )[1]
        for asking, mask in parts
        if asking.shape[2]
    ]
    received: Floats = (torch.cat(sums, dim=2).exp().sum(dim=1) / group).numpy()
    return received
