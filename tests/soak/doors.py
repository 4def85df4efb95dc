"""The two servers as the soak sees them: a request to each, what they say of themselves, and their processes."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.http_server import eventually
from tests.triton_rig.clients import events_of, generate, posted
from tests.triton_rig.server import Server, serving
from trt_kv.export.triton_repository import FOLDER


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, and the text that an engine alone answers."""

    engine: int
    prompt: list[int]
    max_tokens: int
    seed: int
    text: str


class Door(Protocol):
    """A server of every engine. ``leave_after``: the client goes away after so many events."""

    @property
    def name(self) -> str: ...

    def ask(self, question: Question, *, streams: bool, leave_after: int | None) -> str | None:
        """The answer's text; None if the client went away."""
        ...

    def refuses(self, question: Question) -> bool:
        """Whether a request that is wrong is refused."""
        ...

    def used_pages(self) -> float:
        """Pages of the KV caches in use."""
        ...

    def processes(self) -> list[psutil.Process]: ...


@dataclass(frozen=True, kw_only=True)
class TritonDoor:
    """One tritonserver with a model for each engine."""

    server: Server
    models: Sequence[str]
    name: str = "triton"

    def ask(self, question: Question, *, streams: bool, leave_after: int | None) -> str | None:
        body = {"input_ids": question.prompt, "max_tokens": question.max_tokens, "temperature": 0.8, "seed": question.seed}
        model = self.models[question.engine]
        if not streams:
            return str(generate(self.server, model, **body)[1]["text_output"])
        with posted(self.server, f"/v2/models/{model}/generate_stream", body | {"stream": True}) as response:
            return _joined((event["text_output"] for event in events_of(response)), leave_after)

    def refuses(self, question: Question) -> bool:
        status, answer = generate(self.server, self.models[question.engine], input_ids=question.prompt, max_tokens=0)
        return status == 400 and "max_tokens" in answer["error"]

    def used_pages(self) -> float:
        values = self.server.metrics()
        return sum(value for (name, _), value in values.items() if name == "trt_kv_pages_used")

    def processes(self) -> list[psutil.Process]:
        return _family(self.server.process.pid)


@dataclass(frozen=True, kw_only=True)
class HttpDoor:
    """One ``trt-kv serve`` for each engine."""

    servers: Sequence[subprocess.Popen[str]]
    ports: Sequence[int]
    name: str = "http"

    def ask(self, question: Question, *, streams: bool, leave_after: int | None) -> str | None:
        body = {"prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0.8, "seed": question.seed}
        with self._posted(question, body | {"stream": streams}) as response:
            if not streams:
                return str(json.loads(response.read())["choices"][0]["text"])
            lines = (line.removeprefix(b"data: ") for line in response if line.startswith(b"data: {"))
            return _joined((json.loads(line)["choices"][0]["text"] for line in lines), leave_after)

    def refuses(self, question: Question) -> bool:
        with self._posted(question, {"prompt": question.prompt, "max_tokens": 0}) as response:
            return response.status == 400 and json.loads(response.read())["error"]["param"] == "max_tokens"

    def used_pages(self) -> float:
        return sum(
            float(value) for port in self.ports for value in re.findall(r"^trt_kv_pages_used{.*} (\S+)$", _got(port), re.M)
        )

    def processes(self) -> list[psutil.Process]:
        return [one for server in self.servers for one in _family(server.pid)]

    @contextlib.contextmanager
    def _posted(self, question: Question, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[question.engine], timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()


@contextlib.contextmanager
def triton_door(engines: Sequence[Path], rig: Path, scratch: Path) -> Iterator[TritonDoor]:
    repositories = [engine / FOLDER for engine in engines]
    with serving(repositories, rig, scratch) as server:
        yield TritonDoor(server=server, models=[next(repository.iterdir()).name for repository in repositories])


@contextlib.contextmanager
def http_door(engines: Sequence[Path]) -> Iterator[HttpDoor]:
    """On ports that are free; each server says on its standard error which."""
    servers = []
    try:
        for engine in engines:
            command = [sys.executable, "-m", "trt_kv", "serve", "--port", "0", str(engine)]
            log = (engine.parent / f"{engine.name}.log").open("w+")
            servers.append((subprocess.Popen(command, stdout=log, stderr=log, text=True), engine.parent / f"{engine.name}.log"))
        found = re.compile(r"http://127\.0\.0\.1:(\d+)")
        assert eventually(lambda: all(found.search(log.read_text()) for _, log in servers), 300), "a server does not start"
        ports = [int(found.search(log.read_text())[1]) for _, log in servers]  # type: ignore[index]
        yield HttpDoor(servers=[server for server, _ in servers], ports=ports)
    finally:
        for server, _ in servers:
            server.terminate()
        for server, _ in servers:
            server.wait(60)


def _joined(texts: Iterator[str], leave_after: int | None) -> str | None:
    found = []
    for text in texts:
        found.append(text)
        if leave_after is not None and len(found) >= leave_after:
            return None
    return "".join(found)


def _got(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
