"""Runs one document under many policies at once, on the engines' runtime.

A document is prefilled once with nothing evicted. Each plan gets a fork of that sequence, evicts from it by the ops of its
policy's program, and then all forks decode the right answer together as one batch (teacher forcing). An engine that decodes
greedily gives exactly the right answer if every answer token is ranked first after the right tokens before it, so one pass
yields both exactness and likelihood of the answer.

KV heads with budgets of their own (heads "own") are layers of the cache, in a pool whose pages hold one of them; the others are
in pages of all heads of a layer. So a harness is for one or for the other.

L layers of the cache (``trt_kv/cache_layers.py``), K KV heads, S cached tokens, T fed tokens, F forks, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality.cases import Case
from benchmarks.quality.steps import SharedSteps, after_attention, decode_groups, run_nodes, score_key
from trt_kv.cache_layers import cache_policy
from trt_kv.calibration.answers import answer_losses
from trt_kv.calibration.prefixkv import online_budget
from trt_kv.manifest import Manifest
from trt_kv.plugins.paging import gather_kv, pages_of
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, budgets_of, eviction_nodes, program_of
from trt_kv.recipe import Protected, RecipeScore, recipe_score
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.surrogate import Predictor

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
N_SINKS = 4
"""Number of first tokens that the last query's attention is summed over (``Prefilled.sink_mass``)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy as in an engine: with the ``kept_shares`` [L] of its recipe, one for each layer of the cache, if it needs one,
    or the ``predictors`` of its surrogate.

    ``searches``: instead of a recipe, the shares are searched for each input (PrefixKV's "online" variant).
    """

    policy: Policy
    kept_shares: tuple[float, ...] | None = None
    predictors: tuple[Predictor, ...] | None = None
    searches: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one plan on one case. Fields as in ``cell.Row``; ``tokens`` are the greedy choices, [T]."""

    tokens: tuple[int, ...]
    right: bool
    loss: float
    kept_tokens: int
    kv_bytes: int
    kept_by_layer: tuple[float, ...]
    kept_place: float
    fact_kept: float | None
    question_kept: float | None


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A prompt as one whole sequence, the logits [V] of its last token, and the share of the last query's attention, per layer,
    on the first ``N_SINKS`` tokens (mean over query heads)."""

    sequence: SequenceCache
    logits: Floats
    sink_mass: tuple[float, ...]


class Harness:
    """One model on one executor with one pool."""

    def __init__(
        self, executor: DenseExecutor, pool: KvPool[Any], *, n_layers: int, scale: float, heads_apart: int = 1
    ) -> None:
        """``n_layers``: of the cache, of which the model has one for each of its layers, or ``heads_apart`` K if the plans are
        all of policies with heads "own".
        """
        self.pool = pool
        self._n_layers = n_layers
        self._scale = scale
        self._heads_apart = heads_apart
        self.steps = SharedSteps(executor, pool, n_layers=n_layers, scale=scale)
        full = {phase: self.program(Plan(policy=policy_from_name("full")), phase) for phase in PHASES}
        self.runner = ModelRunner(self.steps, pool, full)
        self.plain_runner = host_runner(executor, pool, full)

    def full(self, case: Case) -> Outcome:
        """Result of the full cache on a case, without scoring, which is fastest."""
        with released() as made:
            made.append(self.plain_runner.new_sequence())
            logits_V = self.plain_runner.prefill(made[0], case.prompt, evict=False)
            held = self._held(made[0], case)
            steps = [logits_V, *(self.plain_runner.decode(made, [token])[0] for token in case.fed[:-1])]
        return outcome_of(case, np.stack(steps), held)

    def run(self, case: Case, plans: Sequence[Plan]) -> tuple[list[Outcome], tuple[float, ...]]:
        """One outcome per plan, and the sink mass per layer. Leaves the pool as it was."""
        with self.prefilled(case.prompt, plans) as whole, released() as forks:
            held = []
            for plan in plans:
                forks.append(self.forked(whole.sequence, plan))
                held.append(self._held(forks[-1], case))
            decoded_FTV = self.decode(forks, plans, case.fed)
        first_F1V = np.broadcast_to(whole.logits, (len(forks), 1, len(whole.logits)))
        logits_FTV = np.concatenate([first_F1V, decoded_FTV], axis=1)
        outcomes = [outcome_of(case, logits_TV, fields) for logits_TV, fields in zip(logits_FTV, held, strict=True)]
        return outcomes, whole.sink_mass

    def importance(self, token_ids: Sequence[int], scores: Sequence[RecipeScore]) -> list[Floats]:
        """The importance [L, K, N] of a prompt's tokens in several rankings, as used for calibrating recipes."""
        plans = [Plan(policy=policy_that_scores(score)) for score in scores]
        with self.prefilled(token_ids, plans) as whole:
            return [self._scores(whole.sequence, plan) for plan in plans]

    @contextmanager
    def prefilled(self, token_ids: Sequence[int], plans: Sequence[Plan]) -> Iterator[Prefilled]:
        """A prompt, prefilled with every score that one of ``plans`` needs and nothing evicted."""
        keys = {score_key(self.program(plan, "prefill")) for plan in plans}
        self.steps.keys = sorted(key for key in keys if key is not None)
        with released() as made:
            made.append(self.runner.new_sequence())
            logits_V = self.runner.prefill(made[0], token_ids, evict=False)
            yield Prefilled(sequence=made[0], logits=logits_V, sink_mass=self._sink_mass(made[0]))

    def forked(self, whole: SequenceCache, plan: Plan) -> SequenceCache:
        """A fork of the last prefilled sequence, after the eviction of an engine of this plan in its last prefill step."""
        program = self.program(self._searched(whole, plan), "prefill")
        fork = whole.fork()
        if not any(eviction_nodes(program)):
            return fork
        if (key := score_key(program)) is not None:
            self.pool.scores[fork.pages] = self.steps.scores[key][whole.pages]
        kept_L = fork.kv_len.copy()
        for layer, nodes in enumerate(after_attention(program, but=["TokenScores"])):
            query = self.steps.last_queries[layer]
            tensors = {
                "q": query.q,
                "lse": query.lse,
                "cu_tokens": np.array([0, 1]),
                "evict": np.ones(1, np.int64),
                "page_table": fork.page_table[:, None],
                "kv_len": fork.kv_len[:, None],
                "kv": self.pool.kv,
                "token_positions": self.pool.token_positions,
                "scores": self.pool.scores,
            }
            run_nodes(nodes, tensors)
            kept_L[layer] = tensors["kept"][0] if nodes else fork.kv_len[layer]
        fork.shrink(kept_L, self._growth(plan.policy, program, kept_L / fork.num_computed_tokens))
        return fork

    def decode(self, forks: Sequence[SequenceCache], plans: Sequence[Plan], fed: Sequence[int]) -> Floats:
        """Feed all but the last token of ``fed`` to each fork: logits [F, T - 1, V] for the tokens from the second one on."""
        ranking = {i: self.program(plan, "decode") for i, plan in enumerate(plans) if forks[i].is_evicted}
        self.steps.groups = decode_groups(ranking)
        steps = []
        for token in fed[:-1]:
            steps.append(self.runner.decode(forks, [token] * len(forks)))
            for group in self.steps.groups:
                for member in group.members:
                    forks[member].settle(self.steps.kept[:, member])
        return np.stack(steps, axis=1)

    def _growth(self, policy: Policy, program: Program, kept_shares_L: Floats) -> list[float] | None:
        """Kept share per layer while decoding, as in ``ModelRunner``: the budget's, or the one after eviction if that
        is no share. None: nothing is evicted while decoding.
        """
        if policy.decode != "row":
            return None
        budgets = zip(kept_shares_L.tolist(), budgets_of(program), strict=True)
        return [kept if budget is None or budget.tokens else budget.share for kept, budget in budgets]

    def _searched(self, whole: SequenceCache, plan: Plan) -> Plan:
        """``plan`` with the shares that are searched for this input, if ``plan.searches``."""
        if not plan.searches:
            return plan
        policy = plan.policy
        protected = Protected(sinks=policy.sinks, recent=policy.recent)
        kept_L = online_budget(self._scores(whole, plan), policy.kept, protected=protected)
        return Plan(policy=policy, kept_shares=tuple((kept_L / whole.num_computed_tokens).tolist()))

    def _scores(self, whole: SequenceCache, plan: Plan) -> Floats:
        """The scores [L, K, S] that a prefilled sequence has under a plan's policy."""
        key = score_key(self.program(plan, "prefill"))
        assert key is not None
        pages_LX = whole.page_table[:, : -(-whole.num_computed_tokens // self.pool.page_size)]
        scores_LXKP = self.steps.scores[key][pages_LX]
        scores_LKS = scores_LXKP.transpose(0, 2, 1, 3).reshape(self._n_layers, scores_LXKP.shape[2], -1)
        return scores_LKS[:, :, : whole.num_computed_tokens]

    def _sink_mass(self, whole: SequenceCache) -> tuple[float, ...]:
        mass = []
        for layer, query in enumerate(self.steps.last_queries):
            n_sinks = min(N_SINKS, whole.num_computed_tokens)
            pages = pages_of(whole.page_table[:, None], layer, 0, n_sinks, self.pool.page_size)
            k_KSD, _ = gather_kv(self.pool.kv, pages, n_sinks)
            q_KGD = query.q[0].reshape(k_KSD.shape[0], -1, k_KSD.shape[2])
            logits_HS = (np.einsum("kgd,ksd->kgs", q_KGD, k_KSD) * self._scale).reshape(-1, n_sinks)
            mass.append(float(np.exp(logits_HS - query.lse[0][:, None]).sum(axis=1).mean()))
        return tuple(mass)

    def _held(self, sequence: SequenceCache, case: Case) -> dict[str, Any]:
        """What the sequence holds directly after eviction, as fields of ``Outcome``."""
        positions = [self.runner.kept_positions(sequence, layer) for layer in range(self._n_layers)]
        n_tokens = len(case.prompt)
        return {
            "kept_tokens": int(sequence.kv_len.sum()),
            "kv_bytes": len(sequence.pages) * self.pool.page_bytes,
            "kept_by_layer": tuple((sequence.kv_len / n_tokens).tolist()),
            "kept_place": float(np.concatenate([kept.ravel() for kept in positions]).mean()) / (n_tokens - 1),
            "fact_kept": _share_kept(case.fact, positions),
            "question_kept": _share_kept(case.question, positions),
        }

    def program(self, plan: Plan, phase: str) -> Program:
        """The KV ops of a plan's engine in a phase."""
        return program_of(
            cache_policy(plan.policy, self._heads_apart),
            phase=phase,
            n_layers=self._n_layers,
            scale=self._scale,
            page_size=self.pool.page_size,
            kept_shares=plan.kept_shares,
            predictors=plan.predictors,
        )


def policy_that_scores(score: RecipeScore) -> Policy:
    """A policy that ranks by ``score`` in every layer."""
    policy = Policy(
        name=score.described,
        summary="",
        score=score.name,
        budget="uniform",
        window=score.window or Policy.window,
        heads=score.heads,
        pooling=score.pooling,
    )
    assert recipe_score(policy) == score
    return policy


def harness_from_engine(folder: Path, manifest: Manifest, *, context_length: int, n_forks: int) -> Harness:
    """A harness on the graph segments of a built engine, whatever its policy; its pool has room for ``n_forks`` whole forks."""
    config = manifest.config
    executor = OnnxRuntimeExecutor(folder / "graphs", manifest.segments, manifest.attention_ports)
    n_pages = config.n_layers * -(-context_length // manifest.page_size)
    pool = HostKvPool(
        n_pages=n_pages * (n_forks + 1),
        page_size=manifest.page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    return Harness(executor, pool, n_layers=config.n_layers, scale=config.scale)


@contextmanager
def released() -> Iterator[list[SequenceCache]]:
    """Context with a list whose sequences are released at its end."""
    sequences: list[SequenceCache] = []
    try:
        yield sequences
    finally:
        for sequence in sequences:
            sequence.release()


def outcome_of(case: Case, logits_TV: Floats, held: dict[str, Any]) -> Outcome:
    """The outcome of a case from the logits of the fed tokens; ``held``: the fields of what is kept."""
    ranked_first_T, losses_T = answer_losses(logits_TV, case.fed)
    return Outcome(
        tokens=tuple(logits_TV.argmax(axis=1).tolist()),
        right=bool(ranked_first_T[len(case.given) :].all()),
        loss=float(losses_T[case.first_counted :].sum()),
        **held,
    )


def _share_kept(span: range, positions: Sequence[Ints]) -> float | None:
    """The share of ``span`` that is among the kept ``positions`` [K, S] of each layer, mean over layers and KV heads.

    None for an empty span.
    """
    if not span:
        return None
    inside = [((kept_KS >= span.start) & (kept_KS < span.stop)).sum(axis=1) / len(span) for kept_KS in positions]
    return float(np.mean(inside))
