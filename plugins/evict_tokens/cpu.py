"""EvictTokens on the CPU: a partition of the scores for all KV heads; while decoding, a scan for the one token to evict.

Tokens are moved in place (numba), usually towards the front, which overwrites nothing that is still to be read.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins import lots
from trt_kv.plugins.evict_tokens.arguments import Arguments
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints, Rows, gather_slots, pages_of
from trt_kv.policy import kept_tokens as tokens_of_budget

TO_BUDGET, DROP = 1, 2
"""Evict flags."""
BY_SCORES, NEWEST_FIRST = 0, 1
"""Rankings; any other one is random."""

Bools = NDArray[np.bool_]
_scrambled = numba.njit(lots.scrambled)
_ROUNDS, _LOTS = lots.ROUNDS, lots.LOTS


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (kept [B],); updates kv, token_positions and scores in place."""
    n_cached = args.kv_len[args.layer]
    kept, recents = n_cached.copy(), np.zeros_like(n_cached)
    for b in np.flatnonzero(args.evict):
        n = int(n_cached[b])
        target = tokens_of_budget(n, args.kept_share, args.kept_tokens) if args.budget is None else int(args.budget[b])
        target = min(n, max(1, args.floor, n - args.drop if args.evict[b] == DROP else target))
        recents[b] = max(args.recent, int(float(np.float32(args.recent_share)) * max(0, target - args.sinks)))
        kept[b] = min(n, max(target, args.sinks + int(recents[b])))

    keys_K = lots.key_of(args.seed, args.layer, np.arange(args.kv.shape[2]))
    is_single = (args.evict == DROP) & (args.drop == 1)
    dropping = np.flatnonzero(is_single & (kept < n_cached))
    if len(dropping):
        tables = args.page_table[args.layer, dropping], n_cached[dropping], recents[dropping]
        drop_one(args.kv, args.token_positions, args.scores, *tables, args.sinks, args.ranking, keys_K)
    for b in np.flatnonzero((args.evict != 0) & ~is_single):
        pages = pages_of(args.page_table, args.layer, b, int(n_cached[b]), args.page_size)
        positions_KS = gather_slots(args.token_positions, pages, int(n_cached[b]))
        order_KS = order_of(positions_KS)
        worth_KS = worth_of(args.ranking, keys_K, positions_KS, order_KS, args.scores, pages)
        chosen_KS = chosen_of(worth_KS, int(kept[b]), args.sinks, int(recents[b]))
        move_tokens(
            args.kv,
            args.token_positions,
            args.scores,
            pages,
            sources_of(chosen_KS, order_KS, int(kept[b]), stay=bool(args.evict[b] == DROP)),
        )
    return (kept,)


def order_of(positions_KS: Ints) -> Ints | None:
    """Slots in order of position, [K, S]; None if they are in that order already, as in a prompt without evictions."""
    if (positions_KS[:, 1:] > positions_KS[:, :-1]).all():
        return None
    return np.argsort(positions_KS, axis=1, kind="stable")


def worth_of(
    ranking: int, keys_K: Ints, positions_KS: Ints, order_KS: Ints | None, scores: Floats, pages: Ints
) -> NDArray[Any]:
    """The values that tokens are ranked by, [K, S] in order of position."""
    if ranking == NEWEST_FIRST:
        return np.broadcast_to(np.arange(positions_KS.shape[1]), positions_KS.shape)
    if ranking == BY_SCORES:
        worth_KS = gather_slots(scores, pages, positions_KS.shape[1])
    else:
        worth_KS = lots_of(keys_K, positions_KS)
    return worth_KS if order_KS is None else np.take_along_axis(worth_KS, order_KS, axis=1)


def chosen_of(worth_KS: NDArray[Any], n_kept: int, sinks: int, recents: int) -> Bools:
    """Mask of the tokens to keep, [K, S] in order of position, ``n_kept`` per head: the first, the last, the best others."""
    n_cached = worth_KS.shape[1]
    chosen_KS = np.ones(worth_KS.shape, bool)
    if n_kept == n_cached:
        return chosen_KS
    others = slice(sinks, n_cached - recents)
    n_others, n_wanted = n_cached - recents - sinks, n_kept - recents - sinks
    chosen_KS[:, others] = False
    if n_wanted:
        others_KM = worth_KS[:, others]
        least_K1 = np.partition(others_KM, n_others - n_wanted, axis=1)[:, n_others - n_wanted, None]
        better_KM, equal_KM = others_KM > least_K1, others_KM == least_K1
        n_equal_K1 = n_wanted - better_KM.sum(axis=1, keepdims=True)
        chosen_KS[:, others] = better_KM | (equal_KM & (equal_KM.cumsum(axis=1) <= n_equal_K1))
    return chosen_KS


def sources_of(chosen_KS: Bools, order_KS: Ints | None, n_kept: int, *, stay: bool) -> Ints:
    """Source slots for the first ``n_kept`` slots, [K, C]: in order of position, or with as few moves as possible."""
    n_heads, n_cached = chosen_KS.shape
    heads, places = np.nonzero(chosen_KS)
    survivors_KC = places.reshape(n_heads, n_kept)
    if order_KS is not None:
        survivors_KC = np.take_along_axis(order_KS, survivors_KC, axis=1)
    if not stay:
        return survivors_KC
    survives_KS = np.zeros((n_heads, n_cached), bool)
    survives_KS[heads, survivors_KC.reshape(-1)] = True
    sources_KC = np.tile(np.arange(n_kept), (n_heads, 1))
    sources_KC[~survives_KS[:, :n_kept]] = n_kept + np.nonzero(survives_KS[:, n_kept:])[1]
    return sources_KC


