"""What prefix reuse saves: time to the first token of a prompt whose beginning was read before; a trace of shared documents.

The engines are those of ``make bench ARGS=peers``, built where they are missing: SmolLM2 with int4 weights, and the shape of
Llama 3.2 1B with random weights, which has positions for 16,384 tokens.

The trace is generated: documents are drawn with Zipf's law (exponent 1), as popularity is distributed in the published traces
of Mooncake (arXiv 2407.00079, section 4), where at most half of the blocks can be hit; half of the requests go on with a
conversation about their document, as most of ShareGPT's do.
"""

import gc
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, rounded
from benchmarks.models import random_tokens
from benchmarks.peers.subjects import SUBJECTS, Subject, bundled, engine_for
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation

QUESTION = 40
"""Tokens of a question behind a document."""
LIMIT = 0.03
"""Share of the time of reading 16,384 tokens that a reused prefix of them may take to the first token."""
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "pooledwindow 20 %": {"policy": "pooledwindow", "budget": 0.2, "set": "budget=uniform"},
    "freekv 2048": {"policy": "freekv", "set": "tokens=2048"},
}
WAYS: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
    "smollm2": [*((policy, 4096, {}) for policy in POLICIES), ("full", 4096, {"kv_dtype": "int8"})],
    "llama-3.2-1b": [("freekv 2048", 16384, {"kv_dtype": "int8"})],
}
QUICK: list[tuple[str, int, dict[str, Any]]] = [("full", 1024, {}), ("freekv 2048", 1024, {"kv_dtype": "int8"})]


def run(folder: Path, *, quick: bool) -> Report:
    """Each model, policy and length in turn; quick: the bundled checkpoint."""
    rows: list[Row] = []
    subjects = [(bundled(), QUICK)] if quick else [(SUBJECTS[name](), ways) for name, ways in WAYS.items()]
    for subject, ways in subjects:
        for policy, n_tokens, options in ways:
            rows.append(_first_tokens(subject, policy, n_tokens, options, folder / "store"))
            shutil.rmtree(folder / "store", ignore_errors=True)
    trace = _trace(subjects[0][0], n_requests=8 if quick else 16)
    trace += [row for subject, _ in subjects[1:] for row in _trace(subject, n_requests=12, longest=1200)]
    at_once = _on_one_document(subjects[0][0], n_requests=4 if quick else 8, n_tokens=1024 if quick else 2048)
    longest = [row for row in rows if row["prefix_tokens"] == max(row["prefix_tokens"] for row in rows)]
    return Report(
        title="Prefix reuse",
        settings={"question_tokens": QUESTION, "weights": "int4", "chunk": 512},
        checks=[
            Check(what="tokens and log-probabilities that differ from those without reuse", error=row.pop("differ"), allowed=0)
            for row in rows
        ],
        tables={
            "time to the first token": rows,
            "a trace of shared documents and conversations": trace,
            "questions on one document, all sent at once": at_once,
        },
        targets=[
            Target(
                what=f"first token behind {row['prefix_tokens']} reused tokens / behind as many read ones: {row['policy']}",
                measured=rounded(row["reused_s"] / row["read_s"]),
                limit=LIMIT,
            )
            for row in longest
        ],
    )


def _engine(subject: Subject, policy: str, n_tokens: int, options: dict[str, Any], **more: Any) -> Engine:
    folder = engine_for(subject, {**POLICIES[policy], "quant": "int4"})
    host: dict[str, Any] = {"host_tokens": n_tokens} if policy.startswith("freekv") else {}
    return Engine.load(folder, verify=False, cache_tokens=n_tokens, **host, **options, **more)


def _first_tokens(subject: Subject, policy: str, n_tokens: int, options: dict[str, Any], store: Path) -> Row:
    """One prefix: read, then reused from memory, then by another engine from files."""
    document = random_tokens(n_tokens, subject.vocab_size, seed=1)
    questions = [random_tokens(QUESTION, subject.vocab_size, seed=seed) for seed in (2, 3)]
    room = n_tokens + 2 * QUESTION + 64
    with _engine(subject, policy, room, options, prefix_store=str(store), prefix_bytes=2**34) as engine:
        _answer(engine, random_tokens(600, subject.vocab_size, seed=9))  # compiles and touches what the first request would
        read = _answer(engine, document + questions[0])
        before = engine.statistics["prefix_cache"]
        reused = _answer(engine, document + questions[1])
        again = _answer(engine, document + questions[0])
        decode_ms = 1e3 * again.times.decode_s / max(1, len(again.token_ids) - 1)
    gc.collect()
    with _engine(subject, policy, room, options, prefix_store=str(store), prefix_bytes=2**34) as engine:
        _answer(engine, random_tokens(600, subject.vocab_size, seed=9))
        n_before = engine.statistics["prefix_cache"]["stored_hit_tokens"]
        stored = _answer(engine, document + questions[1])
        from_store = engine.statistics["prefix_cache"]["stored_hit_tokens"] - n_before
    return {
        "model": subject.name,
        "policy": policy,
        "cache": options.get("kv_dtype", "float32"),
        "prefix_tokens": n_tokens,
        "cached_tokens": reused.n_cached_tokens,
        "from_files_tokens": from_store,
        "read_s": rounded(_seconds(read)),
        "reused_s": rounded(_seconds(reused)),
        "from_files_s": rounded(_seconds(stored)),
        "reused_percent": rounded(100 * _seconds(reused) / _seconds(read)),
        "decode_ms": rounded(decode_ms),
        "kib_per_cached_token": rounded(before["used_bytes"] / 1024 / max(1, 512 * before["blocks"])),
        "differ": int((again.token_ids, again.logprobs) != (read.token_ids, read.logprobs))
        + int((stored.token_ids, stored.logprobs) != (reused.token_ids, reused.logprobs)),
    }


