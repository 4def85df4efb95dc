"""``python -m benchmarks.gpu.tensorrt_facts [--out FILE.json]``: which features of TensorRT work on this machine.

Three questions, each answered by several facts, each determined in its own process, so that one that crashes, hangs or fails
does not affect the others. Nothing is measured. Without a GPU the facts are reported as not run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.tensorrt_fact import BUILDS, FACTS

ROOT = Path(__file__).parent.parent.parent
FACT_LIMIT_S = 120.0
LOG_CHARACTERS = 8000
Answer = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Determine the facts and print them; write ``--out`` after each one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tensorrt_facts", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"facts, all by default: {', '.join(FACTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write them")
    parser.add_argument(
        "--plans", type=Path, metavar="FOLDER", help="folder of the plans; an existing plan is used if it cannot be built"
    )
    parser.add_argument("--jobs", type=int, default=4, help="parallel processes (default: 4)")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="time limit of the run (default: 300)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in FACTS]
    if unknown:
        parser.error(f"no such fact: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="trt-kv-facts-") as scratch:
        plans = (given.plans or Path(scratch)).resolve()
        plans.mkdir(parents=True, exist_ok=True)
        run = Run(Path(scratch), plans, out=given.out, jobs=given.jobs, end=time.monotonic() + given.limit)
        run.find_out(given.names or list(FACTS))


class Run:
    """Runs the processes that determine facts and collects their answers in ``document``, the content of the file."""

    def __init__(self, scratch: Path, plans: Path, *, out: Path | None, jobs: int, end: float) -> None:
        self.document: dict[str, Any] = {"machine": {}, "builds": {}, "facts": {}}
        self._scratch, self._plans, self._out, self._jobs, self._end = scratch, plans, out, jobs, end
        self._lock = threading.Lock()

    def find_out(self, names: Sequence[str]) -> None:
        """Query the machine, build the plans, determine the facts; without a CUDA device facts are recorded as not run."""
        machine = self._ask("machine", {})
        self.document["machine"] = machine | ({"detail": json.loads(machine["detail"])} if machine["outcome"] == "yes" else {})
        self._tell("machine", self.document["machine"])
        if machine["outcome"] != "yes":
            why = "no CUDA device" if machine["outcome"] == "no" else f"the machine query failed: {machine['outcome']}"
            for name in names:
                self._keep(name, {"outcome": f"not run: {why}", "detail": ""})
            return
        for name in BUILDS:
            self._build(name)
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(lambda name: self._keep(name, self._ask(name, {})), names))

    def _build(self, name: str) -> None:
        """Build with the GPU visible, and if that fails, without it: TensorRT-RTX may refuse this GPU and build for others."""
        for label, environment in ((name, {}), (f"{name}_without_gpu", {"CUDA_VISIBLE_DEVICES": ""})):
            answer = self._ask(name, environment)
            self.document["builds"][label] = answer
            self._tell(label, answer)
            if answer["outcome"] == "yes":
                break

    def _ask(self, name: str, environment: Mapping[str, str]) -> Answer:
        limit_s = min(FACT_LIMIT_S, self._end - time.monotonic())
        if limit_s <= 0:
            return {"outcome": "not run: no time left", "detail": ""}
        file = self._scratch / f"{name}.json"
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.tensorrt_fact", name, str(file), str(self._plans)]
        return answer_of(command, file, limit_s=limit_s, environment=environment)

    def _keep(self, name: str, answer: Answer) -> None:
        with self._lock:
            facts = {**self.document["facts"], name: {"question": FACTS[name][0], **answer}}
            self.document["facts"] = {known: facts[known] for known in FACTS if known in facts}
            self._tell(name, answer)

    def _tell(self, name: str, answer: Answer) -> None:
        print(f"{name}: {answer['outcome']}. {answer['detail']}", flush=True)
        if self._out is not None:
            self._out.write_text(json.dumps(self.document, indent=1) + "\n")


def answer_of(command: Sequence[str], file: Path, *, limit_s: float, environment: Mapping[str, str]) -> Answer:
    """Run the command and return what it wrote to ``file``; if it wrote nothing, how it ended.

    ``outcome``: "yes", "no", "crash: signal N (NAME)", "timeout: N s" or "error: exit status N"; ``detail``: one sentence;
    ``log``: the end of its output, unless the outcome is "yes"; ``seconds``.
    """
    start = time.monotonic()
    log = file.with_suffix(".log")
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
            start_new_session=True,
        )
        code = _ended(process, limit_s)
    said = log.read_text(errors="replace")[-LOG_CHARACTERS:].strip()
    end = _end(code, limit_s)
    if file.is_file():
        answer: Answer = json.loads(file.read_text())
        file.unlink()
        if code != 0:
            answer["detail"] += f" (after the answer its process had: {end})"
    else:
        answer = {"outcome": end, "detail": said.splitlines()[-1] if said else "it printed nothing"}
    if answer["outcome"] != "yes":
        answer["log"] = said
    answer["seconds"] = round(time.monotonic() - start, 1)
    return answer


def _ended(process: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """The exit status; None if the process and its children were killed because of the time limit."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end although it was killed", file=sys.stderr)
    return None


def _end(code: int | None, limit_s: float) -> str:
    if code is None:
        return f"timeout: {limit_s:.0f} s"
    if code < 0:
        return f"crash: signal {-code} ({signal.Signals(-code).name})"
    return f"error: exit status {code}"


if __name__ == "__main__":
    main()