@njit(parallel=True)
def move_tokens(kv: Rows, token_positions: Ints, scores: Floats, pages_T: Ints, sources_KC: Ints) -> None:
    """Move the content of slot ``sources_KC[k, i]`` of the sequence to its slot i, for each KV head k.

    If no source precedes its target, moving in ascending order overwrites nothing unread. Else sources are read from a copy.
    """
    n_heads, n_kept = sources_KC.shape
    page_size, row_length = kv.shape[3:]
    for head in numba.prange(n_heads):
        is_forward = True
        for i in range(n_kept):
            is_forward &= sources_KC[head, i] >= i
        n_copied = 0 if is_forward else n_kept
        rows = np.empty((n_copied, 2, row_length), kv.dtype)
        positions = np.empty(n_copied, np.int64)
        values = np.empty(n_copied, np.float32)
        for i in range(n_copied):
            source = sources_KC[head, i]
            page, offset = pages_T[source // page_size], source % page_size
            rows[i] = kv[page, :, head, offset]
            positions[i], values[i] = token_positions[page, head, offset], scores[page, head, offset]
        for i in range(n_copied):
            page, offset = pages_T[i // page_size], i % page_size
            kv[page, :, head, offset] = rows[i]
            token_positions[page, head, offset], scores[page, head, offset] = positions[i], values[i]
        for i in range(n_copied, n_kept):
            if sources_KC[head, i] != i:
                _move(kv, token_positions, scores, pages_T, head, sources_KC[head, i], i)


@njit()
def _move(kv: Rows, token_positions: Ints, scores: Floats, pages_T: Ints, head: int, source: int, target: int) -> None:
    page_size, row_length = kv.shape[3:]
    from_page, from_offset = pages_T[source // page_size], source % page_size
    page, offset = pages_T[target // page_size], target % page_size
    for half in range(2):
        for w in range(row_length):
            kv[page, half, head, offset, w] = kv[from_page, half, head, from_offset, w]
    token_positions[page, head, offset] = token_positions[from_page, head, from_offset]
    scores[page, head, offset] = scores[from_page, head, from_offset]


@njit(parallel=True)
def drop_one(
    kv: Rows,
    token_positions: Ints,
    scores: Floats,
    page_table_BT: Ints,
    n_cached_B: Ints,
    recents_B: Ints,
    sinks: int,
    ranking: int,
    keys_K: Ints,
) -> None:
    """Evict one token from each KV head of each sequence; the last slot's token takes its place.

    Every sequence must hold more than its protected tokens.
    """
    n_heads, page_size = token_positions.shape[1:]
    for task in numba.prange(len(n_cached_B) * n_heads):
        b, head = task // n_heads, task % n_heads
        n_cached = n_cached_B[b]
        positions = np.empty(n_cached, np.int64)
        for s in range(n_cached):
            positions[s] = token_positions[page_table_BT[b, s // page_size], head, s % page_size]
        first = _lowest_not_among(positions, sinks)
        last = _highest_not_among(positions, recents_B[b])
        worst, worst_worth = -1, 0.0
        for s in range(n_cached):
            if positions[s] < first or positions[s] > last:
                continue
            if ranking == BY_SCORES:
                worth = np.float64(scores[page_table_BT[b, s // page_size], head, s % page_size])
            elif ranking == NEWEST_FIRST:
                worth = np.float64(positions[s])
            else:
                worth = np.float64(_lot(keys_K[head], positions[s]))
            if worst < 0 or worth < worst_worth or (worth == worst_worth and positions[s] > positions[worst]):
                worst, worst_worth = s, worth
        if worst != n_cached - 1:
            _move(kv, token_positions, scores, page_table_BT[b], head, n_cached - 1, worst)


@njit()
def _lowest_not_among(positions_S: Ints, n_lowest: int) -> int:
    """The lowest position except the ``n_lowest`` lowest ones, found without sorting if those are 0, 1, ..."""
    n_below = 0
    for position in positions_S:
        n_below += position < n_lowest
    if n_below == n_lowest:
        return n_lowest
    return int(np.partition(positions_S, n_lowest)[n_lowest])


@njit()
def _highest_not_among(positions_S: Ints, n_highest: int) -> int:
    """The highest position except the ``n_highest`` highest ones, found without sorting if those are consecutive."""
    end = int(positions_S.max()) - n_highest
    n_above = 0
    for position in positions_S:
        n_above += position > end
    if n_above == n_highest:
        return end
    index = len(positions_S) - 1 - n_highest
    return int(np.partition(positions_S, index)[index])


@njit()
def lots_of(keys_K: Ints, positions_KS: Ints) -> Ints:
    """The random ranks of all positions, [K, S]; compiled because numpy's integer division is slow."""
    lots_KS = np.empty_like(positions_KS)
    for head in range(len(keys_K)):
        for s in range(positions_KS.shape[1]):
            lots_KS[head, s] = _lot(keys_K[head], positions_KS[head, s])
    return lots_KS


@njit()
def _lot(key: int, position: int) -> int:
    """``lots.lot_of``, compiled."""
    once = _scrambled(key + position, _ROUNDS[3])
    return int(_scrambled(_scrambled(once, _ROUNDS[4]), _ROUNDS[5]) % _LOTS)
