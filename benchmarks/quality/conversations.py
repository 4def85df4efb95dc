"""Several questions, one after another, about one document: which policies can go on from what they kept.

SmolLM2 with int4 weights: facts in prose are read as the first turn, and each further turn asks for one of them, again and
again. Modes:

* exact: each turn evicts from the whole history, its question included, as ``Engine.session(mode="exact")`` does;
* compressed: each turn goes on from what the last one kept, as ``mode="compressed"`` does;
* from the document: each question goes on from what was kept of the document alone, and the next one begins there again. This
  is the protocol of kvpress's evaluations: the cache is compressed before the question is known.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.harness import BenchmarkError, Check, Report, Row, rounded
from benchmarks.models import host_pool, programs_of
from benchmarks.peers.subjects import bundled, engine_for, smollm2
from benchmarks.serving_peers.prompts import sentences
from trt_kv.policies import policy_from_name, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

MODES = ("exact", "compressed", "from the document")
N_ANSWER = 6
CITIES = (
    *(
        "Paris",
        "London",
        "Berlin",
        "Madrid",
        "Rome",
        "Vienna",
        "Prague",
        "Dublin",
        "Athens",
        "Lisbon",
        "Moscow",
        "Cairo",
        "Tokyo",
    ),
    *("Delhi", "Boston", "Chicago", "Dallas", "Seattle", "Toronto", "Sydney", "Oslo", "Warsaw", "Nairobi", "Lima"),
)
POLICIES: dict[str, Policy] = {
    "full": policy_from_name("full"),
    **{
        f"pooledwindow {kept:.0%}": policy_with(policy_without_floor("prefixkv"), {"budget": "uniform", "kept": kept})
        for kept in (0.2, 0.5)
    },
    **{f"h2o {kept:.0%}": policy_with(policy_without_floor("h2o"), {"kept": kept}) for kept in (0.2, 0.5)},
    "streamingllm 50%": policy_with(policy_without_floor("streamingllm"), {"budget": "uniform", "kept": 0.5}),
    "random 50%": policy_with(policy_without_floor("random"), {"kept": 0.5}),
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids of a text, and questions about it with what a right answer begins with."""

    token_ids: list[int]
    questions: list[tuple[list[int], str]]


def run(folder: Path, *, quick: bool) -> Report:
    """Each policy and mode in turn on the same documents; quick: two policies, few questions."""
    n_documents, n_facts, n_tokens, n_questions = (1, 2, 300, 2) if quick else (2, 4, 1200, 20)
    folder = engine_for(bundled() if quick else smollm2(), {"policy": "full", "quant": "int4"})
    with Engine.load(folder, prefix_cache=False, cache_tokens=64) as engine:
        documents = [_document(engine.tokenizer, n_tokens, n_facts, n_questions, seed=seed) for seed in range(n_documents)]
        policies = dict(list(POLICIES.items())[: 2 if quick else None])
        rows = [_row(engine, documents, name, policy, mode) for name, policy in policies.items() for mode in MODES]
    if not quick and rows[0]["right_percent"] < 50:
        raise BenchmarkError("the model cannot answer these questions with its whole cache", got=rows[0])
    return Report(
        title="Questions one after another",
        settings={
            "model": "smollm2",
            "weights": "int4",
            "documents": n_documents,
            "document_tokens": n_tokens,
            "facts": n_facts,
            "turns": n_questions,
        },
        checks=[
            Check(
                what="documents without all of their facts",
                error=sum(len(d.questions) < n_questions for d in documents),
                allowed=0,
            )
        ],
        tables={"facts in a document, asked for one after another": rows},
    )


def _row(engine: Engine, documents: list[Document], name: str, policy: Policy, mode: str) -> Row:
    right, early, most = 0, 0, 0.0
    n_asked = sum(len(document.questions) for document in documents)
    for document in documents:
        talk = _Talk(_runner(engine, policy, document), mode)
        talk.read(document.token_ids)
        for turn, (question, answer) in enumerate(document.questions):
            is_right = engine.tokenizer.decode(talk.ask(question)).strip().startswith(answer)
            right += is_right
            early += is_right and turn < len(document.questions) // 2
        most = max(most, talk.most_held)
    return {
        "policy": name,
        "mode": mode,
        "right_percent": rounded(100 * right / n_asked),
        "right_in_the_first_half_percent": rounded(100 * early / (n_asked / 2)),
        "most_held_percent": rounded(100 * most),
    }


def _runner(engine: Engine, policy: Policy, document: Document) -> ModelRunner:
    steps, config = engine.runner._executor, engine.manifest.config
    assert isinstance(steps, SplitStepExecutor)
    n_tokens = len(document.token_ids) + sum(len(question) + N_ANSWER for question, _ in document.questions)
    pool = host_pool(config, 2 * n_tokens + 64)
    programs = programs_of(policy, config, page_size=pool.page_size)
    return host_runner(steps.dense, pool, programs, decode=policy.decode, decode_distance=policy.decode_distance)


class _Talk:
    """A document and the questions about it, in one of ``MODES``."""

    def __init__(self, runner: ModelRunner, mode: str) -> None:
        self.most_held = 0.0
        """The largest share of the tokens seen that was held when an answer began, mean over layers."""
        self._runner = runner
        self._mode = mode
        self._sequence = runner.new_sequence()
        self._pending: list[int] = []

    def read(self, token_ids: list[int]) -> None:
        """The first turn, without an answer."""
        self._runner.prefill(self._sequence, token_ids, evict=self._mode != "exact")

    def ask(self, question: list[int]) -> list[int]:
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

    def _answer(self, sequence: SequenceCache, question: list[int]) -> list[int]:
        logits = self._runner.prefill(sequence, question)
        self.most_held = max(self.most_held, float(sequence.held_tokens.mean()) / sequence.num_computed_tokens)
        said = [int(logits.argmax())]
        while len(said) < N_ANSWER:
            said.append(int(self._runner.decode([sequence], said[-1:])[0].argmax()))
        return said


def _document(tokenizer: Tokenizer, n_tokens: int, n_facts: int, n_questions: int, *, seed: int) -> Document:
    """Facts in prose; each is asked for as often as the others, in an order that is drawn."""
    draw = random.Random(f"conversation {seed}")
    whats = [f"the magic number of {city}" for city in draw.sample(CITIES, n_facts)]
    codes = [str(code) for code in draw.sample(range(1000, 10000), n_facts)]
    facts = [f"{what[0].upper()}{what[1:]} is {code}." for what, code in zip(whats, codes, strict=True)]
    room = n_tokens - len(_ids(tokenizer, " ".join(facts)))
    body: list[str] = []
    for sentence in sentences(draw, n_tokens):
        room -= len(_ids(tokenizer, f" {sentence}"))
        if room < 0:
            break
        body.append(sentence)
    for fact in facts:
        body.insert(draw.randint(0, len(body)), fact)
    asked = [(whats[at % n_facts], codes[at % n_facts]) for at in range(n_questions)]
    draw.shuffle(asked)
    questions = [
        (_ids(tokenizer, f"\n\nQuestion: What is {what}?\nAnswer: {what[0].upper()}{what[1:]} is"), code)
        for what, code in asked
    ]
    return Document(token_ids=_ids(tokenizer, " ".join(body)), questions=questions)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
