"""Decode steps of many host-resident policies at once, and the pages that each of them would have moved.

Attention is RecallAttention's own kernel, with the nodes of the engines' programs. The pages it chose, and which of them were
missing, are recomputed from the same queries and summaries with the kernel's own functions.

L layers, K KV heads, J pages of a sequence, C chosen pages, F forks (one sequence each in a step).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality.steps import run_nodes, step_tensors
from trt_kv.plugins.kv_rows import dtype_of
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.choice import best_pages, cosines, summaries_of
from trt_kv.plugins.recall_attention.page_counts import CODES, PageLimits, budget_tokens, summary_rows
from trt_kv.program import OpNode, Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pages, as indices within the sequence, that a layer's KV heads attend to in one step.

    ``ahead_KC`` are chosen for the previous query, so that they can be recalled during the previous step; ``chosen_KC`` are
    those attended to, which differ in the ``drifted_K`` KV heads, by the cosine of their queries. ``kept`` are sinks and newest
    pages. ``looks_ahead``: whether a step may use pages that were chosen for the previous query; else none is recalled ahead.
    """

    ahead_KC: Ints
    chosen_KC: Ints
    cosine_K: Floats
    drifted_K: Mask
    kept: Ints
    n_pages: int
    looks_ahead: bool

    def mask(self, pages_KC: Ints) -> Mask:
        """``pages_KC`` among all pages: [K, J]."""
        found_KJ = np.zeros((len(pages_KC), self.n_pages), np.bool_)
        np.put_along_axis(found_KJ, pages_KC, values=True, axis=1)
        return found_KJ


