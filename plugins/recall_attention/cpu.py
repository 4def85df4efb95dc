"""RecallAttention on the CPU, with pages read in place from the pool."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.attention_cpu import append_tokens, attend_cached
from trt_kv.plugins.decode_cpu import NO_WINDOW, attend_one
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import dtype_of
from trt_kv.plugins.paging import Floats, Ints, Rows, pages_of
from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.plugins.recall_attention.choice import choose_pages, probes_of, summaries_of
from trt_kv.plugins.recall_attention.page_counts import CODES, PageLimits, budget_tokens


def run(args: Arguments[NDArray[Any]]) -> tuple[Floats, Floats, Ints]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place."""
    append_tokens(args.kv, args.token_positions, args.slots[args.layer], args.k, args.v, args.positions)
    kv_len_B, page_table_BT, ends = args.kv_len[args.layer], args.page_table[args.layer], args.cu_tokens.tolist()
    out, lse = np.empty(args.q.shape, np.float32), np.empty(args.q.shape[:2], np.float32)
    corrected = np.zeros((len(kv_len_B), args.kv.shape[2]), np.int64)
    decoding: list[int] = []
    for b, n_cached in enumerate(kv_len_B.tolist()):
        begin, end = ends[b], ends[b + 1]
        if begin == end:
            continue
        first, full = (n_cached - (end - begin)) // args.page_size, n_cached // args.page_size
        if first < full:
            filled = page_table_BT[b, first:full]
            found = summaries_of(args.kv[filled, 0], args.summary, dtype_of(args.summaries))
            args.summaries[filled] = found[:, :, : args.summaries.shape[2]]
        if args.prompt_remaining[end - 1] < 0:
            decoding.append(b)
            continue
        out[begin:end], lse[begin:end] = attend_cached(
            args.q[begin:end],
            args.positions[begin:end],
            pages_of(args.page_table, args.layer, b, n_cached, args.page_size),
            n_cached,
            args.kv,
            args.token_positions,
            args.scale,
            soft_cap=args.soft_cap,
        )
        args.last_query[args.query_rows[args.layer, b]] = args.q[end - 1]
    if decoding:
        corrected[decoding] = _attend_chosen(args, decoding, out, lse)
    return out, lse, corrected


def _attend_chosen(args: Arguments[NDArray[Any]], decoding: list[int], out: Floats, lse: Floats) -> np.ndarray:
    """The generated tokens of the sequences ``decoding`` attend to the pages that they choose; returns who drifted, [B, K]."""
    limits = PageLimits(page_size=args.page_size, sinks=args.sinks, recent=args.recent)
    rows_B, query_rows_B = args.cu_tokens[1:][decoding] - 1, args.query_rows[args.layer, decoding]
    kv_len_B, page_table_BT = args.kv_len[args.layer, decoding], args.page_table[args.layer, decoding]
    drifted_BK, probe_BHD = probes_of(args.q, rows_B, args.last_query, query_rows_B, args.kv.shape[2], np.float32(args.tau))
    n_between = [len(limits.choosable(n_cached)) for n_cached in kv_len_B.tolist()]
    prompt_len, adaptive = args.prompt_len.tolist(), args.adaptive_budget[args.layer].tolist()
    budgets = [budget_tokens(prompt_len[b], adaptive[b], args.kept_share, args.kept_tokens) for b in decoding]
    n_chosen = [min(limits.n_chosen(budget), n) for budget, n in zip(budgets, n_between, strict=True)]
    first_B, n_between_B, n_chosen_B = np.array([[limits.n_sinks] * len(decoding), n_between, n_chosen])
    counts = first_B, n_between_B, n_chosen_B
    summaries = args.summaries
    if args.summary == CODES and summaries.shape[2] == 2:
        summaries = _coded_again(args, decoding)
    chosen_BKC = choose_pages(probe_BHD, page_table_BT, *counts, summaries, args.pooling, args.softmax_scale)
    table_BKT, n_tokens_B = attended_tables(page_table_BT, chosen_BKC, kv_len_B, *counts, args.page_size)
    attend_one(
        *(args.q, rows_B, table_BKT, n_tokens_B, args.kv, np.float32(args.scale), np.float32(args.soft_cap)),
        *(*NO_WINDOW, out, lse),
    )
    args.last_query[query_rows_B] = args.q[rows_B]
    found: np.ndarray = drifted_BK
    return found


def _coded_again(args: Arguments[NDArray[Any]], decoding: list[int]) -> Rows:
    """Summaries with codes of the full pages of sequences, from their keys, for a state that has no room for codes."""
    full = [
        pages_of(
            args.page_table, args.layer, b, int(args.kv_len[args.layer, b]) // args.page_size * args.page_size, args.page_size
        )
        for b in decoding
    ]
    pages = np.concatenate(full)
    coded = summaries_of(args.kv[pages, 0], CODES, dtype_of(args.summaries))
    summaries = np.zeros((len(args.summaries), *coded.shape[1:]), coded.dtype)
    summaries[pages] = coded
    summaries[:, :, :2] = args.summaries
    return summaries


@njit(nogil=True)
def attended_tables(
    page_table_BT: Ints,
    chosen_BKC: Ints,
    kv_len_B: Ints,
    n_sinks_B: Ints,
    n_between_B: Ints,
    n_chosen_B: Ints,
    page_size: int,
) -> tuple[Ints, Ints]:
    """The pages that each KV head attends to, in order of position, [B, K, T], and the number of tokens in them, [B]: the first
    ``n_sinks_B``, the chosen ones, and those after the ``n_between_B`` that are chosen from.
    """
    n_kv_heads = chosen_BKC.shape[1]
    n_pages_B = (kv_len_B + page_size - 1) // page_size
    n_left_out_B = n_between_B - n_chosen_B
    table_BKT = np.zeros((len(kv_len_B), n_kv_heads, (n_pages_B - n_left_out_B).max()), np.int64)
    for b in range(len(kv_len_B)):
        n_sinks, n_chosen = min(n_sinks_B[b], n_pages_B[b]), n_chosen_B[b]
        first = n_sinks + n_between_B[b]
        for head in range(n_kv_heads):
            pages_T = table_BKT[b, head]
            pages_T[:n_sinks] = page_table_BT[b, :n_sinks]
            for c in range(n_chosen):
                pages_T[n_sinks + c] = page_table_BT[b, chosen_BKC[b, head, c]]
            for page in range(first, n_pages_B[b]):
                pages_T[page - n_left_out_B[b]] = page_table_BT[b, page]
    return table_BKT, kv_len_B - n_left_out_B * page_size
