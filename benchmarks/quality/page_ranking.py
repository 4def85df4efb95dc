"""How well pages are chosen, against the bytes that choosing reads: on a model's own queries and keys, after RoPE.

Of each text the queries of its last tokens, the right answer, attend to everything before them. Each way of ranking chooses as
many pages as the budget has room for, besides sinks and newest; what it is worth is the attention that falls on them.
docs/decisions/0075 has the conclusions.

N queries, G query heads of a KV head, J pages between sinks and newest, P tokens of a page, S tokens, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.harness import Check, Report, Row, check_close, rounded
from benchmarks.models import FULL, model_runner
from benchmarks.peers.subjects import bundled, engine_for, smollm2
from benchmarks.quality.kv_scales import Recording
from benchmarks.quality.recall.estimates import Way, log_sum_exp, ways
from benchmarks.quality.recall.texts import Asked, facts_in_help, records
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.engine import Engine

PAGE_SIZES = (8, 16, 32)
SINKS, NEWEST = 32, 64
SHARE = 0.1
N_QUERIES = 32
TOP = 16
LENGTHS = (2048, 4096)
EVERY = 7
"""One KV head in so many is measured; with three in a layer, those of every layer's first, second and third in turn."""
NUCLEUS = (0.8, 0.9, 0.95)
TEXTS: dict[str, Callable[[Tokenizer, int, int], Asked]] = {
    "prose": lambda tokenizer, n, seed: facts_in_help(tokenizer, n_tokens=n, n_facts=4, seed=seed),
    "records": lambda tokenizer, n, seed: records(tokenizer, n_tokens=n, n_asked=4, seed=seed),
}


@dataclass(frozen=True, kw_only=True)
class HeadVectors:
    """Of one KV head: queries with attention's scale, and all keys before the first of them."""

    q_NGD: Floats
    k_SD: Floats


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one KV head's queries attend to: weights of tokens, mean over its query heads."""

    between_NJP: Floats
    fixed_N: Floats

    @property
    def n_pages(self) -> int:
        return len(self.between_NJP[0])


def run(folder: Path, *, quick: bool) -> Report:  # noqa: ARG001  (every benchmark is given a folder)
    """All ways of ranking on the same queries and keys; quick: one short text of the bundled model."""
    subject, lengths = (bundled(), (500,)) if quick else (smollm2(), LENGTHS)
    path = engine_for(subject, {"policy": "full", "quant": "int4"})
    tables: dict[str, list[Row]] = {}
    checks: list[Check] = []
    with Engine.load(path, prefix_cache=False, cache_tokens=64) as engine:
        for n_tokens in lengths:
            for name, text in TEXTS.items():
                heads = list(vectors_of(engine, text(engine.tokenizer, n_tokens - 8, 0)))[::EVERY]
                rows, check = _compared(heads)
                tables[f"{name}, {n_tokens} tokens, {SHARE:.0%} attended to"] = rows
                tables[f"{name}, {n_tokens} tokens, pages until their estimated share"] = _nuclei(heads)
                checks.append(check)
    return Report(
        title="Choosing pages, against the bytes read to rank them",
        settings={"model": subject.name, "one_in_heads": EVERY, "queries": N_QUERIES, "sinks": SINKS, "newest": NEWEST},
        checks=checks,
        tables=tables,
    )


def vectors_of(engine: Engine, asked: Asked) -> Iterator[HeadVectors]:
    """Those of all layers and KV heads; queries are those that predict the first tokens of the answer."""
    dense = engine.runner._executor
    assert isinstance(dense, SplitStepExecutor)
    recording = Recording(dense.dense)
    config = engine.manifest.config
    answer = asked.answer_ids[:N_QUERIES]
    text = asked.prompt_ids + answer
    runner = model_runner(recording, config, policy=FULL, cache_tokens=len(text) + 32)
    sequence = runner.new_sequence()
    runner.prefill(sequence, text)
    sequence.release()
    for _, parts in sorted(recording.vectors.items()):
        q, k, _ = (np.concatenate(part) for part in zip(*parts, strict=True))
        n_kv_heads, head_size = k.shape[1:]
        q_NKGD = q[-len(answer) :].reshape(len(answer), n_kv_heads, -1, head_size) * np.float32(config.scale)
        for head in range(n_kv_heads):
            yield HeadVectors(q_NGD=q_NKGD[:, head], k_SD=np.ascontiguousarray(k[: -len(answer), head]))


