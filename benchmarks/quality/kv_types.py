"""What storing keys and values in another type costs in quality: a real model, with the whole cache, with eviction and recall.

Each text is read as a prompt, and its continuation is fed token by token. Logits are compared with those of the same policy in
fp32, and with those of the whole cache in fp32: the second difference is what a policy costs already. docs/decisions/0046.
"""

import gc
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.harness import Check, Report, Row, check_close, rounded
from benchmarks.models import FULL, PAGE_SIZE, ExportedModel, exported_model, programs_of
from benchmarks.quality.kv_scales import scale_tables
from trt_kv.kv_memory import kv_bytes
from trt_kv.manifest import KV_DTYPES
from trt_kv.pipeline.callbacks import ignore
from trt_kv.pipeline.plans import ModelSource
from trt_kv.pipeline.sources import open_source
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_from_name, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.model_runner import ModelRunner

TOPICS = ("compound", "debugger", "string-methods")
"""Chapters of Python's own help, which every Python has: English prose with code."""
FREEKV_PAGE = 8
POLICIES: dict[str, tuple[Policy, int]] = {
    "full": (FULL, PAGE_SIZE),
    "snapkv 20 %": (policy_with(policy_without_floor("snapkv"), {"kept": 0.2}), PAGE_SIZE),
    "freekv, 256 tokens": (
        policy_with(policy_from_name("freekv"), {"tokens": 256, "sinks": 16, "recent": 64}),
        FREEKV_PAGE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Log-probabilities [N, V] fp32 of the N tokens that follow a prompt, each with the true ones before it."""

    log_probabilities: Floats
    next_ids: list[int]

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood of the text per token."""
        return float(-self.log_probabilities[np.arange(len(self.next_ids)), self.next_ids].mean())

    def divergence_from(self, other: "Continuation") -> float:
        """Mean KL(other || self) over tokens, nats."""
        p = np.exp(other.log_probabilities, dtype=np.float64)
        return float((p * (other.log_probabilities - self.log_probabilities)).sum(axis=1).mean())

    def agreement_with(self, other: "Continuation") -> float:
        """Share of the tokens for which both choose the same one greedily."""
        return float((self.log_probabilities.argmax(axis=1) == other.log_probabilities.argmax(axis=1)).mean())


def run(folder: Path, *, quick: bool) -> Report:
    """Every type under every policy, then scales of int8 and of summaries on the keys and values of the same model."""
    name, n_prompt, n_new = ("llama3", 200, 8) if quick else ("smollm2", 1024, 64)
    checkpoint = open_source(ModelSource(model=name), ignore)
    model = exported_model(checkpoint, folder / "graphs")
    executor = model.executor()
    texts = texts_of(Tokenizer.from_file(str(checkpoint.tokenizer_file)), n_prompt + n_new, quick=quick)
    rows, checks = _quality(model, executor, texts, n_prompt)
    return Report(
        title="Quality against the type of the KV cache",
        settings={"model": checkpoint.name, "prompt_tokens": n_prompt, "fed_tokens": n_new, "texts": [*TOPICS][: len(texts)]},
        checks=checks,
        tables={f"{checkpoint.name}, {len(texts)} texts": rows} | scale_tables(executor, model.config, texts[0]),
    )


def texts_of(tokenizer: Tokenizer, n_tokens: int, *, quick: bool) -> list[list[int]]:
    """The first ``n_tokens`` tokens of each topic."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [tokenizer.encode(topics[topic]).ids[:n_tokens] for topic in TOPICS[: 1 if quick else None]]


def _quality(
    model: ExportedModel, executor: DenseExecutor, texts: list[list[int]], n_prompt: int
) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    checks: list[Check] = []
    wholes: list[Continuation] = []
    for name, (policy, page_size) in POLICIES.items():
        bases: list[Continuation] = []
        for dtype in KV_DTYPES:
            runner = _runner(model, executor, policy, dtype=dtype, page_size=page_size, n_tokens=max(map(len, texts)))
            found = [_continued(runner, text, n_prompt) for text in texts]
            if dtype == "float32":
                again = _continued(runner, texts[0], n_prompt)
                checks.append(check_close(f"{name} twice", again.log_probabilities, found[0].log_probabilities, within=0.0))
                bases = found
            wholes = wholes or found
            del runner
            gc.collect()
            pairs = list(zip(found, bases, wholes, strict=True))
            rows.append(
                {
                    "policy": name,
                    "type": dtype,
                    "bits_per_token_and_layer": 8 * kv_bytes(model.config, dtype),
                    "perplexity": rounded(np.exp(_mean(one.nats for one in found))),
                    "kl_to_fp32_nats": rounded(_mean(one.divergence_from(base) for one, base, _ in pairs)),
                    "same_greedy_token": rounded(_mean(one.agreement_with(base) for one, base, _ in pairs)),
                    "largest_logit_error": rounded(max(_largest_error(one, base) for one, base, _ in pairs)),
                    "kl_to_whole_fp32_nats": rounded(_mean(one.divergence_from(whole) for one, _, whole in pairs)),
                }
            )
    return rows, checks


def _runner(
    model: ExportedModel, executor: DenseExecutor, policy: Policy, *, dtype: str, page_size: int, n_tokens: int
) -> ModelRunner:
    config = model.config
    pool = HostKvPool(
        n_pages=config.n_layers * -(-n_tokens // page_size),
        page_size=page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        dtype=dtype,
        n_query_heads=config.n_heads if policy.recalls else 0,
    )
    return host_runner(executor, pool, programs_of(policy, config, page_size=page_size), decode=policy.decode)


def _continued(runner: ModelRunner, text: list[int], n_prompt: int) -> Continuation:
    """The prompt of ``n_prompt`` tokens is prefilled, with eviction; the others are fed one by one."""
    sequence = runner.new_sequence()
    try:
        logits = [runner.prefill(sequence, text[:n_prompt])]
        logits += [runner.decode([sequence], [token])[0] for token in text[n_prompt:-1]]
    finally:
        sequence.release()
    logits_NV = np.stack(logits).astype(np.float64)
    largest_N1 = logits_NV.max(axis=1, keepdims=True)
    totals_N1 = largest_N1 + np.log(np.exp(logits_NV - largest_N1).sum(axis=1, keepdims=True))
    return Continuation(log_probabilities=(logits_NV - totals_N1).astype(np.float32), next_ids=text[n_prompt:])


def _largest_error(one: Continuation, base: Continuation) -> float:
    return float(np.abs(one.log_probabilities - base.log_probabilities).max())


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))
