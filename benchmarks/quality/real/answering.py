"""Answers to one question under many policies at once, generated on the engines' runtime.

A prompt is read once; each plan gets a fork of it, from which it evicts, and all forks go on together as one batch: they read
the same given tokens one by one, and then each generates greedily. See ``benchmarks.quality.harness``, whose forks these are.
For policies whose KV heads have budgets of their own the prompt is read once more, into pages that hold one head.

F forks, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.quality.harness import Floats, Harness, Plan, Prefilled, released
from benchmarks.quality.real.recalling import Recaller
from benchmarks.quality.steps import decode_groups
from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache

N_FORKS = 8
"""Whole sequences of the longest context that fit beside the prompt."""
PAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids: ``prompt`` is read and evicted from, ``given`` is fed token by token, then at most ``n_new`` are generated, up
    to one that ``ends``. ``fact``: positions in the prompt of what is asked for, empty if it is not known.
    """

    prompt: tuple[int, ...]
    given: tuple[int, ...]
    n_new: int
    ends: Callable[[Sequence[int]], bool]
    fact: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answered:
    """``tokens``: what was generated. ``kept``: share of the prompt's tokens held after eviction, mean over layers and KV
    heads; of those attended to, if the cache is on the host. ``kv_bytes``: of the pages that hold them. ``moved_bytes``: copied
    from the host while generating. ``fact_kept``: share of the fact's tokens that is held, None if it is not known.
    """

    tokens: tuple[int, ...]
    kept: float
    kv_bytes: int
    moved_bytes: int = 0
    fact_kept: float | None = None


class Answerer:
    """One model on one executor. ``longest``: tokens of the longest prompt with everything that comes after it.

    Pages of ``harness`` hold all KV heads of a layer, those of ``harness_by_head`` one.
    """

    def __init__(self, dense: DenseExecutor, config: ModelConfig, *, longest: int) -> None:
        self.harness = _harness(dense, config, longest=longest)
        self.harness_by_head = _harness(dense, config, longest=longest, heads_apart=config.n_kv_heads)
        self.recaller = Recaller(dense, self.harness.pool, n_layers=config.n_layers, scale=config.scale)

    def full(self, question: Question) -> Answered:
        """The answer with the whole cache, without scoring, which is fastest."""
        runner = self.harness.plain_runner
        with released() as made:
            made.append(runner.new_sequence())
            logits_V = runner.prefill(made[0], question.prompt, evict=False)
            held = _held(self.harness, made[0], question)
            tokens = _chosen(lambda _, fed: runner.decode(made, fed), 1, logits_V, question)
        return Answered(tokens=tokens[0], **held)

    def answers(self, question: Question, plans: Sequence[Plan]) -> list[Answered]:
        """One answer per plan. Leaves the pools as they were."""
        found: dict[int, Answered] = {}
        for harness, read_by in self._readers(plans):
            dropping = [plan for plan in read_by if not plan.policy.recalls]
            recalling = [plan for plan in read_by if plan.policy.recalls]
            with harness.prefilled(question.prompt, dropping) as whole:
                answered = [*_dropping(harness, question, dropping, whole), *self._recalling(question, recalling, whole)]
            found |= zip(map(id, [*dropping, *recalling]), answered, strict=True)
        return [found[id(plan)] for plan in plans]

    def losses(self, prompt: Sequence[int], expected: Sequence[int], plans: Sequence[Plan]) -> list[float]:
        """Per plan, which must drop tokens: the summed negative log-likelihood (nats) of ``expected`` but its first token."""
        found: dict[int, float] = {}
        for harness, read_by in self._readers(plans):
            with harness.prefilled(prompt, read_by) as whole:
                for group in _groups(read_by):
                    found |= zip(map(id, group), _losses(harness, whole, group, expected), strict=True)
        return [found[id(plan)] for plan in plans]

    def _readers(self, plans: Sequence[Plan]) -> list[tuple[Harness, list[Plan]]]:
        """The harnesses that have to read a prompt, each with those of ``plans`` that it is for."""
        together = [plan for plan in plans if plan.policy.heads != "own"]
        by_head = [plan for plan in plans if plan.policy.heads == "own"]
        return [(harness, of) for harness, of in ((self.harness, together), (self.harness_by_head, by_head)) if of]

    def _recalling(self, question: Question, plans: Sequence[Plan], whole: Prefilled) -> list[Answered]:
        found: list[Answered] = []
        queries = self.harness.steps.last_queries
        for start in range(0, len(plans), N_FORKS):
            with self.recaller.forks(whole.sequence, queries, plans[start : start + N_FORKS]) as forks:
                tokens = _chosen(forks.decode, len(forks.sequences), whole.logits, question)
                found += [
                    Answered(
                        tokens=of,
                        kept=share,
                        kv_bytes=len(whole.sequence.pages) * self.harness.pool.page_bytes,
                        moved_bytes=moved,
                        fact_kept=1.0 if question.fact else None,
                    )
                    for of, share, moved in zip(tokens, forks.attended_shares(), forks.moved_bytes(), strict=True)
                ]
        return found


