"""Runs one document under many host-resident policies at once, on the engines' runtime.

What a step attends to does not depend on where pages are stored, so everything is measured with the whole cache in one pool,
read in place. A document is prefilled once with full attention, as in all these policies. Each plan gets a fork of that
sequence, and all forks decode the right answer together (see ``benchmarks.quality.harness``).

L layers, K KV heads, T fed tokens, F forks, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.cases import Case
from benchmarks.quality.harness import Outcome, Plan, outcome_of, released
from benchmarks.quality.recall.steps import Movement, RecallSteps
from trt_kv.manifest import Manifest
from trt_kv.policy import Policy
from trt_kv.program import PAGE_SUMMARIES, PHASES, Program, program_of, recall_nodes
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Pages that one plan moved in one case, counted per KV head; shares and pages of a step are means over decode steps.

    ``cosine_LK``: cosine of a step's queries with those before. ``corrected_LK``: share of steps in which a KV head was
    corrected. ``corrected_heads``: its mean over the layers that recall; ``corrected_layer_steps``: share of (layer, step) with
    any corrected KV head. ``ahead`` and ``late``: pages per step, over all layers (``recall.steps.Movement``).
    ``overlap``: share of chosen pages that were chosen in the step before; None if none was chosen.
    """

    cosine_LK: tuple[tuple[float, ...], ...]
    corrected_LK: tuple[tuple[float, ...], ...]
    corrected_heads: float
    corrected_layer_steps: float
    ahead: float
    late: float
    overlap: float | None


class RecallHarness:
    """One model on one executor and one pool of pages of ``pool.page_size`` tokens; ``adaptive`` finds budgets in prefill."""

    def __init__(self, executor: DenseExecutor, pool: KvPool[Any], adaptive: Policy, *, n_layers: int, scale: float) -> None:
        self.pool = pool
        self._n_layers = n_layers
        self._scale = scale
        programs = {phase: self.program(Plan(policy=adaptive), phase) for phase in PHASES}
        self.steps = RecallSteps(executor, programs["prefill"])
        self.runner = ModelRunner(self.steps, pool, programs, decode="keep")

    @property
    def page_head_bytes(self) -> int:
        """Bytes of keys and values of one KV head in one page, the unit that is moved."""
        return int(self.pool.kv[0, :, 0].nbytes)

    def run(self, case: Case, plans: Sequence[Plan]) -> list[tuple[Outcome, Moved]]:
        """One outcome per plan, and the pages it moved. Leaves the pool unchanged."""
        n_kv_heads = self.pool.kv.shape[2]
        with released() as sequences:
            sequences.append(self.runner.new_sequence())
            first_V = self.runner.prefill(sequences[0], case.prompt)
            for plan in plans:
                sequences.append(self.forked(sequences[0], plan))
            self.steps.programs = [self.program(plan, "decode") for plan in plans]
            self.steps.movements = [Movement(self._n_layers, n_kv_heads) for _ in plans]
            first_FV = np.broadcast_to(first_V, (len(plans), len(first_V)))
            later_FV = [self.runner.decode(sequences[1:], [token] * len(plans)) for token in case.fed[:-1]]
        logits_FTV = np.stack([first_FV, *later_FV], axis=1)
        return [
            (outcome_of(case, logits_TV, self._attended(movement, case)), _moved(movement, waits_for_all=plan.policy.tau > 1.0))
            for plan, logits_TV, movement in zip(plans, logits_FTV, self.steps.movements, strict=True)
        ]

    def forked(self, whole: SequenceCache, plan: Plan) -> SequenceCache:
        """A fork in the state of an engine of this plan after the prompt, with the summaries and budgets of its policy."""
        fork = whole.fork()
        nodes = recall_nodes(self.program(plan, "prefill"))
        if plan.policy.budget != "unimetric":
            fork.adaptive_budget[:] = -1
        for layer, node in enumerate(nodes):
            if node is not None and node.attributes["summary"] != PAGE_SUMMARIES["minmax"]:
                full = fork.page_table[layer, : fork.num_computed_tokens // self.pool.page_size]
                self.steps.summarise(self.pool, full, int(node.attributes["summary"]))
        return fork

    def _attended(self, movement: Movement, case: Case) -> dict[str, Any]:
        """The tokens that steps attended to, in the fields of ``Outcome`` for kept tokens: means over steps."""
        size, n_kv_heads = self.pool.page_size, self.pool.kv.shape[2]
        attended_L = movement.attended_L / movement.n_steps
        by_page = movement.attended_by_position / (movement.n_steps * self._n_layers * n_kv_heads)
        by_position = np.repeat(by_page, size)[: len(case.prompt)]
        places = np.arange(len(case.prompt)) / (len(case.prompt) - 1)
        return {
            "kept_tokens": round(float(attended_L.sum())),
            "kv_bytes": round(float(by_page.sum()) * self._n_layers * n_kv_heads * self.page_head_bytes),
            "kept_by_layer": tuple((attended_L / len(case.prompt)).tolist()),
            "kept_place": float((places * by_position).sum() / by_position.sum()),
            "fact_kept": _mean_of(by_position, case.fact),
            "question_kept": _mean_of(by_position, case.question),
        }

    def program(self, plan: Plan, phase: str) -> Program:
        """The KV ops of a plan's engine in a phase."""
        return program_of(
            plan.policy,
            phase=phase,
            n_layers=self._n_layers,
            scale=self._scale,
            page_size=self.pool.page_size,
            kept_shares=plan.kept_shares,
        )


def recall_harness_from_engine(
    folder: Path, manifest: Manifest, adaptive: Policy, *, page_size: int, context_length: int, n_forks: int
) -> RecallHarness:
    """A harness on the graph segments of a built engine, whatever its policy; its pool has room for ``n_forks`` forks."""
    config = manifest.config
    n_pages = config.n_layers * -(-context_length // page_size)
    pool = HostKvPool(
        n_pages=n_pages * (n_forks + 1),
        page_size=page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        n_query_heads=config.n_heads,
    )
    executor = OnnxRuntimeExecutor(folder / "graphs", manifest.segments, manifest.attention_ports)
    return RecallHarness(executor, pool, adaptive, n_layers=config.n_layers, scale=config.scale)


def _moved(movement: Movement, *, waits_for_all: bool) -> Moved:
    """``waits_for_all``: nothing is recalled ahead; the first step, which fills the working set, is not counted."""
    n_heads = movement.corrected_LK.shape[1]
    n_choices = max(1, movement.n_steps * movement.n_layers)
    return Moved(
        cosine_LK=tuple(tuple((heads / movement.n_steps).tolist()) for heads in movement.cosine_LK),
        corrected_LK=tuple(tuple((heads / movement.n_steps).tolist()) for heads in movement.corrected_LK),
        corrected_heads=float(movement.corrected_LK.sum()) / (n_choices * n_heads),
        corrected_layer_steps=movement.corrected_layers / n_choices,
        ahead=movement.ahead / max(1, movement.n_steps - 1),
        late=movement.late / max(1, movement.n_steps - waits_for_all),
        overlap=movement.common / movement.comparable if movement.comparable else None,
    )


def _mean_of(by_position: np.ndarray, span: range) -> float | None:
    """Mean of the values at ``span``; None if it is empty."""
    return float(by_position[span.start : span.stop].mean()) if span else None