def choice_of(node: OpNode, tensors: dict[str, Any]) -> Choice:
    """The choice of the RecallAttention ``node`` for a single sequence that generates a token, from the op's inputs."""
    attributes: Any = node.attributes
    layer, size = int(attributes["layer"]), int(attributes["page_size"])
    limits = PageLimits(page_size=size, sinks=int(attributes["sinks"]), recent=int(attributes["recent"]))
    budget = budget_tokens(
        int(tensors["prompt_len"][0]),
        int(tensors["adaptive_budget"][layer, 0]),
        float(attributes["kept_share"]),
        int(attributes["kept_tokens"]),
    )
    n_tokens = int(tensors["kv_len"][layer, 0])
    n_pages = -(-n_tokens // size)
    between = limits.choosable(n_tokens)
    candidates = tensors["page_table"][layer, 0, between.start : between.stop]
    n_chosen = min(limits.n_chosen(budget), len(candidates))
    summaries, n_kv_heads = tensors["summaries"], tensors["kv"].shape[2]
    query_HD, last_HD = tensors["q"][0], tensors["last_query"][tensors["query_rows"][layer, 0]]

    def best(probe_HD: Floats) -> Ints:
        ranked = (int(attributes["pooling"]), float(attributes["softmax_scale"]))
        return between.start + best_pages(probe_HD, candidates, summaries, n_chosen, *ranked)

    cosine_K = cosines(query_HD, last_HD, n_kv_heads)
    drifted_K = ~(cosine_K >= np.float32(attributes["tau"]))
    ahead_KC = best(last_HD)
    kept = [*range(min(between.start, n_pages)), *range(max(between.stop, between.start), n_pages)]
    return Choice(
        ahead_KC=ahead_KC,
        chosen_KC=np.where(drifted_K[:, None], best(query_HD), ahead_KC) if drifted_K.any() else ahead_KC,
        cosine_K=cosine_K,
        drifted_K=drifted_K,
        kept=np.array(kept, np.int64),
        n_pages=n_pages,
        looks_ahead=float(attributes["tau"]) <= 1.0,
    )


class Movement:
    """Counts the pages that one sequence would move, layer by layer and step by step.

    A working set holds the pages that each KV head chose last, so only newly chosen pages move: ``ahead`` those for the
    previous query, ``late`` those of corrected KV heads, for which the step has to wait. Filling the working set after the
    prompt is not counted. Pages are counted per KV head.
    """

    def __init__(self, n_layers: int, n_kv_heads: int) -> None:
        self.n_steps = 0
        self.corrected_LK: Ints = np.zeros((n_layers, n_kv_heads), np.int64)
        self.cosine_LK: Floats = np.zeros((n_layers, n_kv_heads))
        """Cosines of a step's queries with the previous ones, summed over steps."""
        self.corrected_layers = 0
        """(layer, step) pairs in which any KV head was corrected."""
        self.n_layers = 0
        """Layers that recall."""
        self.ahead = self.late = 0
        self.common = self.comparable = 0
        """Chosen pages that were chosen in the step before too, and all of them."""
        self.attended_L: Floats = np.zeros(n_layers)
        """Attended tokens, mean over KV heads, summed over steps."""
        self.attended_by_position: Floats = np.zeros(0)
        """Per page of the sequence: how many times a KV head of a layer attended to it."""
        self._before: list[Ints | None] = [None] * n_layers

    def finish_step(self, n_layers: int) -> None:
        """Record the end of a step, in which ``n_layers`` layers recalled."""
        self.n_steps += 1
        self.n_layers = n_layers

    def add_all(self, layer: int, n_tokens: int, page_size: int) -> None:
        """Record a layer that attends to everything."""
        n_kv_heads = self.corrected_LK.shape[1]
        self._attend(layer, np.ones((n_kv_heads, -(-n_tokens // page_size)), np.bool_), n_tokens, page_size)

    def add(self, layer: int, choice: Choice, n_tokens: int, page_size: int) -> None:
        """Record a layer that recalls."""
        ahead_KJ, chosen_KJ = choice.mask(choice.ahead_KC), choice.mask(choice.chosen_KC)
        there_KJ = ahead_KJ
        if (before_KC := self._before[layer]) is not None:
            before_KJ = choice.mask(before_KC)
            if choice.looks_ahead:
                self.ahead += int((ahead_KJ & ~before_KJ).sum())
            else:
                there_KJ = before_KJ
            self.common += int((chosen_KJ & before_KJ).sum())
            self.comparable += choice.chosen_KC.size
        if choice.looks_ahead or before_KC is not None:
            self.late += int((chosen_KJ & ~there_KJ).sum())
        self.cosine_LK[layer] += choice.cosine_K
        self.corrected_LK[layer] += choice.drifted_K
        self.corrected_layers += bool(choice.drifted_K.any())
        self._before[layer] = choice.chosen_KC
        chosen_KJ[:, choice.kept] = True
        self._attend(layer, chosen_KJ, n_tokens, page_size)

    def _attend(self, layer: int, attended_KJ: Mask, n_tokens: int, page_size: int) -> None:
        n_pages = attended_KJ.shape[1]
        missing = n_pages * page_size - n_tokens
        self.attended_L[layer] += float(attended_KJ.sum()) / len(attended_KJ) * page_size - missing
        if n_pages > len(self.attended_by_position):
            self.attended_by_position = np.append(self.attended_by_position, np.zeros(n_pages - len(self.attended_by_position)))
        self.attended_by_position[:n_pages] += attended_KJ.sum(axis=0)


class RecallSteps:
    """A ``StepExecutor``: a prefill runs ``prefill``, sequence b of a decode step ``programs[b]``, counted in ``movements[b]``.

    ``programs`` and ``movements`` must be set before decode steps.
    """

    def __init__(self, dense: DenseExecutor, prefill: Program) -> None:
        self._dense = dense
        self._prefill = prefill
        self.programs: Sequence[Program] = ()
        self.movements: Sequence[Movement] = ()
        self._coded: Rows | None = None

    @property
    def description(self) -> str:
        return self._dense.description

    def warm_up(self) -> None:
        """Does nothing, because the first document compiles what it needs."""

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``."""
        adaptive_budget = np.full(step.kv_len.shape, -1)
        tensors = recall_tensors(step, pool)

        def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            bound = {**tensors, "q": q, "k": k, "v": v}
            if phase == "prefill":
                run_nodes(self._prefill[layer], bound)
                adaptive_budget[layer] = np.where(step.evict == 1, bound.get("budget", -1), -1)
                prefilled: Floats = bound["out"]
                return prefilled
            out = np.empty_like(q)
            for b in range(len(q)):
                out[b] = self._attend_one(layer, b, bound, pool)
            return out

        logits = self._dense.run(step.input_ids, step.positions, step.logit_rows, attend)
        if phase == "decode":
            for program, movement in zip(self.programs, self.movements, strict=True):
                movement.finish_step(sum(node.op == "RecallAttention" for nodes in program for node in nodes))
        return StepResult(logits=logits, kept=step.kv_len, adaptive_budget=adaptive_budget)

    def summarise(self, pool: KvPool[Any], full: Ints, summary: int) -> None:
        """Store summaries of the keys of full pages, as the op's attribute ``summary`` has them."""
        self._summaries(pool, summary)[full] = summaries_of(pool.kv[full, 0], summary, dtype_of(pool.summaries))

    def _summaries(self, pool: KvPool[Any], summary: int) -> Rows:
        """The state of policies that summarise so: those with codes have one of their own, with room for them."""
        if summary != CODES:
            of_bounds: Rows = pool.summaries
            return of_bounds
        if self._coded is None:
            n_rows = summary_rows(summary, pool.page_size, pool.kv_dtype)
            n_pages, n_kv_heads, _, row_length = pool.summaries.shape
            self._coded = np.empty((n_pages, n_kv_heads, n_rows, row_length), pool.summaries.dtype)
        return self._coded

    def _attend_one(self, layer: int, b: int, tensors: dict[str, Any], pool: KvPool[Any]) -> Floats:
        one = {
            **tensors,
            **{name: tensors[name][b : b + 1] for name in ("q", "k", "v", "positions", "prompt_remaining", "prompt_len")},
            **{
                name: tensors[name][:, b : b + 1] for name in ("slots", "page_table", "kv_len", "adaptive_budget", "query_rows")
            },
            "cu_tokens": np.array([0, 1]),
        }
        (node,) = self.programs[b][layer]
        n_tokens, page_size = int(one["kv_len"][layer, 0]), int(node.attributes["page_size"])
        if node.op == "RecallAttention":
            one["summaries"] = self._summaries(pool, int(node.attributes["summary"]))
            choice = choice_of(node, one)
            self.movements[b].add(layer, choice, n_tokens, page_size)
            run_nodes([node], one)
            assert (one["corrected"][0] == choice.drifted_K).all(), "the kernel corrects the heads that are counted"
        else:
            self.movements[b].add_all(layer, n_tokens, page_size)
            run_nodes([node], one)
        out: Floats = one["out"][0]
        return out


def recall_tensors(step: Step, pool: KvPool[Any]) -> dict[str, Any]:
    """The tensors that the KV ops of a host-resident policy may read in a step, by name."""
    own = {name: getattr(step, name) for name in ("prompt_len", "adaptive_budget", "query_rows")}
    return {**step_tensors(step, pool), **own, **pool.states}
