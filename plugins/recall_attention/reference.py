"""RecallAttention in plain fp32 loops."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.kv_rows import dtype_of, load, store
from trt_kv.plugins.paging import Floats, Ints, capped, gather_kv, pages_of
from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.policy import kept_tokens as kept_of


def run(args: Arguments[NDArray[Any]]) -> tuple[Floats, Floats, Ints]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place."""
    n_heads, n_kv_heads, scale = args.q.shape[1], args.kv.shape[2], np.float32(args.scale)
    for i in range(len(args.q)):
        page, offset = divmod(int(args.slots[args.layer, i]), args.page_size)
        args.kv[page, 0, :, offset] = store(args.k[i], dtype_of(args.kv))
        args.kv[page, 1, :, offset] = store(args.v[i], dtype_of(args.kv))
        args.token_positions[page, :, offset] = args.positions[i]

    out, lse = np.empty(args.q.shape, np.float32), np.empty((len(args.q), n_heads), np.float32)
    corrected = np.zeros((len(args.kv_len[args.layer]), n_kv_heads), np.int64)
    for b in range(len(args.cu_tokens) - 1):
        rows = range(args.cu_tokens[b], args.cu_tokens[b + 1])
        if not rows:
            continue
        n = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n, args.page_size)
        for j in range((n - len(rows)) // args.page_size, n // args.page_size):
            for head in range(n_kv_heads):
                lo_hi = summary_of(load(args.kv[pages[j], 0, head]), args.summary)
                args.summaries[pages[j], head] = store(lo_hi, dtype_of(args.summaries))
        k_KSD, v_KSD = gather_kv(args.kv, pages, n)
        row = int(args.query_rows[args.layer, b])
        generated = args.prompt_remaining[rows[-1]] < 0
        attended = [list(range(n))] * n_kv_heads
        if generated:
            group = n_heads // n_kv_heads
            budget = int(args.adaptive_budget[args.layer, b])
            if budget < 0:
                budget = args.kept_tokens + kept_of(int(args.prompt_len[b]), args.kept_share)
            n_sinks, first_newest = -(-args.sinks // args.page_size), max(0, n - args.recent) // args.page_size
            room = max(0, budget // args.page_size - n_sinks - (math.ceil((args.recent - 1) / args.page_size) + 1))
            between = range(n_sinks, first_newest)
            for head in range(n_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                probe, before = args.q[rows[-1], heads].astype(np.float64), args.last_query[row, heads].astype(np.float64)
                if not np.mean([cosine(a, c) for a, c in zip(probe, before, strict=True)]) >= np.float32(args.tau):
                    corrected[b, head] = 1
                else:
                    probe = before
                summaries = load(args.summaries[pages[between.start : between.stop], head])
                bounds_GJ = bounds_of(probe, summaries)
                if args.summary == 2:
                    bounds_GJ = estimates_of(probe, summaries, load(args.kv[pages[between.start : between.stop], 0, head]))
                values = values_of(bounds_GJ, args.pooling, args.softmax_scale)
                ranked = sorted((-value, page) for value, page in zip(values, between, strict=True))
                chosen = {page for _, page in ranked[:room]} | set(range(n_sinks)) | set(range(first_newest, len(pages)))
                attended[head] = [s for s in range(n) if s // args.page_size in chosen]
        for i in rows:
            for h in range(n_heads):
                head = h * n_kv_heads // n_heads
                tokens = [s for s in attended[head] if s <= args.positions[i]]
                logits = (k_KSD[head, tokens].astype(np.float32) * args.q[i, h].astype(np.float32)).sum(axis=1) * scale
                logits = capped(logits, args.soft_cap)
                weights = np.exp(logits - logits.max())
                lse[i, h] = logits.max() + np.log(weights.sum())
                out[i, h] = (weights[:, None] * v_KSD[head, tokens].astype(np.float32)).sum(axis=0) / weights.sum()
        args.last_query[row] = args.q[rows[-1]]
    return out, lse, corrected


def summary_of(k_PD: Floats, summary: int) -> Floats:
    """lo and hi [2, D] of one full page-head."""
    lo, hi = k_PD.min(axis=0), k_PD.max(axis=0)
    if summary != 1:
        return np.stack([lo, hi])
    middle = (lo + hi) / 2
    deviation = np.abs(k_PD - middle).mean(axis=0)
    return np.stack([middle - deviation, middle + deviation])


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of the angle between two vectors; NaN if one of them is zero."""
    norms = math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())
    return float((a * b).sum() / norms) if norms else math.nan


def page_values(probe_GD: Floats, summaries_J2D: Floats, pooling: int, softmax_scale: float) -> list[float]:
    """The values that one KV head's pages are ranked by, with bounds."""
    return values_of(bounds_of(probe_GD, summaries_J2D), pooling, softmax_scale)


def bounds_of(probe_GD: Floats, summaries_J2D: Floats) -> Floats:
    """[G, J]: upper bounds of the products with a page's keys."""
    lo_JD, hi_JD = summaries_J2D.astype(np.float64)[:, 0], summaries_J2D.astype(np.float64)[:, 1]
    return np.array([np.maximum(probe * lo_JD, probe * hi_JD).sum(axis=1) for probe in probe_GD])


def estimates_of(probe_GD: Floats, summaries_J2D: Floats, k_JPD: Floats) -> Floats:
    """[G, J]: the largest of the products with a page's keys, of whose channels only the level between lo and hi is known, or
    where the queries are small nothing.
    """
    smallest_J1D, largest_J1D = k_JPD.min(axis=1, keepdims=True), k_JPD.max(axis=1, keepdims=True)
    width_J1D = np.where(largest_J1D > smallest_J1D, largest_J1D - smallest_J1D, np.float32(1))
    levels_JPD = np.rint((k_JPD - smallest_J1D) * np.float32(3) / width_J1D)
    n_coded = math.ceil(probe_GD.shape[1] / 4)
    coded = np.argsort(-np.square(probe_GD.astype(np.float32)).sum(axis=0), kind="stable")[:n_coded]
    places_JPD = np.full(k_JPD.shape, 0.5)
    places_JPD[:, :, coded] = levels_JPD[:, :, coded] / 3
    lo_J1D, hi_J1D = (summaries_J2D[:, i : i + 1].astype(np.float64) for i in range(2))
    keys_JPD = lo_J1D + places_JPD * (hi_J1D - lo_J1D)
    return np.array([(keys_JPD * probe).sum(axis=2).max(axis=1, initial=-math.inf) for probe in probe_GD])


def values_of(values_GJ: Floats, pooling: int, softmax_scale: float) -> list[float]:
    """One value per page of those of a KV head's query heads."""
    if values_GJ.shape[1] and pooling < 2:
        exps_GJ = np.exp(softmax_scale * (values_GJ - values_GJ.max(axis=1, keepdims=True)))
        values_GJ = exps_GJ / exps_GJ.sum(axis=1, keepdims=True)
    return [float(value) for value in (values_GJ.mean(axis=0) if pooling % 2 == 0 else values_GJ.max(axis=0))]
