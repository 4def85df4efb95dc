"""RecallAttention in plain fp32 loops."""

import math

import numpy as np

from trt_kv.plugins.paging import Floats, Ints, gather_kv, pages_of
from trt_kv.policy import kept_tokens as kept_of


def run(
    *,
    q: Floats,
    k: Floats,
    v: Floats,
    positions: Ints,
    cu_tokens: Ints,
    prompt_remaining: Ints,
    slots: Ints,
    page_table: Ints,
    kv_len: Ints,
    prompt_len: Ints,
    found_budget: Ints,
    query_rows: Ints,
    kv: Floats,
    token_positions: Ints,
    summaries: Floats,
    last_query: Floats,
    layer: int,
    scale: float,
    page_size: int,
    kept_share: float = 1.0,
    kept_tokens: int = 0,
    sinks: int = 0,
    recent: int = 1,
    tau: float = 0.8,
    summary: int = 0,
    pooling: int = 0,
    softmax_scale: float = 1.0,
) -> tuple[Floats, Floats, Ints]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place."""
    n_heads, n_kv_heads = q.shape[1], kv.shape[2]
    for i in range(len(q)):
        page, offset = divmod(int(slots[layer, i]), page_size)
        kv[page, 0, :, offset] = k[i]
        kv[page, 1, :, offset] = v[i]
        token_positions[page, :, offset] = positions[i]

    out, lse = np.empty(q.shape, np.float32), np.empty((len(q), n_heads), np.float32)
    corrected = np.zeros((len(kv_len[layer]), n_kv_heads), np.int64)
    for b in range(len(cu_tokens) - 1):
        rows = range(cu_tokens[b], cu_tokens[b + 1])
        if not rows:
            continue
        n = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n, page_size)
        for j in range((n - len(rows)) // page_size, n // page_size):
            for head in range(n_kv_heads):
                summaries[pages[j], head] = summary_of(kv[pages[j], 0, head].astype(np.float32), summary)
        k_KSD, v_KSD = gather_kv(kv, pages, n)
        row = int(query_rows[layer, b])
        generated = prompt_remaining[rows[-1]] < 0
        attended = [list(range(n))] * n_kv_heads
        if generated:
            group = n_heads // n_kv_heads
            budget = int(found_budget[layer, b])
            if budget < 0:
                budget = kept_tokens + kept_of(int(prompt_len[b]), kept_share)
            n_sinks, first_newest = -(-sinks // page_size), max(0, n - recent) // page_size
            room = max(0, budget // page_size - n_sinks - (math.ceil((recent - 1) / page_size) + 1))
            between = range(n_sinks, first_newest)
            for head in range(n_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                probe, before = q[rows[-1], heads].astype(np.float64), last_query[row, heads].astype(np.float64)
                if not np.mean([cosine(a, c) for a, c in zip(probe, before, strict=True)]) >= np.float32(tau):
                    corrected[b, head] = 1
                else:
                    probe = before
                values = page_values(probe, summaries[pages[between.start : between.stop], head], pooling, softmax_scale)
                ranked = sorted((-value, page) for value, page in zip(values, between, strict=True))
                chosen = {page for _, page in ranked[:room]} | set(range(n_sinks)) | set(range(first_newest, len(pages)))
                attended[head] = [s for s in range(n) if s // page_size in chosen]
        for i in rows:
            for h in range(n_heads):
                head = h * n_kv_heads // n_heads
                tokens = [s for s in attended[head] if s <= positions[i]]
                logits = (k_KSD[head, tokens].astype(np.float32) * q[i, h].astype(np.float32)).sum(axis=1) * np.float32(scale)
                weights = np.exp(logits - logits.max())
                lse[i, h] = logits.max() + np.log(weights.sum())
                out[i, h] = (weights[:, None] * v_KSD[head, tokens].astype(np.float32)).sum(axis=0) / weights.sum()
        last_query[row] = q[rows[-1]]
    return out, lse, corrected


def summary_of(k_PD: Floats, summary: int) -> Floats:
    """lo and hi [2, D] of one full page-head."""
    lo, hi = k_PD.min(axis=0), k_PD.max(axis=0)
    if summary == 0:
        return np.stack([lo, hi])
    middle = (lo + hi) / 2
    deviation = np.abs(k_PD - middle).mean(axis=0)
    return np.stack([middle - deviation, middle + deviation])


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of the angle between two vectors; not a number where one of them is zero."""
    norms = math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())
    return float((a * b).sum() / norms) if norms else math.nan


def page_values(probe_GD: Floats, summaries_J2D: Floats, pooling: int, softmax_scale: float) -> list[float]:
    """What one KV head's pages are ranked by."""
    lo_JD, hi_JD = summaries_J2D.astype(np.float64)[:, 0], summaries_J2D.astype(np.float64)[:, 1]
    values_GJ = np.array([np.maximum(probe * lo_JD, probe * hi_JD).sum(axis=1) for probe in probe_GD])
    if values_GJ.shape[1] and pooling < 2:
        exps_GJ = np.exp(softmax_scale * (values_GJ - values_GJ.max(axis=1, keepdims=True)))
        values_GJ = exps_GJ / exps_GJ.sum(axis=1, keepdims=True)
    return [float(value) for value in (values_GJ.mean(axis=0) if pooling % 2 == 0 else values_GJ.max(axis=0))]