def _harness(dense: DenseExecutor, config: ModelConfig, *, longest: int, heads_apart: int = 1) -> Harness:
    """A harness with room for the prompt and its forks. All its pages have room for what RecallAttention stores, so that bytes
    of policies compare whether heads are apart or not.
    """
    n_layers = config.n_layers * heads_apart
    pool = HostKvPool(
        n_pages=n_layers * -(-longest // PAGE_SIZE) * (N_FORKS + 2),
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads // heads_apart,
        head_size=config.head_dim,
        n_query_heads=config.n_heads // heads_apart,
    )
    return Harness(dense, pool, n_layers=n_layers, scale=config.scale, heads_apart=heads_apart)


def _dropping(harness: Harness, question: Question, plans: Sequence[Plan], whole: Prefilled) -> list[Answered]:
    found: list[Answered] = []
    for group in _groups(plans):
        with released() as forks:
            held = []
            for plan in group:
                forks.append(harness.forked(whole.sequence, plan))
                held.append(_held(harness, forks[-1], question))
            tokens = _chosen(_decoding(harness, forks, group), len(group), whole.logits, question)
        found += [Answered(tokens=of, **fields) for of, fields in zip(tokens, held, strict=True)]
    return found


def _losses(harness: Harness, whole: Prefilled, plans: Sequence[Plan], expected: Sequence[int]) -> list[float]:
    with released() as forks:
        forks += [harness.forked(whole.sequence, plan) for plan in plans]
        decode, lost_F = _decoding(harness, forks, plans), np.zeros(len(plans))
        for fed, wanted in pairwise(expected):
            logits_FV = decode(range(len(plans)), [fed] * len(plans)).astype(np.float64)
            shifted_FV = logits_FV - logits_FV.max(axis=1, keepdims=True)
            lost_F += np.log(np.exp(shifted_FV).sum(axis=1)) - shifted_FV[:, wanted]
        return [float(lost) for lost in lost_F]


def _decoding(
    harness: Harness, forks: Sequence[SequenceCache], plans: Sequence[Plan]
) -> Callable[[Sequence[int], list[int]], Floats]:
    """Decode steps of some of the forks, by index, which continue to rank if their policies do."""
    steps, grouped = harness.steps, [-1]
    programs = {i: harness.program(plan, "decode") for i, plan in enumerate(plans) if forks[i].is_evicted}

    def decode(members: Sequence[int], fed: list[int]) -> Floats:
        if grouped != list(members):
            grouped[:] = members
            steps.groups = decode_groups({at: programs[i] for at, i in enumerate(members) if i in programs})
        logits_BV = harness.runner.decode([forks[i] for i in members], fed)
        for group in steps.groups:
            for at in group.members:
                forks[members[at]].settle(steps.kept[:, at])
        return logits_BV

    return decode


def _held(harness: Harness, sequence: SequenceCache, question: Question) -> dict[str, Any]:
    """What a sequence holds after eviction, as fields of ``Answered``."""
    fact_kept = None
    if question.fact:
        fact = np.array(question.fact)
        held = [harness.runner.kept_positions(sequence, layer) for layer in range(sequence.n_layers)]
        fact_kept = float(np.mean([[np.isin(fact, kept_S).mean() for kept_S in kept_KS] for kept_KS in held]))
    return {
        "kept": float(sequence.kv_len.mean()) / len(question.prompt),
        "kv_bytes": len(sequence.pages) * harness.pool.page_bytes,
        "fact_kept": fact_kept,
    }


def _groups(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """``plans`` in order, in groups whose forks fit into the pool together."""
    group: list[Plan] = []
    filled = 0.0
    for plan in plans:
        share = min(1.0, (plan.policy.kept if plan.policy.budget not in ("unimetric", "above") else 1.0) + 0.1)
        if filled + share > N_FORKS:
            yield group
            group, filled = [], 0.0
        group.append(plan)
        filled += share
    if group:
        yield group


def _chosen(
    decode: Callable[[Sequence[int], list[int]], Floats], n_forks: int, first_V: Floats, question: Question
) -> list[tuple[int, ...]]:
    """What each of F forks generates after the given tokens. ``decode(members, fed)`` feeds a token to some of the forks.

    ``first_V``: the logits of the prompt's last token, which every fork begins with.
    """
    everyone = list(range(n_forks))
    logits_FV = np.broadcast_to(first_V, (n_forks, len(first_V)))
    for token in question.given:
        logits_FV = decode(everyone, [token] * n_forks)
    said: list[list[int]] = [[int(token)] for token in logits_FV.argmax(axis=1)]
    while True:
        active = [i for i in everyone if len(said[i]) < question.n_new and not question.ends(said[i])]
        if not active:
            return [tuple(of) for of in said]
        logits_FV = decode(active, [said[i][-1] for i in active])
        for i, token in zip(active, logits_FV.argmax(axis=1), strict=True):
            said[i].append(int(token))
