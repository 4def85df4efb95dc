"""Something that serves loads: a process with an HTTP server, or a runner in which an engine is called without one."""

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.peers.protocol import Refusal, Setup
from benchmarks.peers.worker import ROOT, Measured, Worker
from benchmarks.serving_peers.clients import Door, ask
from benchmarks.serving_peers.loads import Load, Reply, Served

LOADING_S = 600.0
LISTENS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class Contender(Protocol):
    """``facts`` about it are for the results."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def serve(self, load: Load, *, within_s: float) -> tuple[Served, int] | Refusal:
        """Replies, and the peak of resident memory in bytes since it was started, of all its processes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtDoor:
    """A server, with clients in this process."""

    process: int
    door: Door
    facts: dict[str, Any]

    def serve(self, load: Load, *, within_s: float) -> tuple[Served, int] | Refusal:
        served = ask(self.door, load, within_s=within_s)
        try:
            return served, _peak_bytes(self.process)
        except psutil.NoSuchProcess:
            return Refusal(why=f"the server ended: {next((one.why for one in served.replies if one.why), 'without a reason')}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InProcess:
    """A runner, which is also the client."""

    worker: Worker
    facts: dict[str, Any]

    def serve(self, load: Load, *, within_s: float) -> tuple[Served, int] | Refusal:
        outcome = self.worker.ask(load, _served, within_s=within_s)
        return (outcome.answer, outcome.peak_bytes) if isinstance(outcome, Measured) else outcome


@contextlib.contextmanager
def runner(
    python: Path, module: str, setup: Setup, *, log: Path, environment: Mapping[str, str]
) -> Iterator[InProcess | Refusal]:
    """The runner ``module``, set up; or why it cannot be."""
    with Worker(python, module, log=log, environment=environment) as worker:
        loaded = worker.set_up(setup, within_s=LOADING_S)
        yield loaded if isinstance(loaded, Refusal) else InProcess(worker=worker, facts=loaded[0])


@contextlib.contextmanager
def server(
    command: Sequence[str], door: Callable[[int], Door], facts: dict[str, Any], *, log: Path, environment: Mapping[str, str]
) -> Iterator[AtDoor | Refusal]:
    """The server of a command, once it has told where it listens; or why it does not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=ROOT, env={**os.environ, **environment}
        )
    try:
        port = _port_of(process, log)
        yield port if isinstance(port, Refusal) else AtDoor(process=process.pid, door=door(port), facts=facts)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int | Refusal:
    """Where a server that starts says that it will listen, once it does."""
    deadline = time.monotonic() + LOADING_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if (found := LISTENS.search(text)) is not None and _listens(int(found[1])):
            return int(found[1])
        if process.poll() is not None:
            return Refusal(why=f"it ended with {process.returncode}: {text.strip()[-400:]}")
        time.sleep(0.05)
    return Refusal(why=f"it did not start within {LOADING_S:.0f} s")


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _peak_bytes(pid: int) -> int:
    """Of a process and its children."""
    found = psutil.Process(pid)
    total = 0
    for one in (found, *found.children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status").read_text()
        total += sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return total


def _served(replies: list[dict[str, Any]]) -> Served:
    return Served(replies=[Reply(**reply) for reply in replies])
