"""Runs one document under many variants at once, on the product's own runtime.

A document is prefilled once per score with nothing evicted. Each (variant, kept share) gets a fork of that sequence, evicts
from it as an engine would, and then all forks decode the right answer together as one batch. Since an engine decodes
greedily, it gives the right answer exactly if every answer token is ranked first after the right tokens before it; so one
pass tells both whether the answer comes out and how likely it was.

L layers, T fed tokens, F forks, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_kv.calibration.evaluation import FULL, Case, LayerBudgets, Variant, answer_losses, layer_budgets
from trt_kv.manifest import Manifest
from trt_kv.plugins.paging import pages_of, scatter_slots
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of
from trt_kv.recipe import Recipe
from trt_kv.runtime.executors.onnxruntime_pieces import OnnxRuntimeExecutor
from trt_kv.runtime.executors.protocol import DenseExecutor
from trt_kv.runtime.kv_pool import KvPool
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.sequence_cache import SequenceCache

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
SCORED = ("mass", "window")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A variant at a mean kept share; ``recipes`` for that share, by score."""

    variant: Variant
    share: float
    recipes: Mapping[str, Recipe]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one plan did with one case. Fields as in ``evaluation_results.Row``; ``tokens`` are the greedy choices, [T]."""

    tokens: tuple[int, ...]
    right: bool
    loss: float
    kept_tokens: int
    kv_bytes: int
    kept_by_layer: tuple[float, ...]
    kept_place: float
    fact_kept: float | None
    question_kept: float | None


class Harness:
    """One model on one executor, with a runner per score over one pool."""

    def __init__(self, executor: DenseExecutor, pool: KvPool, *, n_layers: int, scale: float, window: int) -> None:
        self.executor = executor
        self.pool = pool
        self._n_layers = n_layers
        self.runners: dict[str, ModelRunner] = {}
        for score in SCORED:
            policy = Policy(name=score, summary="", score=score, budget="uniform", window=window)
            programs = {
                phase: program_of(policy, phase=phase, n_layers=n_layers, scale=scale, page_size=pool.page_size)
                for phase in PHASES
            }
            self.runners[score] = ModelRunner(executor, pool, programs)

    def run(self, case: Case, plans: Sequence[Plan], *, seed: int = 0) -> list[Outcome]:
        """One outcome per plan. ``seed`` draws the lots of random scores. Leaves the pool as it was."""
        with self._prefilled(case) as (sequences, logits_V), _released() as forks:
            importance = {score: self.runners[score].scores(sequence) for score, sequence in sequences.items()}
            held = []
            for plan in plans:
                sequence = sequences["window" if plan.variant.score == "window" else "mass"].fork()
                forks.append(sequence)
                budgets = layer_budgets(
                    plan.variant,
                    plan.share,
                    n_tokens=len(case.prompt),
                    n_layers=self._n_layers,
                    recipes=plan.recipes,
                    importance=importance,
                )
                if plan.variant != FULL:
                    self._evict(sequence, plan.variant, budgets, seed)
                held.append(self._held(sequence, case))
            logits_FTV = self._decode(forks, case.fed, logits_V)
        return [_outcome(case, logits_TV, fields) for logits_TV, fields in zip(logits_FTV, held, strict=True)]

    @contextmanager
    def _prefilled(self, case: Case) -> Iterator[tuple[dict[str, SequenceCache], Floats]]:
        """The case's prompt as one whole sequence per score, and the logits [V] of its last token."""
        with _released() as made:
            sequences, logits_V = {}, np.empty(0, np.float32)
            for score, runner in self.runners.items():
                sequences[score] = runner.new_sequence()
                made.append(sequences[score])
                logits_V = runner.prefill(sequences[score], case.prompt, evict=False)
            yield sequences, logits_V

    def _evict(self, sequence: SequenceCache, variant: Variant, budgets: LayerBudgets, seed: int) -> None:
        n_tokens = sequence.n_seen
        if variant.score == "random":
            self._rank(sequence, np.random.default_rng(seed).random((self._n_layers, n_tokens), np.float32))
        if variant.score == "recency":
            self._rank(sequence, np.tile(np.arange(n_tokens, dtype=np.float32), (self._n_layers, 1)))
        protected = variant.protected
        self.runners["mass"].evict(
            sequence, budgets.tokens, sinks=protected.sinks, recent=protected.recent, kept_shares=budgets.growth
        )

    def _rank(self, sequence: SequenceCache, scores_LN: Floats) -> None:
        """Write scores of our own over those that the prefill left."""
        page_size = self.pool.page_size
        for layer, scores_N in enumerate(scores_LN):
            pages = pages_of(sequence.page_table[:, None], layer, 0, len(scores_N), page_size)
            scatter_slots(self.pool.scores, pages, scores_N)

    def _held(self, sequence: SequenceCache, case: Case) -> dict[str, Any]:
        """What the sequence holds right after eviction, as fields of ``Outcome``."""
        positions = [self.runners["mass"].kept_positions(sequence, layer) for layer in range(self._n_layers)]
        n_tokens = len(case.prompt)
        return {
            "kept_tokens": int(sequence.kv_len.sum()),
            "kv_bytes": len(sequence.pages) * self.pool.page_bytes,
            "kept_by_layer": tuple((sequence.kv_len / n_tokens).tolist()),
            "kept_place": float(np.concatenate(positions).mean()) / (n_tokens - 1),
            "fact_kept": _share_kept(case.fact, positions),
            "question_kept": _share_kept(case.question, positions),
        }

    def _decode(self, forks: Sequence[SequenceCache], fed: Sequence[int], logits_V: Floats) -> Floats:
        """Logits [F, T, V] that each fork has for each token of ``fed``, the prefill's ``logits_V`` first."""
        steps = [np.tile(logits_V, (len(forks), 1))]
        steps += [self.runners["mass"].decode(forks, [token] * len(forks)) for token in fed[:-1]]
        return np.stack(steps, axis=1)


def harness_from_engine(folder: Path, manifest: Manifest, *, window: int, context_length: int, n_forks: int) -> Harness:
    """A harness on the dense pieces of a built engine, whatever its policy; its pool has room for ``n_forks`` whole forks."""
    config = manifest.config
    executor = OnnxRuntimeExecutor(folder / "graphs", manifest.pieces, manifest.attention_ports)
    n_pages = config.n_layers * -(-context_length // manifest.page_size)
    pool = KvPool(
        n_pages=n_pages * (n_forks + len(SCORED)),
        page_size=manifest.page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    return Harness(executor, pool, n_layers=config.n_layers, scale=config.head_dim**-0.5, window=window)


@contextmanager
def _released() -> Iterator[list[SequenceCache]]:
    """A list whose sequences are released at the end of the block."""
    sequences: list[SequenceCache] = []
    try:
        yield sequences
    finally:
        for sequence in sequences:
            sequence.release()


def _outcome(case: Case, logits_TV: Floats, held: Mapping[str, Any]) -> Outcome:
    ranked_first_T, losses_T = answer_losses(logits_TV, case.fed)
    return Outcome(
        tokens=tuple(logits_TV.argmax(axis=1).tolist()),
        right=bool(ranked_first_T[len(case.given) :].all()),
        loss=float(losses_T[case.first_counted :].sum()),
        **held,
    )


def _share_kept(span: range, positions: Sequence[Ints]) -> float | None:
    """The share of ``span`` that is among the kept ``positions`` of each layer, mean over layers; None for an empty span."""
    return float(np.mean([np.isin(span, kept).mean() for kept in positions])) if span else None