def attended(head: HeadVectors, page_size: int) -> tuple[Attended, Floats]:
    """True weights, and the keys of the pages between sinks and newest [J, P, D]."""
    n_pages = (len(head.k_SD) - SINKS - NEWEST) // page_size
    logits_NGS = head.q_NGD @ head.k_SD.T
    weights = np.exp(logits_NGS - logits_NGS.max(axis=-1, keepdims=True))
    weights_NS = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)
    pages = slice(SINKS, SINKS + n_pages * page_size)
    between_NJP = weights_NS[:, pages].reshape(len(weights_NS), n_pages, page_size)
    fixed_N = weights_NS.sum(axis=1) - between_NJP.sum(axis=(1, 2))
    return Attended(between_NJP=between_NJP, fixed_N=fixed_N), head.k_SD[pages].reshape(n_pages, page_size, -1)


def values_of(way: Way, head: HeadVectors, k_JPD: Floats, *, pooling: str = "mean_softmax", factor: float = 1.0) -> Floats:
    """[N, J]: what a KV head's pages are ranked by."""
    n_queries, group, head_size = head.q_NGD.shape
    logits_NGJ = way.estimate(head.q_NGD.reshape(-1, head_size), k_JPD).reshape(n_queries, group, -1)
    if pooling == "mean_raw":
        mean: Floats = logits_NGJ.mean(axis=1)
        return mean
    shares = np.exp(factor * (logits_NGJ - logits_NGJ.max(axis=-1, keepdims=True)))
    values: Floats = (shares / shares.sum(axis=-1, keepdims=True)).mean(axis=1)
    return values


