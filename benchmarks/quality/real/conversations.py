"""Several questions, one after another, about one document: which policies can go on from what they kept.

Facts in prose are read as the first turn, and each further turn asks for one of them, again and again. Modes:

* exact: each turn evicts from the whole history, its question included, as ``Engine.session(mode="exact")`` does;
* compressed: each turn goes on from what the last one kept, as ``mode="compressed"`` does;
* document: each question goes on from what was kept of the document alone, and the next one begins there again, as kvpress's
  evaluations do (SCBench's "same context, different questions").

The runtime is the sessions' own: a ``ModelRunner`` of the policy's program, and its copies of what sequences hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.quality.harness import Plan
from benchmarks.quality.real.answering import PAGE_SIZE
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.records import N_NEW, city_facts, fact_question, fact_text, prose_with
from benchmarks.quality.real.settings import TalkPlan
from trt_kv.cache_layers import cache_config
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.recall_attention.page_counts import summary_rows
from trt_kv.program import PAGE_SUMMARIES, PHASES, program_of_model
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

MODES = ("compressed", "exact", "document")
N_FACTS = 4


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Token ids of a document, and of questions about it with what a right answer begins with."""

    document: tuple[int, ...]
    questions: tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True, kw_only=True)
class Talked:
    """``right``: a character per turn. ``held``: per turn, the share of the tokens seen that was held when its answer began,
    mean over layers."""

    right: str
    held: tuple[float, ...]


def talk(asker: Asker, plan: TalkPlan, document: int, *, facts_of: int = N_FACTS) -> Talk:
    """A document with ``facts_of`` facts; each is asked for as often as the others, in an order that is drawn."""
    draw = Random(f"conversation {plan.n_tokens} {document}")
    facts = city_facts(draw, facts_of)
    text = prose_with(draw, [fact_text(*fact) for fact in facts], asker.encode, plan.n_tokens)
    turns = [facts[at % len(facts)] for at in range(plan.n_turns)]
    draw.shuffle(turns)
    questions = tuple((tuple(asker.encode("".join(fact_question(city)))), number) for city, number in turns)
    return Talk(document=tuple(asker.encode(text)), questions=questions)


def talked(dense: DenseExecutor, config: ModelConfig, asker: Asker, plan: Plan, mode: str, asked: Talk) -> Talked:
    """One conversation under a plan."""
    run = _Run(_runner(dense, config, plan, asked), mode)
    run.read(asked.document)
    said = [asker.decode(run.ask(question)) for question, _ in asked.questions]
    right = "".join(
        "1" if answer.strip().startswith(number) else "0" for answer, (_, number) in zip(said, asked.questions, strict=True)
    )
    return Talked(right=right, held=tuple(round(share, 4) for share in run.held))


def _runner(dense: DenseExecutor, config: ModelConfig, plan: Plan, asked: Talk) -> ModelRunner:
    n_tokens = len(asked.document) + sum(len(question) + N_NEW for question, _ in asked.questions)
    cache = cache_config(config, plan.policy.applied_to(config.windows))
    pool = HostKvPool(
        n_pages=2 * cache.n_layers * -(-(n_tokens + 64) // PAGE_SIZE),
        page_size=PAGE_SIZE,
        n_kv_heads=cache.n_kv_heads,
        head_size=cache.head_dim,
        n_query_heads=config.n_heads if plan.policy.recalls else 0,
        summary_rows=summary_rows(PAGE_SUMMARIES[plan.policy.page_summary], PAGE_SIZE, "float32"),
    )
    programs = {
        phase: program_of_model(
            config,
            plan.policy,
            phase=phase,
            page_size=PAGE_SIZE,
            kept_shares=plan.kept_shares,
            predictors=plan.predictors,
        )
        for phase in PHASES
    }
    return host_runner(dense, pool, programs, decode=plan.policy.decode, decode_distance=plan.policy.decode_distance)


class _Run:
    """A document and the questions about it, in one of ``MODES``."""

    def __init__(self, runner: ModelRunner, mode: str) -> None:
        self.held: list[float] = []
        self._runner = runner
        self._mode = mode
        self._sequence = runner.new_sequence()
        self._pending: list[int] = []

    def read(self, token_ids: Sequence[int]) -> None:
        """The first turn, without an answer."""
        self._runner.prefill(self._sequence, token_ids, evict=self._mode != "exact")

    def ask(self, question: Sequence[int]) -> list[int]:
        """The answer's tokens."""
        if self._mode == "exact":
            copy = self._sequence.fork()
            said = self._answer(copy, question)
            copy.release()
            self._runner.prefill(self._sequence, [*question, *said], evict=False)
            return said
        state = self._runner.states.read(self._sequence)
        sequence = self._runner.new_sequence()
        if self._mode == "compressed":
            self._sequence.release()
        self._runner.states.place(sequence, state)
        said = self._answer(sequence, [*self._pending, *question])
        if self._mode == "compressed":
            self._sequence, self._pending = sequence, said[-1:]
        else:
            sequence.release()
        return said

    def _answer(self, sequence: SequenceCache, question: Sequence[int]) -> list[int]:
        logits_V = self._runner.prefill(sequence, question)
        self.held.append(float(sequence.held_tokens.mean()) / sequence.num_computed_tokens)
        said = [int(logits_V.argmax())]
        while len(said) < N_NEW:
            said.append(int(self._runner.decode([sequence], said[-1:])[0].argmax()))
        return said
