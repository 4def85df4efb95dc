"""What ranking pages by codes of keys is worth in answers: many look-ups in records, and a number in prose.

SmolLM2 with int4 weights. Each prompt is read once, with all of its cache; then every policy goes on from a copy of it, in
which a step attends to a tenth of the prompt's tokens, in whole pages. The right answer of the records is fed, and each of its
values counts for itself; the number in prose is generated.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import BenchmarkError, Check, Report, Row, rounded
from benchmarks.models import programs_of
from benchmarks.peers.subjects import bundled, engine_for, smollm2
from benchmarks.quality.recall.texts import Asked, records
from benchmarks.serving_peers.prompts import facts_in_prose
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.recall_attention.choice import summaries_of
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.program import PAGE_SUMMARIES
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

SHARE = 0.1
PAGE_SIZE = 8
LENGTHS = {2048: 6, 4096: 6, 8192: 6}
"""Prompts of each length, in tokens of prompt and answer. Reading the longest takes most of the time."""
ENDS = {"sinks": 16, "recent": 64}
LEAST = sum(ENDS.values()) + 4 * PAGE_SIZE
"""Tokens that a step attends to even of short prompts, such as those of a quick run."""
SIDES: dict[str, tuple[str, dict[str, object]]] = {
    "freekv": ("freekv", {}),
    "quest": ("quest", {"exempt_layers": ()}),
    "arkvale": ("arkvale", {"exempt_layers": ()}),
    "freekv, page_summary=codes": ("freekv", {"page_summary": "codes"}),
    "freekv, page_summary=codes group_pooling=max_raw": ("freekv", {"page_summary": "codes", "group_pooling": "max_raw"}),
    "quest, page_summary=codes": ("quest", {"page_summary": "codes", "exempt_layers": ()}),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one prompt: log-probabilities [N, V] of the tokens of the answer that were fed, and the tokens that were likeliest."""

    log_probabilities: Floats
    best: list[int]


def run(folder: Path, *, quick: bool) -> Report:  # noqa: ARG001  (every benchmark is given a folder)
    """Every side on the same prompts; quick: one short prompt each, of the bundled model."""
    lengths = {1200: 1} if quick else LENGTHS
    path = engine_for(bundled() if quick else smollm2(), {"policy": "full", "quant": "int4"})
    with Engine.load(path, prefix_cache=False, cache_tokens=64) as engine:
        tables = {
            f"{n_tokens} tokens: many look-ups in records, and a number in prose": _of_length(engine, n, n_tokens)
            for n_tokens, n in lengths.items()
        }
    return Report(
        title="Answers from a tenth of the cache, by how pages are ranked",
        settings={
            "model": "bundled" if quick else "smollm2",
            "prompts": ", ".join(map(str, lengths.values())),
            "tokens": ", ".join(map(str, lengths)),
            "share": SHARE,
            "page": PAGE_SIZE,
        }
        | ENDS,
        checks=[
            Check(
                what="sides without an answer",
                error=sum(row["values"] == 0 for rows in tables.values() for row in rows),
                allowed=0,
            )
        ],
        tables=tables,
    )


def _of_length(engine: Engine, n: int, n_tokens: int) -> list[Row]:
    """All sides on ``n`` prompts of each kind. What is generated at most must fit into the model's positions."""
    asked = [records(engine.tokenizer, n_tokens=n_tokens - 8, n_asked=4, seed=seed) for seed in range(100, 100 + n)]
    facts = facts_in_prose(engine.tokenizer, n, n_tokens=n_tokens - 8, seed=11)
    needles = [
        Asked(prompt_ids=fact.token_ids, answer_ids=engine.tokenizer.encode(f" {fact.answer}").ids, values=()) for fact in facts
    ]
    return _rows(engine, asked, needles)


