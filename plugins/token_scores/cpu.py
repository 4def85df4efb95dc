"""TokenScores on the CPU: column sums of the attention matrix, block by block: products (torch), then sums of exps (numba).

A sequence with one token in the step is scored in place (numba).
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt_kv.plugins.fast_math import exp_nonpositive
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, head_groups, pages_of, scatter_slots
from trt_kv.plugins.token_scores.arguments import Arguments

BLOCK_TOKENS = 1024
"""Tokens whose exponents are computed at a time: enough for an efficient matrix product, few enough for the CPU's caches."""


def run(args: Arguments[NDArray[Any]]) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place."""
    pages_N, offsets_N = np.divmod(args.slots[args.layer], args.page_size)
    args.scores[pages_N, :, offsets_N] = 0.0
    is_counted_N = (args.prompt_remaining >= 0) & ((args.prompt_remaining < args.window) | (args.window == 0))
    if args.generated:
        is_counted_N |= args.prompt_remaining == -1

    first_B, new_B = args.cu_tokens[:-1], np.diff(args.cu_tokens)
    ones = np.flatnonzero(new_B == 1)
    ones = ones[is_counted_N[first_B[ones]]]
    if len(ones):
        receive_one(
            args.q,
            args.lse,
            first_B[ones],
            args.page_table[args.layer, ones],
            args.kv_len[args.layer, ones],
            args.kv,
            np.float32(args.scale),
            bool(args.per_head),
            args.scores,
        )
    for b in np.flatnonzero(new_B > 0):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        rows = first_B[b] + np.flatnonzero(is_counted_N[first_B[b] : args.cu_tokens[b + 1]])
        is_last = args.prompt_remaining[rows] == 0
        if (new_B[b] == 1 and not is_last.any()) or not len(rows):
            continue
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        scores_KS = gather_slots(args.scores, pages, n_cached)
        if new_B[b] > 1:
            k_KSD, _ = gather_kv(args.kv, pages, n_cached)
            received_KS = chunk_received(args.q[rows], args.lse[rows], args.positions[rows], k_KSD, positions_KS, args.scale)
            scores_KS += received_KS if args.per_head else received_KS.mean(axis=0)
        if is_last.any():
            last = int(args.positions[rows[is_last]].max())
            if args.average:
                n_queries_KS = last + 1 - positions_KS
                scores_KS /= np.clip(n_queries_KS, 1, args.window or None).astype(np.float32)
            if args.pooling > 1:
                pool_neighbours(positions_KS, scores_KS, end=last - args.window, pooling=args.pooling)
        scatter_slots(args.scores, pages, scores_KS)
    return ()


def chunk_received(q_NHD: Floats, lse_NH: Floats, positions_N: Ints, k_KSD: Floats, positions_KS: Ints, scale: float) -> Floats:
    """Attention that one sequence's cached tokens receive from the queries of a chunk: [K, S], see ``attention_received``."""
    group = q_NHD.shape[1] // len(k_KSD)
    scaled_NHD = q_NHD * np.float32(scale)
    received_KS = np.empty(positions_KS.shape, np.float32)
    for kv_heads in head_groups(positions_KS):
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        visible_NS = positions_KS[kv_heads.start] <= positions_N[:, None]
        received_KS[kv_heads] = attention_received(scaled_NHD[:, heads], lse_NH[:, heads], k_KSD[kv_heads], visible_NS)
    return received_KS


