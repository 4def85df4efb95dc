"""The loop: every row once per round, alone at a time, in rotating order; results are saved after each visit."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.peers.bandwidth import Probe
from benchmarks.peers.environments import peers_folder
from benchmarks.peers.protocol import Job, Refusal, Setup
from benchmarks.peers.rows import OURS, ROWS, Prepared, prepared
from benchmarks.peers.subjects import SUBJECTS, Subject
from benchmarks.peers.worker import Measured, Worker

ROOM = 64
"""Tokens that a cache has room for beyond prompt and answer."""
LOADING_S = 600
MEMORY_SHARE = 0.6
"""Of the free memory that runners which wait may hold together; if they need more, each is loaded again at every visit."""
SYNTHETIC_TOO = 2048
"""At this context our rows are measured with synthetic caches, too, to show what those are worth."""
OUT_OF_TIME = "the time that the run was given was over"

Sample = dict[str, Any]


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
        """``save`` is called after each visit; ``say`` tells what happens."""
        samples[:] = [sample for sample in samples if sample.get("why") != OUT_OF_TIME]
        self.samples = samples
        self._plan, self._save, self._say = plan, save, say
        self._deadline = time.monotonic() + 60 * plan.minutes

    def measure(self) -> None:
        """Measure everything that is not in ``samples`` yet."""
        for name in self._plan.subjects:
            subject = SUBJECTS[name]()
            ready: dict[str, Prepared] = {}
            for row in self._plan.rows:
                self._say(f"{subject.title}: preparing {row}")
                outcome = prepared(ROWS[row], subject)
                if isinstance(outcome, Prepared):
                    ready[row] = outcome
                else:
                    self._refuse_all(subject, row, outcome)
            for context in sorted(self._plan.contexts):
                if context <= subject.max_positions:
                    self._at_context(subject, context, ready)

    def _at_context(self, subject: Subject, context: int, ready: dict[str, Prepared]) -> None:
        # A prompt and its answer fit the model's positions.
        context = min(context, (subject.max_positions - self._plan.n_tokens - ROOM) // 32 * 32)
        rows = [row for row in ready if not self._is_done(subject, row, context)]
        if not rows:
            return
        keep = self._plan.rounds > 1 and self._fit_together(subject, context, [ready[row] for row in rows])
        with contextlib.ExitStack() as stack:
            open_workers: dict[str, Worker] = {}
            for index in range(self._plan.rounds):
                self._probe(subject, context, index)
                turn = index % len(rows)
                for row in rows[turn:] + rows[:turn]:
                    with contextlib.ExitStack() as visit:
                        if not self._has_refused(subject, row, context):
                            owner = stack if keep else visit
                            self._visit(subject, context, index, row, ready, owner, open_workers)
                        if not keep:
                            open_workers.pop(row, None)

    def _visit(
        self,
        subject: Subject,
        context: int,
        index: int,
        row: str,
        ready: dict[str, Prepared],
        stack: contextlib.ExitStack,
        workers: dict[str, Worker],
    ) -> None:
        """One request of one row, whose runner is started if it does not run."""
        needs = ready[row]
        key = {"subject": subject.name, "row": row, "context": context, "round": index}
        if time.monotonic() > self._deadline:
            self._record({**key, "why": OUT_OF_TIME})
            return
        expected_s = self._expected_s(subject, row, context)
        is_synthetic = needs.places_caches and (context > subject.longest_prompt or expected_s > self._plan.job_s)
        if not is_synthetic and expected_s > self._plan.job_s:
            self._record({**key, "why": f"reading the prompt would take about {expected_s:.0f} s"})
            return
        if row not in workers:
            worker = Worker(
                needs.python,
                f"benchmarks.peers.runners.{needs.module}",
                log=peers_folder() / "logs" / f"{subject.name}-{row}-{context}.log".replace(" ", "_").replace("/", "_"),
                environment={"OMP_NUM_THREADS": str(self._plan.threads), **needs.environment},
            )
            workers[row] = stack.enter_context(worker)
            setup = Setup(
                model=str(needs.model.absolute()),
                threads=self._plan.threads,
                context=context + self._plan.n_tokens + ROOM,
                options=needs.options,
            )
            loaded = worker.set_up(setup, within_s=LOADING_S)
            if isinstance(loaded, Refusal):
                self._record({**key, "why": loaded.why})
                return
            facts, load_s = loaded
            if not needs.weight_bytes:
                needs = ready[row] = dataclasses.replace(needs, weight_bytes=int(facts["weight_bytes"]))
            self._record({**key, "round": "loading", "load_s": load_s, "facts": facts})
            # Kernels are compiled and memory is touched at a first request, which is not counted.
            worker.run(Job(context=min(context, 64), n_tokens=4, seed=-1), within_s=self._plan.job_s)
        job = Job(context=context, n_tokens=self._plan.n_tokens, seed=index, synthetic=is_synthetic)
        self._record({**key, **self._outcome(subject, needs, workers[row], job)})
        if index == 0 and context == SYNTHETIC_TOO and ROWS[row].engine == OURS and not is_synthetic:
            outcome = self._outcome(subject, needs, workers[row], dataclasses.replace(job, synthetic=True))
            if "why" not in outcome:
                self._record({**key, "round": "synthetic", **outcome})

    def _outcome(self, subject: Subject, needs: Prepared, worker: Worker, job: Job) -> Sample:
        return _sample(subject, needs, job, worker.run(job, within_s=self._plan.job_s))

    def _record(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._save()
        if "token_ms" in sample:
            ms = sorted(sample["token_ms"])[len(sample["token_ms"]) // 2]
            first = sample["first_token_s"]
            told = f"{ms:.1f} ms per token" + (f", first token after {first:.2f} s" if first is not None else "")
        else:
            told = sample.get("why") or f"loaded in {sample['load_s']:.1f} s" if "gb_per_s" not in sample else ""
        if told:
            self._say(f"{sample['subject']} {sample['context']} round {sample['round']} {sample['row']}: {told}")

    def _probe(self, subject: Subject, context: int, index: int) -> None:
        speed = Probe(self._plan.threads).gb_per_s()
        key = {"subject": subject.name, "row": "bandwidth", "context": context, "round": index}
        self._record({**key, "gb_per_s": round(speed, 2)})

    def _refuse_all(self, subject: Subject, row: str, why: str) -> None:
        for context in self._plan.contexts:
            if context <= subject.max_positions:
                self._record({"subject": subject.name, "row": row, "context": context, "round": 0, "why": why})

    def _of(self, subject: Subject, row: str) -> list[Sample]:
        return [s for s in self.samples if s["subject"] == subject.name and s["row"] == row]

    def _is_done(self, subject: Subject, row: str, context: int) -> bool:
        mine = [s for s in self._of(subject, row) if s["context"] == context]
        return sum("token_ms" in s and s["round"] != "synthetic" for s in mine) >= self._plan.rounds or any(
            "why" in s for s in mine
        )

    def _has_refused(self, subject: Subject, row: str, context: int) -> bool:
        return any(s["context"] == context and "why" in s for s in self._of(subject, row))

    def _expected_s(self, subject: Subject, row: str, context: int) -> float:
        """Seconds to read a prompt, at the rate of the longest one that was read; 0 if none was."""
        read = [s for s in self._of(subject, row) if s.get("first_token_s")]
        if not read:
            return 0.0
        longest = max(read, key=lambda s: s["context"])
        return float(longest["first_token_s"]) * context / int(longest["context"])

    def _fit_together(self, subject: Subject, context: int, needs: Sequence[Prepared]) -> bool:
        total = sum(2 * need.weight_bytes + subject.kv_bytes(need.kv_element_bytes or 4.0) * context for need in needs)
        return bool(total < MEMORY_SHARE * psutil.virtual_memory().available)


def _sample(subject: Subject, needs: Prepared, job: Job, outcome: Measured | Refusal) -> Sample:
    """What is kept of one visit."""
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