def _compared(heads: Sequence[HeadVectors]) -> tuple[list[Row], Check]:
    rows: list[Row] = []
    worst = 0.0
    _, group, head_size = heads[0].q_NGD.shape
    for page_size in PAGE_SIZES:
        known = ways(page_size, head_size, group)
        bounds, deviation = _way(known, "bounds, bf16"), _way(known, "mean deviation")
        sides: list[tuple[str, Way, str, float]] = [
            ("as freekv: bounds, softmax without scale", bounds, "mean_softmax", head_size**0.5),
            ("as arkvale: mean deviation, mean", deviation, "mean_raw", 1.0),
            *((way.name, way, "mean_softmax", 1.0) for way in known),
        ]
        found: dict[str, list[Floats]] = {name: [] for name, *_ in sides}
        best: list[Floats] = []
        for head in heads:
            true, k_JPD = attended(head, page_size)
            n_chosen = max(1, int((SHARE * len(head.k_SD) - SINKS - NEWEST) // page_size))
            for name, way, pooling, factor in sides:
                found[name].append(_held(true, values_of(way, head, k_JPD, pooling=pooling, factor=factor), n_chosen))
            best.append(_best_tokens(true, n_chosen * page_size))
            exact = _shares(log_sum_exp(np.tensordot(head.q_NGD, k_JPD, axes=(2, 2))))
            worst = max(worst, float(np.abs(values_of(_way(known, "exact keys, bf16"), head, k_JPD) - exact).max()))
        rows += [_row(page_size, name, way.bytes_per_key, found[name]) for name, way, *_ in sides]
        rows.append(_row(page_size, "best tokens, not pages", None, best))
    return rows, check_close("shares of exact keys", np.array([worst]), np.zeros(1), within=1e-4)


def _way(known: Sequence[Way], name: str) -> Way:
    return next(way for way in known if way.name == name)


def _shares(logits_NGJ: Floats) -> Floats:
    shares = np.exp(logits_NGJ - logits_NGJ.max(axis=-1, keepdims=True))
    found: Floats = (shares / shares.sum(axis=-1, keepdims=True)).mean(axis=1)
    return found


def _held(true: Attended, values_NJ: Floats, n_chosen: int) -> Floats:
    """[N, 4]: weight on what is attended to, weight on chosen pages, weight between, share of the top tokens chosen."""
    chosen_NC = np.argsort(-values_NJ, axis=1, kind="stable")[:, :n_chosen]
    of_pages_NJ = true.between_NJP.sum(axis=2)
    held_N = np.take_along_axis(of_pages_NJ, chosen_NC, axis=1).sum(axis=1)
    return np.stack([true.fixed_N + held_N, held_N, of_pages_NJ.sum(axis=1), _top_share(true, chosen_NC)], axis=1)


def _top_share(true: Attended, chosen_NC: Ints) -> Floats:
    n_queries, n_pages, page_size = true.between_NJP.shape
    top_NT = np.argpartition(-true.between_NJP.reshape(n_queries, -1), TOP, axis=1)[:, :TOP] // page_size
    is_chosen_NJ = np.zeros((n_queries, n_pages), bool)
    np.put_along_axis(is_chosen_NJ, chosen_NC, values=True, axis=1)
    share: Floats = np.take_along_axis(is_chosen_NJ, top_NT, axis=1).mean(axis=1)
    return share


def _best_tokens(true: Attended, n_tokens: int) -> Floats:
    """As ``_held``, if single tokens could be chosen."""
    weights_NS = true.between_NJP.reshape(len(true.between_NJP), -1)
    held_N = -np.partition(-weights_NS, n_tokens, axis=1)[:, :n_tokens].sum(axis=1)
    return np.stack([true.fixed_N + held_N, held_N, weights_NS.sum(axis=1), np.ones(len(held_N))], axis=1)


def _row(page_size: int, name: str, n_bytes: float | None, found: Sequence[Floats]) -> Row:
    all_MF = np.concatenate(found)
    return {
        "page": page_size,
        "ranked_by": name,
        "bytes_per_key": None if n_bytes is None else rounded(n_bytes),
        "attention_held_percent": rounded(100 * all_MF[:, 0].mean()),
        "of_attention_between_percent": rounded(100 * all_MF[:, 1].sum() / all_MF[:, 2].sum()),
        f"top_{TOP}_tokens_held_percent": rounded(100 * all_MF[:, 3].mean()),
        "attention_held_worst_tenth_percent": rounded(100 * np.quantile(all_MF[:, 0], 0.1)),
    }


def _nuclei(heads: Sequence[HeadVectors]) -> list[Row]:
    """How many pages it takes until their estimated share of the attention between sinks and newest is reached (Twilight)."""
    rows: list[Row] = []
    names = ("bounds", "bounds and 2 bits per channel", "exact keys, bf16")
    for page_size in PAGE_SIZES[1:2]:
        known = ways(page_size, heads[0].k_SD.shape[1], heads[0].q_NGD.shape[1])
        for name in names:
            widths: dict[float, list[Floats]] = {share: [] for share in NUCLEUS}
            held: dict[float, list[Floats]] = {share: [] for share in NUCLEUS}
            for head in heads:
                true, k_JPD = attended(head, page_size)
                values_NJ = values_of(_way(known, name), head, k_JPD)
                order_NJ = np.argsort(-values_NJ, axis=1, kind="stable")
                so_far_NJ = np.cumsum(np.take_along_axis(values_NJ, order_NJ, axis=1), axis=1)
                true_NJ = np.cumsum(np.take_along_axis(true.between_NJP.sum(axis=2), order_NJ, axis=1), axis=1)
                for share in NUCLEUS:
                    width_N = np.minimum((so_far_NJ < share).sum(axis=1) + 1, true.n_pages)
                    widths[share].append(width_N / true.n_pages)
                    held[share].append(true.fixed_N + true_NJ[np.arange(len(width_N)), width_N - 1])
            rows += [
                {
                    "page": page_size,
                    "ranked_by": name,
                    "estimated_share": share,
                    "pages_percent": rounded(100 * np.mean(widths[share])),
                    "pages_widest_tenth_percent": rounded(100 * np.quantile(np.concatenate(widths[share]), 0.9)),
                    "attention_held_percent": rounded(100 * np.mean(held[share])),
                    "attention_held_worst_tenth_percent": rounded(100 * np.quantile(np.concatenate(held[share]), 0.1)),
                }
                for share in NUCLEUS
            ]
    return rows
