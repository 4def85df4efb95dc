"""The loop: in every round each row answers one request of each context, alone, in rotating order. All is saved at once."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.bandwidth import Probe
from benchmarks.peers.environments import peers_folder
from benchmarks.peers.history import OUT_OF_TIME, History, Sample, key_of
from benchmarks.peers.protocol import Answer, Job, Refusal, Setup
from benchmarks.peers.rows import OURS, ROWS, Prepared, prepared
from benchmarks.peers.subjects import SUBJECTS, Subject
from benchmarks.peers.worker import Measured, Worker

ROOM = 64
"""Tokens that a cache has room for beyond prompt and answer."""
CHUNK = 512
"""Prompt tokens that our engine reads at once."""
LOADING_S = 600
SYNTHETIC_TOO = 2048
"""At this context our rows are measured with synthetic caches, too, to show what those are worth."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure. ``minutes``: after them nothing new is begun. ``job_s``: the longest that one request may take."""

    subjects: Sequence[str]
    rows: Sequence[str]
    contexts: Sequence[int]
    rounds: int
    n_tokens: int
    threads: int
    minutes: float
    job_s: float


class Run:
    """One run of a plan: ``samples`` so far, of this run or of an interrupted one that it continues."""

    def __init__(self, plan: Plan, samples: list[Sample], *, save: Callable[[], None], say: Callable[[str], None]) -> None:
        """``save`` is called after each request; ``say`` tells what happens."""
        self._history = History(samples)
        self._plan, self._save, self._say = plan, save, say
        self._deadline = time.monotonic() + 60 * plan.minutes

    def measure(self) -> None:
        """Measure everything that is not in ``samples`` yet."""
        for subject, ready in self.prepare():
            rows = list(ready)
            for index in range(self._plan.rounds if rows else 0):
                self._probe(subject, index)
                turn = index % len(rows)
                for row in rows[turn:] + rows[:turn]:
                    self._turn(subject, row, ready[row], index)

    def prepare(self) -> list[tuple[Subject, dict[str, Prepared]]]:
        """The models, and what the workers of their rows need, which is made if it is missing; rows that cannot be had say why.

        The time of the plan begins afterwards.
        """
        made = []
        for name in self._plan.subjects:
            subject = SUBJECTS[name]()
            ready: dict[str, Prepared] = {}
            for row in self._plan.rows:
                self._say(f"{subject.title}: preparing {row}")
                outcome = prepared(ROWS[row], subject)
                if isinstance(outcome, Prepared):
                    ready[row] = outcome
                else:
                    for context in self._contexts(subject):
                        self._record(key_of(subject.name, row, context, 0) | {"why": outcome})
            made.append((subject, ready))
        self._deadline = time.monotonic() + 60 * self._plan.minutes
        return made

    def _contexts(self, subject: Subject) -> list[int]:
        """Ascending. Prompt and answer fit the model's positions, except where the context alone is meant not to."""
        fitting = (subject.max_positions - self._plan.n_tokens - ROOM) // 32 * 32
        return [min(n, fitting) if n <= subject.max_positions else n for n in sorted(self._plan.contexts)]

    def _turn(self, subject: Subject, row: str, needs: Prepared, index: int) -> None:
        """A request of one row at each context, by one runner, or one for each context if it is ``sized_by_context``."""
        wanted = [n for n in self._contexts(subject) if not self._history.is_done(subject.name, row, n, index)]
        worker: Worker | None = None
        with contextlib.ExitStack() as stack:
            for context in wanted:
                key = key_of(subject.name, row, context, index)
                job = self._job(subject, row, needs, context, index)
                if isinstance(job, Refusal):
                    self._record(key | {"why": job.why})
                    continue
                if worker is None or not worker.is_alive or needs.sized_by_context:
                    stack.close()
                    worker = stack.enter_context(self._worker(subject, row, needs, context))
                    facts = self._load(worker, needs, key, context if needs.sized_by_context else wanted[-1])
                    if isinstance(facts, Refusal):
                        self._record(key | {"why": facts.why})
                        worker.close()
                        continue
                    needs = dataclasses.replace(needs, weight_bytes=needs.weight_bytes or int(facts["weight_bytes"]))
                self._request(subject, row, needs, worker, job)

    def _load(self, worker: Worker, needs: Prepared, key: Sample, longest: int) -> dict[str, Any] | Refusal:
        """Set the worker up for contexts up to ``longest``, and let it answer once; facts about it."""
        setup = Setup(
            model=str(needs.model.absolute()),
            threads=self._plan.threads,
            context=longest + self._plan.n_tokens + ROOM,
            options=needs.options,
        )
        loaded = worker.set_up(setup, within_s=LOADING_S)
        if isinstance(loaded, Refusal):
            return loaded
        facts, load_s = loaded
        self._record(key | {"round": "loading", "load_s": load_s, "facts": facts})
        # Kernels are compiled and memory is touched at a first request, which is not counted. It is as long as a chunk of a
        # prompt, so that the peak of a request with a synthetic cache has memory for chunks in it.
        answered = worker.run(Job(context=min(key["context"], CHUNK), n_tokens=4, seed=-1), within_s=LOADING_S)
        return answered if isinstance(answered, Refusal) else facts

    def _job(self, subject: Subject, row: str, needs: Prepared, context: int, index: int) -> Job | Refusal:
        """What to ask at a context, or why nothing."""
        if time.monotonic() > self._deadline:
            return Refusal(why=OUT_OF_TIME)
        expected_s = self._history.expected_s(subject.name, row, context)
        is_slow = expected_s > self._plan.job_s or self._history.took_too_long(subject.name, row, context)
        is_synthetic = needs.places_caches and (context > subject.longest_prompt or is_slow)
        if is_slow and not is_synthetic:
            return Refusal(why=f"reading the prompt would take {max(expected_s, self._plan.job_s):.0f} s or longer")
        return Job(context=context, n_tokens=self._plan.n_tokens, seed=index, synthetic=is_synthetic)

    def _worker(self, subject: Subject, row: str, needs: Prepared, context: int) -> Worker:
        name = f"{subject.name}-{row}-{context}.log".replace(" ", "_").replace("/", "_")
        return Worker(
            needs.python,
            f"benchmarks.peers.runners.{needs.module}",
            log=peers_folder() / "logs" / name,
            environment={"OMP_NUM_THREADS": str(self._plan.threads), **needs.environment},
        )

    def _request(self, subject: Subject, row: str, needs: Prepared, worker: Worker, job: Job) -> None:
        key = key_of(subject.name, row, job.context, job.seed)
        both = job.seed == 0 and job.context == SYNTHETIC_TOO and ROWS[row].engine == OURS and not job.synthetic
        self._record(key | _sample(subject, needs, job, worker.run(job, within_s=self._plan.job_s)))
        if both and worker.is_alive:
            job = dataclasses.replace(job, synthetic=True)
            sample = _sample(subject, needs, job, worker.run(job, within_s=self._plan.job_s))
            if "why" not in sample:
                self._record(key | {"round": "synthetic"} | sample)

    def _probe(self, subject: Subject, index: int) -> None:
        speed = Probe(self._plan.threads).gb_per_s()
        self._record(key_of(subject.name, "bandwidth", 0, index) | {"gb_per_s": round(speed, 2)})

    def _record(self, sample: Sample) -> None:
        self._history.samples.append(sample)
        self._save()
        if "token_ms" in sample:
            ms = sorted(sample["token_ms"])[len(sample["token_ms"]) // 2]
            first = sample["first_token_s"]
            told = f"{ms:.1f} ms per token" + (f", first token after {first:.2f} s" if first is not None else "")
        else:
            told = sample.get("why") or f"loaded in {sample['load_s']:.1f} s" if "gb_per_s" not in sample else ""
        if told:
            self._say(f"{sample['subject']} {sample['context']} round {sample['round']} {sample['row']}: {told}")


def _sample(subject: Subject, needs: Prepared, job: Job, outcome: Measured[Answer] | Refusal) -> Sample:
    """What is kept of one request."""
    if isinstance(outcome, Refusal):
        return {"why": outcome.why}
    answer = outcome.answer
    kv_bytes = answer.kv_bytes
    if kv_bytes is None and needs.kv_element_bytes is not None:
        kv_bytes = int(subject.kv_bytes(needs.kv_element_bytes) * job.context)
    return {
        "synthetic": answer.first_token_s is None,
        "first_token_s": answer.first_token_s,
        "token_ms": [round(ms, 3) for ms in answer.token_ms],
        "kv_bytes": kv_bytes,
        "weight_bytes": needs.weight_bytes,
        "peak_bytes": outcome.peak_bytes,
        "cores": round(outcome.cpu_s / outcome.wall_s, 2),
        "joules": answer.joules,
    }