def attention_received(q_NHD: Floats, lse_NH: Floats, k_KSD: Floats, visible_NS: np.ndarray) -> Floats:
    """Attention that each cached token receives, summed over queries, mean over a KV head's query heads: [K, S] fp32.

    q is already scaled. Token k receives sum_m exp(q_m.k - lse_m). With -lse as one more channel of q and 1 as one more
    channel of k, the exponents are one matrix product. Memory: O(N * T), where T counts the tokens from the first one that is
    hidden from some query (usually those of this step), and the exponents of ``BLOCK_TOKENS`` tokens.
    """
    n_queries, n_heads, _ = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    q_NHC = np.concatenate([q_NHD, -lse_NH[:, :, None]], axis=2)
    k_KSC = torch.from_numpy(np.concatenate([k_KSD, np.ones_like(k_KSD[:, :, :1])], axis=2))
    q_KGNC = torch.from_numpy(q_NHC).view(n_queries, n_kv_heads, n_heads // n_kv_heads, -1).permute(1, 2, 0, 3).contiguous()
    first = int(np.append(visible_NS.all(axis=0), False).argmin())
    hidden_TN = torch.from_numpy(~visible_NS[:, first:].T)
    mask_TN = torch.zeros(hidden_TN.shape).masked_fill_(hidden_TN, float("-inf"))
    received_KS = torch.empty(n_kv_heads, n_cached)
    received_KS[:, :first] = _denominators(k_KSC[:, :first], q_KGNC)
    received_KS[:, first:] = _denominators(k_KSC[:, first:], q_KGNC, mask_TN).masked_fill_(hidden_TN.all(dim=1), 0.0)
    received: Floats = (received_KS / (n_heads // n_kv_heads)).numpy()
    return received


def _denominators(k_KTC: Tensor, q_KGNC: Tensor, mask_TN: Tensor | None = None) -> Tensor:
    """sum over a KV head's query heads and queries of exp(q.k + mask) for each of T tokens: [K, T]. Exponents are at most 0."""
    n_kv_heads, n_tokens, _ = k_KTC.shape
    group, n_queries = q_KGNC.shape[1:3]
    sums_KT = torch.zeros(n_kv_heads, n_tokens)
    block_TM = torch.empty(min(BLOCK_TOKENS, n_tokens), group * n_queries)
    for head in range(n_kv_heads):
        q_CM = q_KGNC[head].flatten(0, 1).T
        for first in range(0, n_tokens, BLOCK_TOKENS):
            tokens = slice(first, min(first + BLOCK_TOKENS, n_tokens))
            exponents_TM = torch.mm(k_KTC[head, tokens], q_CM, out=block_TM[: tokens.stop - first])
            if mask_TN is not None:
                exponents_TM.view(-1, group, n_queries).add_(mask_TN[tokens, None])
            sum_exps(exponents_TM.numpy(), sums_KT[head, tokens].numpy())
    return sums_KT


@njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def sum_exps(exponents_TM: Floats, sums_T: Floats) -> None:
    """The sum of exp over each row; exponents are at most 0."""
    for t in numba.prange(len(exponents_TM)):
        total = np.float32(0.0)
        for m in range(exponents_TM.shape[1]):
            total += exp_nonpositive(exponents_TM[t, m])
        sums_T[t] = total


def pool_neighbours(positions_KS: Ints, scores_KS: Floats, *, end: int, pooling: int) -> None:
    """In each head, replace the scores of tokens at positions up to ``end`` by the mean of ``pooling`` neighbours among them.

    Neighbours in order of position; missing ones count as zeros.
    """
    order_KS = np.argsort(positions_KS, axis=1, kind="stable")
    is_pooled_KS = positions_KS <= end
    reach = pooling // 2
    n_cached = positions_KS.shape[1]
    sorted_KS = np.take_along_axis(np.where(is_pooled_KS, scores_KS, np.float32(0.0)), order_KS, axis=1)
    padded = np.pad(sorted_KS, ((0, 0), (reach, reach)))
    means_KS = sum(padded[:, i : i + n_cached] for i in range(pooling)) / np.float32(pooling)
    pooled_KS = np.empty_like(scores_KS)
    np.put_along_axis(pooled_KS, order_KS, means_KS, axis=1)
    np.copyto(scores_KS, pooled_KS, where=is_pooled_KS)


@njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def receive_one(
    q_NHD: Floats,
    lse_NH: Floats,
    rows_B: Ints,
    page_table_BT: Ints,
    kv_len_B: Ints,
    kv: Floats,
    scale: np.float32,
    per_head: bool,
    scores: Floats,
) -> None:
    """Add to ``scores`` the attention that the ``kv_len_B[b]`` tokens of sequence b receive from row ``rows_B[b]`` of q."""
    n_kv_heads, page_size, head_size = kv.shape[2:]
    group = q_NHD.shape[1] // n_kv_heads
    received_BKS = np.zeros((len(rows_B), n_kv_heads, kv_len_B.max()), np.float32)
    for task in numba.prange(len(rows_B) * n_kv_heads):
        b = task // n_kv_heads
        head = task % n_kv_heads
        row = rows_B[b]
        for p in range((kv_len_B[b] + page_size - 1) // page_size):
            page = page_table_BT[b, p]
            for g in range(group):
                lse = lse_NH[row, head * group + g]
                for s in range(min(page_size, kv_len_B[b] - p * page_size)):
                    dot = np.float32(0.0)
                    for d in range(head_size):
                        dot += q_NHD[row, head * group + g, d] * kv[page, 0, head, s, d]
                    received_BKS[b, head, p * page_size + s] += exp_nonpositive(dot * scale - lse) / np.float32(group)
    for b in numba.prange(len(rows_B)):
        for s in range(kv_len_B[b]):
            page = page_table_BT[b, s // page_size]
            mean = received_BKS[b, :, s].sum() / np.float32(n_kv_heads)
            for head in range(n_kv_heads):
                scores[page, head, s % page_size] += received_BKS[b, head, s] if per_head else mean