def _answer(engine: Engine, prompt: Sequence[int]) -> Generation:
    return engine.generate(list(prompt), max_new_tokens=4, top_logprobs=2, ignore_eos=True)


def _seconds(generation: Generation) -> float:
    seconds = generation.times.to_first_token_s
    assert seconds is not None
    return seconds


def _trace(subject: Subject, *, n_requests: int, longest: int = 3000) -> list[Row]:
    """The same requests, four at a time, without the cache, with it, and with memory for a part of what they share."""
    prompts = _shared_prompts(subject, n_requests, longest)
    room = 4 * (max(map(len, prompts)) + 64)
    rows = []
    for name, options in (
        ("off", {"prefix_cache": False}),
        ("on", {}),
        ("on, in 256 MiB", {"prefix_bytes": 2**28}),
    ):
        with _engine(subject, "full", room, {}, max_sequences=4, **options) as engine:
            _answer(engine, random_tokens(600, subject.vocab_size, seed=9))
            began = time.perf_counter()
            found = engine.generate_batch([list(prompt) for prompt in prompts], max_new_tokens=16, ignore_eos=True)
            seconds = time.perf_counter() - began
        n_prompt = sum(map(len, prompts))
        rows.append(
            {
                "model": subject.name,
                "prefix_cache": name,
                "requests": n_requests,
                "prompt_tokens": n_prompt,
                "hit_percent": rounded(100 * sum(one.n_cached_tokens for one in found) / n_prompt),
                "seconds": rounded(seconds),
                "first_token_p50_s": rounded(float(np.median([_seconds(one) for one in found]))),
                "generated_tokens_per_s": rounded(16 * n_requests / seconds),
            }
        )
    return rows


def _on_one_document(subject: Subject, *, n_requests: int, n_tokens: int) -> list[Row]:
    """Questions on one document, in memory for two and a half of it: how many run at once, and what pages are in use."""
    document = random_tokens(n_tokens, subject.vocab_size, seed=1)
    prompts = [document + random_tokens(QUESTION, subject.vocab_size, seed=100 + at) for at in range(n_requests)]
    rows = []
    for is_on in (False, True):
        with _engine(subject, "full", 5 * n_tokens // 2, {}, max_sequences=n_requests, prefix_cache=is_on) as engine:
            _answer(engine, random_tokens(600, subject.vocab_size, seed=9))
            core, pool, most_running, most_pages = engine.core, engine.core.runner.pool, 0, 0
            began = time.perf_counter()
            requests = [engine.submit(list(prompt), max_new_tokens=32, ignore_eos=True) for prompt in prompts]
            while not all(request.is_finished for request in requests):
                n_steps = core.statistics.decode_steps + core.statistics.prefill_steps
                core.wait(
                    lambda: core.statistics.decode_steps + core.statistics.prefill_steps > n_steps,  # noqa: B023
                    comes_back=True,
                )
                most_running = max(most_running, core.statistics.n_running)
                most_pages = max(most_pages, pool.n_pages - pool.n_free)
            seconds = time.perf_counter() - began
        rows.append(
            {
                "prefix_cache": "on" if is_on else "off",
                "requests": n_requests,
                "document_tokens": n_tokens,
                "most_at_once": most_running,
                "most_mib_of_pages": rounded(most_pages * pool.page_bytes / 2**20),
                "seconds": rounded(seconds),
                "generated_tokens_per_s": rounded(32 * n_requests / seconds),
            }
        )
    return rows


def _shared_prompts(subject: Subject, n: int, longest: int) -> list[list[int]]:
    """Questions on documents of 600 to ``longest`` tokens, of which few are asked for often; every other one goes on where an
    earlier conversation about the same document ended.
    """
    rng = np.random.default_rng(0)
    n_documents, longest = max(2, n // 3), min(longest, subject.max_positions // 3)
    shares = 1 / np.arange(1, n_documents + 1)
    documents = [random_tokens(int(rng.integers(600, longest)), subject.vocab_size, seed=20 + at) for at in range(n_documents)]
    ends: dict[int, list[int]] = {}
    prompts = []
    for at in range(n):
        document = int(rng.choice(n_documents, p=shares / shares.sum()))
        history = ends[document] if document in ends and at % 2 else list(documents[document])
        prompt = history + random_tokens(QUESTION, subject.vocab_size, seed=100 + at)
        ends[document] = prompt + random_tokens(60, subject.vocab_size, seed=500 + at)
        prompts.append(prompt)
    return prompts