def _rows(engine: Engine, asked: list[Asked], needles: list[Asked]) -> list[Row]:
    of_records = [_sides(engine, prompt, feeds=True) for prompt in asked]
    of_needles = [_sides(engine, prompt, feeds=False) for prompt in needles]
    rows: list[Row] = []
    for name in of_records[0]:
        right, missed, divergence = [], [], []
        for prompt, sides in zip(asked, of_records, strict=True):
            found, whole, values = sides[name], sides["everything"], list(prompt.values)
            right += [found.best[at] == prompt.answer_ids[at] for at in values]
            missed += [-float(found.log_probabilities[at, prompt.answer_ids[at]]) for at in values]
            p = np.exp(whole.log_probabilities)
            divergence.append(float((p * (whole.log_probabilities - found.log_probabilities)).sum(axis=1).mean()))
        hits = [sides[name].best == prompt.answer_ids for prompt, sides in zip(needles, of_needles, strict=True)]
        rows.append(
            {
                "policy": name,
                "values": len(right),
                "right_tokens_percent": rounded(100 * np.mean(right)),
                "nats_per_value": rounded(np.mean(missed)),
                "kl_to_everything_nats": rounded(np.mean(divergence)),
                "numbers_found": sum(hits),
                "numbers": len(hits),
            }
        )
    return rows


def _sides(engine: Engine, prompt: Asked, *, feeds: bool) -> dict[str, Found]:
    """Every side after the same prompt: the answer is fed, or generated."""
    dense, config = engine.runner._executor, engine.manifest.config
    if not isinstance(dense, SplitStepExecutor):
        raise BenchmarkError("this benchmark runs on a CPU", got=type(dense).__name__)
    n_prompt, n_answer = len(prompt.prompt_ids), len(prompt.answer_ids)
    pool = HostKvPool(
        n_pages=2 * config.n_layers * -(-(n_prompt + n_answer) // PAGE_SIZE),
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        n_query_heads=config.n_heads,
    )
    policies = {"everything": _policy("freekv", {}, n_prompt + n_answer + 2 * PAGE_SIZE + ENDS["recent"])}
    policies |= {
        name: _policy(preset, settings, max(int(SHARE * n_prompt), LEAST)) for name, (preset, settings) in SIDES.items()
    }
    found: dict[str, Found] = {}
    reader = host_runner(dense.dense, pool, programs_of(policies["everything"], config, page_size=PAGE_SIZE))
    whole = reader.new_sequence()
    first_V = reader.prefill(whole, prompt.prompt_ids)
    for name, policy in policies.items():
        runner = host_runner(dense.dense, pool, programs_of(policy, config, page_size=PAGE_SIZE))
        sequence = whole.fork()
        _summarise(pool, sequence, policy)
        logits = [first_V]
        for at in range(n_answer - 1):
            token = prompt.answer_ids[at] if feeds else int(logits[-1].argmax())
            logits.append(runner.decode([sequence], [token])[0])
        sequence.release()
        logits_NV = np.stack(logits).astype(np.float64)
        largest_N1 = logits_NV.max(axis=1, keepdims=True)
        totals_N1 = largest_N1 + np.log(np.exp(logits_NV - largest_N1).sum(axis=1, keepdims=True))
        found[name] = Found(log_probabilities=logits_NV - totals_N1, best=logits_NV.argmax(axis=1).tolist())
    whole.release()
    return found


def _policy(preset: str, settings: dict[str, object], tokens: int) -> Policy:
    return policy_with(policy_from_name(preset), {"tokens": tokens, **ENDS, **settings})


def _summarise(pool: HostKvPool, sequence: SequenceCache, policy: Policy) -> None:
    """Give the pool's full pages the summaries of a policy."""
    full = sequence.page_table[:, : sequence.num_computed_tokens // PAGE_SIZE].ravel()
    of_full = summaries_of(pool.kv[full, 0], PAGE_SUMMARIES[policy.page_summary], pool.dtype)
    pool.summaries = np.empty((pool.n_pages, *of_full.shape[1:]), of_full.dtype)
    pool.summaries[full] = of_full
