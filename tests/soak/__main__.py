"""Rounds of load, each followed by silence in which nothing may be left: ``python -m tests.soak [--minutes 10] [--out FILE]``.

A client asks either server for one of many answers that are known, whole or streamed; some leave in the middle, some ask for
nonsense. After each round no page may be in use, and after the first rounds no process may have more threads or open files than
before, or noticeably more memory.
"""

import argparse
import contextlib
import functools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import begun_document, save
from tests.checkpoints import write_checkpoint
from tests.engines import build_for_test, load_for_test, random_ids
from tests.http_server import eventually
from tests.soak.doors import Door, Question, http_door, triton_door
from tests.triton_rig.set_up import reason_not_to, set_up
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_without_floor
from trt_kv.runtime.engine import Engine

POLICIES = ("h2o", "freekv")
N_QUESTIONS = 60
N_CLIENTS = 8
"""Of each server."""
ROUND_S = 10.0
WARM_UP = 3
"""Rounds with four times the clients, in which threads are started and memory is taken for the first time."""
SETTLING_S = 1.0
"""Silence in which connections that clients have closed are closed by the servers too."""
MEMORY_SHARE, MEMORY_MB = 0.03, 8.0
"""By which the memory at the end may exceed that after the warm-up, medians of a third of the rounds each."""


@dataclass(kw_only=True)
class Tally:
    """What happened: answers by kind, and what must not have."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A server in silence: its processes together."""

    memory_mb: float
    n_threads: int
    n_files: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="write what happened as JSON")
    given = parser.parse_args()
    minutes = given.minutes
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        engines = _engines(Path(scratch))
        questions = [_question(engines, at) for at in range(N_QUESTIONS)]
        doors: list[Door] = [held.enter_context(http_door(engines))]
        if (reason := reason_not_to()) is None:
            doors.append(held.enter_context(triton_door(engines, set_up(), _made(Path(scratch) / "triton"))))
        else:
            _say(f"without Triton: {reason}")
        tallies = {door.name: Tally() for door in doors}
        samples: dict[str, list[Sample]] = {door.name: [] for door in doors}
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end or len(samples["http"]) < WARM_UP + 3:
            _round(doors, questions, tallies, seed=len(samples["http"]))
            for door in doors:
                if not eventually(lambda door=door: door.used_pages() == 0, 20):
                    tallies[door.name].wrong.append(f"{door.used_pages():.0f} pages are in use in silence")
                samples[door.name].append(_sample(door))
                _say(f"{door.name:7} {dict(sorted(tallies[door.name].counts.items()))} {samples[door.name][-1]}")
    faults = [f"{name}: {fault}" for name in tallies for fault in (*tallies[name].wrong, *_growth(samples[name]))]
    for fault in faults:
        _say(f"FAULT {fault}")
    _say("nothing was lost, mixed or left behind" if not faults else f"{len(faults)} faults")
    if given.out is not None:
        save(_report(minutes, tallies, samples, faults), given.out)
    return bool(faults)


def _report(
    minutes: float, tallies: Mapping[str, Tally], samples: Mapping[str, list[Sample]], faults: list[str]
) -> dict[str, Any]:
    """A results file as benchmarks have them: every silence, and answers by kind at the end."""
    settings = {"minutes": minutes, "clients": N_CLIENTS, "round_s": ROUND_S, "warm_up_rounds": WARM_UP, "policies": POLICIES}
    servers = {
        name: {"answers": dict(sorted(tallies[name].counts.items())), "silences": [asdict(one) for one in samples[name]]}
        for name in tallies
    }
    document = begun_document(
        "Both servers under mixed load: what was answered, and what was in use after each round", settings
    )
    return document | {"elapsed_s": round(60 * minutes, 1), "servers": servers, "faults": faults}


def _engines(scratch: Path) -> list[Path]:
    """Small engines of two policies, one of which has its cache on the host."""
    checkpoint = scratch / "small"
    write_checkpoint(checkpoint, sample="qwen3-biases")
    requests = [
        EngineRequest(checkpoint=open_checkpoint(checkpoint), policy=policy_without_floor(name), page_size=5)
        for name in POLICIES
    ]
    return [build_for_test(one, scratch / name) for one, name in zip(requests, POLICIES, strict=True)]


def _question(engines: Sequence[Path], at: int) -> Question:
    """The question of that number, with its answer."""
    which = at % len(engines)
    engine = _loaded(engines[which])
    prompt, max_tokens = random_ids(engine, 4 + 13 * at % 100, seed=at), 1 + 11 * at % 24
    text = engine.generate(prompt, max_new_tokens=max_tokens, temperature=0.8, seed=at).text
    return Question(engine=which, prompt=prompt, max_tokens=max_tokens, seed=at, text=text)


@functools.cache
def _loaded(folder: Path) -> Engine:
    return load_for_test(folder)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _round(doors: Sequence[Door], questions: Sequence[Question], tallies: dict[str, Tally], *, seed: int) -> None:
    """Load from all clients for ``ROUND_S``."""
    until = time.monotonic() + ROUND_S
    n_clients = 4 * N_CLIENTS if seed < WARM_UP else N_CLIENTS
    clients = [
        threading.Thread(target=_client, args=(door, questions, tallies[door.name], until, random.Random(f"{seed} {at}")))
        for door in doors
        for at in range(n_clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def _client(door: Door, questions: Sequence[Question], tally: Tally, until: float, choice: random.Random) -> None:
    while time.monotonic() < until:
        question = choice.choice(questions)
        kind = choice.choice(("whole", "streamed", "left", "refused"))
        try:
            if kind == "refused":
                right = door.refuses(question)
            else:
                leaves = choice.randint(1, 4) if kind == "left" else None
                text = door.ask(question, streams=kind != "whole", leave_after=leaves)
                right = text in (None, question.text)
        except Exception as error:  # noqa: BLE001  (counted, whatever it is)
            tally.wrong.append(f"{kind}: {error!r}")
            return
        tally.counts[kind] += 1
        if not right:
            tally.wrong.append(f"{kind} answer to question {question.seed} is not that of the engine alone")


def _sample(door: Door) -> Sample:
    time.sleep(SETTLING_S)
    processes = door.processes()
    return Sample(
        memory_mb=round(sum(one.memory_info().rss for one in processes) / 2**20, 1),
        n_threads=sum(one.num_threads() for one in processes),
        n_files=sum(one.num_fds() for one in processes),
    )


def _growth(samples: Sequence[Sample]) -> list[str]:
    """What grew after the warm-up."""
    later = samples[WARM_UP:]
    third = max(1, len(later) // 3)
    faults = []
    for name in ("n_threads", "n_files"):
        before, after = (max(getattr(one, name) for one in part) for part in (later[:third], later[-third:]))
        if after > before:
            faults.append(f"{name} grew from {before} to {after}")
    before, after = (statistics.median(one.memory_mb for one in part) for part in (later[:third], later[-third:]))
    if after > before * (1 + MEMORY_SHARE) + MEMORY_MB:
        faults.append(f"memory grew from {before} to {after} MB")
    return faults


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
