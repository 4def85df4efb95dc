"""The loop: a row is started, serves its loads alone, and is ended. Every sample is saved at once."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer

from benchmarks.harness import BenchmarkError
from benchmarks.peers.protocol import Refusal
from benchmarks.peers.subjects import Subject, smollm2
from benchmarks.serving_peers.contenders import Contender
from benchmarks.serving_peers.doors import doors_of
from benchmarks.serving_peers.loads import Load
from benchmarks.serving_peers.plan import CONCURRENCY, DOORS, MEMORY, MIB, Plan
from benchmarks.serving_peers.prompts import Prompt, facts_in_prose, prose
from benchmarks.serving_peers.rows import ROWS, Opened, Room
from benchmarks.serving_peers.samples import OUT_OF_TIME, Sample, is_same, key_of, summary

LOAD_S = 1800.0
WARM_UP_TOKENS = 4


class Run:
    """One run of a plan: ``samples`` so far, of this run or of an interrupted one that it continues."""

    def __init__(
        self,
        plan: Plan,
        samples: list[Sample],
        *,
        save: Callable[[], None],
        say: Callable[[str], None],
        subject: Callable[[], Subject] = smollm2,
    ) -> None:
        """``save`` is called after each load; ``say`` tells what happens. What a run had no time for is forgotten."""
        samples[:] = [sample for sample in samples if sample.get("why") != OUT_OF_TIME]
        self._samples, self._plan, self._save, self._say = samples, plan, save, say
        self._subject = subject()
        self._tokenizer = Tokenizer.from_file(str(self._subject.folder / "tokenizer.json"))
        self._starts: dict[str, Callable[[Room], Opened] | str] = {}

    def prepare(self) -> None:
        """Make environments, models and engines that are missing."""
        of, parts = self._plan.of, self._plan.parts
        rows = (*(of.rows if parts != (MEMORY,) else ()), *(of.memory_rows if MEMORY in parts else ()))
        for name in dict.fromkeys(self._plan.chosen(rows)):
            self._say(f"preparing {name}")
            self._start_of(name)

    def measure(self) -> None:
        """Measure everything that is not in the samples yet. The time of the plan begins when all is prepared."""
        self.prepare()
        self._deadline = time.monotonic() + 60 * self._plan.minutes
        for part, measure in ((MEMORY, self._in_memory), (CONCURRENCY, self._at_clients), (DOORS, self._at_doors)):
            if part in self._plan.parts:
                measure()

    def _at_clients(self) -> None:
        of = self._plan.of
        room = Room(n_sequences=max(of.clients), n_prompt=of.prompt, n_tokens=of.tokens, threads=self._plan.threads)
        for row in self._plan.chosen(of.rows):
            loads = [
                (key_of(CONCURRENCY, row, n, 0), prose(self._tokenizer, n * of.requests_each, n_tokens=of.prompt, seed=n))
                for n in of.clients
            ]
            self._row(row, room, loads)

    def _in_memory(self) -> None:
        of = self._plan.of
        room = Room(
            n_sequences=of.memory_clients,
            n_prompt=of.memory_prompt,
            n_tokens=of.memory_tokens,
            threads=self._plan.threads,
            cache_bytes=of.memory_mib * MIB,
        )
        prompts = facts_in_prose(self._tokenizer, of.memory_requests, n_tokens=of.memory_prompt, seed=0)
        for row in self._plan.chosen(of.memory_rows):
            self._row(row, room, [(key_of(MEMORY, row, of.memory_clients, 0), prompts)])

    def _row(self, row: str, room: Room, loads: Sequence[tuple[Sample, list[Prompt]]]) -> None:
        """Loads of one row, one after the other."""
        missing = [(key, prompts) for key, prompts in loads if not self._is_done(key)]
        start = self._start_of(row)
        if isinstance(start, str) or not missing or time.monotonic() > self._deadline:
            for key, _ in missing:
                self._record(key | {"why": start if isinstance(start, str) else OUT_OF_TIME})
            return
        with start(room) as started:
            contender = started if isinstance(started, Refusal) else self._warmed(started, missing[0][1])
            for key, prompts in missing:
                self._load(contender, key, prompts, room.n_tokens)

    def _at_doors(self) -> None:
        """The engine in process and our servers, all started, in turns."""
        of = self._plan.of
        room = Room(
            n_sequences=max(of.door_clients), n_prompt=of.door_prompt, n_tokens=of.door_tokens, threads=self._plan.threads
        )
        doors = doors_of(self._subject, room)
        missing = [turn for turn in self._turns(list(doors)) if not self._is_done(turn)]
        if not missing:
            return
        with contextlib.ExitStack() as held:
            warm_up = prose(self._tokenizer, 2, n_tokens=of.door_prompt, seed=-1)
            started: dict[str, Contender | Refusal] = {}
            for name, opened in doors.items():
                found = held.enter_context(opened)
                started[name] = found if isinstance(found, Refusal) else self._warmed(found, warm_up)
            for key in missing:
                n, seed = key["clients"], 1000 * key["clients"] + key["round"]
                prompts = prose(self._tokenizer, max(n, 2), n_tokens=of.door_prompt, seed=seed)
                self._load(started[key["row"]], key, prompts, of.door_tokens)

    def _turns(self, names: list[str]) -> Iterator[Sample]:
        for n in self._plan.of.door_clients:
            for index in range(self._plan.of.door_rounds):
                turn = index % len(names)
                for name in names[turn:] + names[:turn]:
                    yield key_of(DOORS, name, n, index)

    def _warmed(self, contender: Contender, prompts: list[Prompt]) -> Contender | Refusal:
        """After two requests that are not counted: kernels are compiled, and memory is touched."""
        prompt_ids = [[*reversed(prompt.token_ids[:512])] for prompt in (prompts * 2)[:2]]
        load = Load(prompts=prompt_ids, n_tokens=WARM_UP_TOKENS, n_clients=2)
        outcome = contender.serve(load, within_s=LOAD_S)
        if isinstance(outcome, Refusal):
            return outcome
        why = next((reply.why for reply in outcome[0].replies if reply.why), None)
        return contender if why is None else Refusal(why=f"at a first request: {why}")

    def _load(self, contender: Contender | Refusal, key: Sample, prompts: list[Prompt], n_tokens: int) -> None:
        if isinstance(contender, Refusal):
            self._record(key | {"why": contender.why})
            return
        if time.monotonic() > self._deadline:
            self._record(key | {"why": OUT_OF_TIME})
            return
        load = Load(prompts=[prompt.token_ids for prompt in prompts], n_tokens=n_tokens, n_clients=key["clients"])
        outcome = contender.serve(load, within_s=LOAD_S)
        if isinstance(outcome, Refusal):
            self._record(key | {"why": outcome.why})
            return
        served, peak_bytes = outcome
        for reply in served.replies:
            reply.text = reply.text or self._tokenizer.decode(reply.token_ids)
        found = summary(served.replies, prompts)
        self._record(key | found | {"peak_mib": round(peak_bytes / MIB), "facts": contender.facts})

    def _start_of(self, row: str) -> Callable[[Room], Opened] | str:
        """What starts a row, or why nothing does."""
        if row not in self._starts:
            try:
                self._starts[row] = ROWS[row].prepare(self._subject)
            except BenchmarkError as error:
                self._starts[row] = " ".join(str(error).split())
        return self._starts[row]

    def _is_done(self, key: Sample) -> bool:
        return any(is_same(sample, key) for sample in self._samples)

    def _record(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._save()
        told = sample.get("why") or f"{sample['tokens_per_s']} tokens/s in {sample['seconds']} s"
        if sample.get("asked"):
            told += f", {sample['right']} of {sample['asked']} right"
        self._say(f"{sample['part']}, {sample['clients']} clients, {sample['row']}: {told}")
