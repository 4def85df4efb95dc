"""One runner: a process that holds a model, works when it is asked, and is stopped in between.

Stopped means SIGSTOP: threads that wait by spinning, and background work, cannot take cores from the runner that is measured.
"""

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from benchmarks.harness import BenchmarkError
from benchmarks.peers.history import TOO_LONG
from benchmarks.peers.protocol import Answer, Job, Refusal, Setup, to_line

ROOT = Path(__file__).parent.parent.parent
Said = TypeVar("Said")


@dataclass(frozen=True, kw_only=True)
class Measured(Generic[Said]):
    """An answer, with what the process used for it: ``peak_bytes`` of resident memory, processor and wall seconds."""

    answer: Said
    peak_bytes: int
    cpu_s: float
    wall_s: float


class Worker:
    """A running runner. Use it in a ``with`` statement, or call ``close``."""

    def __init__(self, python: Path, module: str, *, log: Path, environment: Mapping[str, str]) -> None:
        """``module``: of the runner. ``log`` receives what it prints. ``environment`` is added to ours."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environment},
            )
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def set_up(self, setup: Setup, *, within_s: float) -> tuple[dict[str, Any], float] | Refusal:
        """Facts about the runner, and how many seconds loading took."""
        started = time.perf_counter()
        said = self._ask(to_line(setup), within_s)
        self._pause()
        if "why" in said:
            return Refusal(why=said["why"])
        return said, time.perf_counter() - started

    def run(self, job: Job, *, within_s: float) -> Measured[Answer] | Refusal:
        """Run one job. A runner that ends, or needs longer, is killed, and refuses from then on."""
        return self.ask(job, Answer, within_s=within_s)

    def ask(self, message: Any, answer: Callable[..., Said], *, within_s: float) -> Measured[Said] | Refusal:
        """The same with any message that the runner understands; ``answer`` makes something of the fields of its answer."""
        if self._process.poll() is not None:
            return Refusal(why=self._last_words())
        process = psutil.Process(self._process.pid)
        self._process.send_signal(signal.SIGCONT)
        self._forget_peak()
        before, started = process.cpu_times(), time.perf_counter()
        said = self._ask(to_line(message), within_s)
        if "why" in said:
            self._pause()
            return Refusal(why=said["why"])
        wall_s, after = time.perf_counter() - started, process.cpu_times()
        peak = self._peak_bytes()
        self._pause()
        return Measured(
            answer=answer(**said),
            peak_bytes=peak,
            cpu_s=after.user + after.system - before.user - before.system,
            wall_s=wall_s,
        )

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, line: str, within_s: float) -> dict[str, Any]:
        """The runner's line of answer; a refusal if there is none in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            answer = self._read_line(within_s)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self._process.kill()
            return dataclasses.asdict(Refusal(why=f"{TOO_LONG} {within_s:.0f} s"))
        if not answer:
            self._process.wait()
            return dataclasses.asdict(Refusal(why=self._last_words()))
        said: dict[str, Any] = json.loads(answer)
        return said

    def _read_line(self, within_s: float) -> bytes | None:
        """One line; empty if the process has ended, None if nothing came in time. Runners write whole lines at once."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(within_s):
                return None
        return self._process.stdout.readline()

    def _pause(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"it ended with {self._process.returncode}: {' / '.join(lines[-3:])}"[:500]

    def _forget_peak(self) -> None:
        """Let Linux' high-water mark of resident memory begin anew."""
        try:
            Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        except OSError as error:
            raise BenchmarkError("the peak of memory cannot be measured", got=str(error), expected="Linux") from error

    def _peak_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
