"""AdaptiveBudget on the CPU: one row of q.k^T read from the pages in place, one sort, one running sum, one search."""

import bisect
import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.adaptive_budget.arguments import Arguments
from trt_kv.plugins.adaptive_budget.spec import NO_WEIGHT
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import number, scale_of
from trt_kv.plugins.paging import Floats, Ints, Rows, gather_slots, head_groups, pages_of


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (budget [B],). Products q.k are summed in fp32 like those of attention, all else in fp64."""
    budget = args.kv_len[args.layer].copy()
    for b in np.flatnonzero(args.evict == 1):
        n_cached = int(args.kv_len[args.layer, b])
        last = int(args.cu_tokens[b + 1]) - 1
        if n_cached <= args.sinks + args.recent or (args.row == 0 and last < args.cu_tokens[b]):
            continue
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        by_position_KS = slots_by_position(gather_slots(args.token_positions, pages, n_cached))
        candidates_KC = by_position_KS[:, args.sinks : n_cached - args.recent]
        reads_scores = args.ranking == 0 or args.row == 1
        scores_KS = gather_slots(args.scores, pages, n_cached) if args.scores is not None and reads_scores else None
        if args.ranking == 0:
            assert scores_KS is not None
            candidates_KC = best_first(candidates_KC, scores_KS)
        else:
            candidates_KC = candidates_KC[:, ::-1]
        if args.row == 0:
            scale, soft_cap = np.float32(args.scale), np.float32(args.soft_cap)
            weights_RS = attention_row(args.q[last], args.lse[last], pages, n_cached, args.kv, scale, soft_cap)
        else:
            assert scores_KS is not None
            weights_RS = scores_KS.astype(np.float64)
        protected_KC = np.concatenate([by_position_KS[:, : args.sinks], by_position_KS[:, n_cached - args.recent :]], axis=1)
        budget[b] = budget_of_row(weights_RS, protected_KC, candidates_KC, args.threshold, args.protected_in_norm)
    return (budget,)


def budget_of_row(weights_RS: Floats, protected_KP: Ints, candidates_KC: Ints, threshold: float, protected_in_norm: int) -> int:
    """The smallest budget that keeps the norm of the rows: all protected tokens and as few candidates as possible."""
    counted_KP = protected_KP if protected_in_norm else protected_KP[:, :0]
    squares_RC = running_squares(weights_RS, counted_KP, candidates_KC)
    n_protected: int = protected_KP.shape[1]
    return n_protected + smallest_cut(squares_RC, float(np.float32(threshold)))


def slots_by_position(positions_KS: Ints) -> Ints:
    """Each KV head's slots in order of position: [K, S]. Heads that hold the same tokens are sorted once."""
    if len(head_groups(positions_KS)) == 1:
        return np.broadcast_to(np.argsort(positions_KS[0]), positions_KS.shape)
    return np.argsort(positions_KS, axis=1)


def best_first(slots_KC: Ints, scores_KS: Floats) -> Ints:
    """Each KV head's slots by descending score; ties keep their order: [K, C].

    Sorts integers (score in the high bits, index in the low ones), which numpy does several times faster than a stable argsort
    of floats. The bits of non-negative fp32 numbers, read as integers, sort like the numbers, those of negative ones reversed.
    """
    scores_KC = np.take_along_axis(scores_KS, slots_KC, axis=1) + np.float32(0.0)  # -0.0 becomes 0.0
    bits_KC = scores_KC.view(np.int32)
    rising_KC = np.where(bits_KC < 0, bits_KC ^ np.int32(0x7FFFFFFF), bits_KC)
    keys_KC = (~rising_KC).astype(np.int64) << 32 | np.arange(slots_KC.shape[1])
    return np.take_along_axis(slots_KC, np.sort(keys_KC, axis=1) & 0xFFFFFFFF, axis=1)


def smallest_cut(squares_RC: Floats, threshold: float) -> int:
    """The smallest c with S_c >= (1 - threshold) * S_C, by bisection (S_c is monotonic); column c holds the terms of S_c."""

    def mean_norm(c: int) -> float:
        return float(np.sqrt(squares_RC[:, c]).mean())

    n_candidates = squares_RC.shape[1] - 1
    return bisect.bisect_left(range(n_candidates), (1.0 - threshold) * mean_norm(n_candidates), key=mean_norm)


@njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def attention_row(
    q_HD: Floats, lse_H: Floats, pages_T: Ints, n_cached: int, kv: Rows, scale: np.float32, soft_cap: np.float32
) -> Floats:
    """exp(logit - lse) of one query for the tokens in its pages, with scale * q.k, capped, as the logit: [H, S] fp64.

    Pages are read once, in place, all heads of a page together because they are adjacent in memory.
    """
    n_kv_heads, page_size = kv.shape[2:4]
    n_heads, head_size = q_HD.shape
    group = n_heads // n_kv_heads
    weights_HS = np.empty((n_heads, n_cached), np.float64)
    for t in numba.prange(len(pages_T)):
        page = pages_T[t]
        first = t * page_size
        for head in range(n_heads):
            kv_head = head // group
            for s in range(min(page_size, n_cached - first)):
                dot = np.float32(0.0)
                for d in range(head_size):
                    dot += q_HD[head, d] * number(kv[page, 0, kv_head, s, d])
                logit = np.float64(dot * scale_of(kv[page, 0, kv_head, s]) * scale)
                if soft_cap > 0.0:
                    logit = np.float64(soft_cap) * math.tanh(logit / np.float64(soft_cap))
                weights_HS[head, first + s] = math.exp(logit - np.float64(lse_H[head]))
    return weights_HS


@njit()
def running_squares(weights_RS: Floats, protected_KP: Ints, candidates_KC: Ints) -> Floats:
    """Column c of [R, C + 1]: each row's sum of squares over its protected slots and its first c candidates."""
    n_rows = len(weights_RS)
    n_candidates = candidates_KC.shape[1]
    squares_RC = np.empty((n_rows, n_candidates + 1), np.float64)
    for r in range(n_rows):
        kv_head = r * len(candidates_KC) // n_rows
        total = 0.0
        for slot in protected_KP[kv_head]:
            total += square(weights_RS[r, slot])
        squares_RC[r, 0] = total
        for c in range(n_candidates):
            total += square(weights_RS[r, candidates_KC[kv_head, c]])
            squares_RC[r, c + 1] = total
    return squares_RC


@numba.njit(inline="always")
def square(weight: float) -> float:
    """The square of the weight; 0 for a weight below the threshold at which it counts as 0."""
    return weight * weight if abs(weight) >= NO_WEIGHT else 0.0
