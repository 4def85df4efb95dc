"""A tritonserver process for tests: free ports, an own environment for its models, and nothing of it left behind."""

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.triton_rig.set_up import SERVER, python_libraries

ROOT = Path(__file__).parents[2]
START_S = 200.0
STOP_S = 15.0
FATAL = re.compile(r"error while loading shared libraries|Failed to preinitialize Python stub|Stub process .* is not healthy")
"""In the log of a server that would go on trying to load a model."""


class ServerError(Exception):
    """The server did not start; with its log."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that runs. Ports are of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    log: Path
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stubs(self, model: str) -> list[int]:
        """Processes that run a model."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                found += [child.pid] if any(f"/{model}/" in word for word in child.cmdline()) else []
        return found

    def status(self, path: str) -> int:
        """The HTTP status of an answer whose body does not matter."""
        return self._got(path)[0]

    def get(self, path: str) -> str:
        """The body of an answer."""
        return self._got(path)[1].decode()

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Values of Triton's metrics by name and labels."""
        lines = self._got("/metrics", self.metrics_port)[1].decode().splitlines()
        found = [re.fullmatch(r"([^{ ]+)\{(.*)\} (\S+)", line) for line in lines if not line.startswith("#")]
        return {(one[1], tuple(re.findall(r'(\w+)="([^"]*)"', one[2]))): float(one[3]) for one in found if one is not None}

    def _got(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def model_environment(folder: Path, rig: Path) -> Path:
    """A virtual environment for the models: the packages of this one and this checkout of trt-kv, with the rig's numpy."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # Engines are shared with other tests, which count their files. Triton's Python ignores PYTHONDONTWRITEBYTECODE.
    unchanged = "import sys; sys.dont_write_bytecode = True"
    (site_packages / "paths.pth").write_text("\n".join([unchanged, str(rig), str(ROOT), *ours]) + "\n")
    return folder


@contextmanager
def serving(repositories: Sequence[Path], rig: Path, scratch: Path, *options: str) -> Iterator[Server]:
    """A server of the models in ``repositories``, ready when the block begins. ``ServerError`` if it does not start.

    ``scratch``: an empty folder for its log and environment.
    """
    regions = f"trtkv-{secrets.token_hex(4)}-"
    server = _started(repositories, rig, scratch, [f"--backend-config=python,shm-region-prefix-name={regions}", *options])
    try:
        _wait_until(lambda: server.status("/v2/health/ready") == 200, server)
        yield server
    finally:
        _stop(server)
        for region in Path("/dev/shm").glob(f"{regions}*"):
            region.unlink(missing_ok=True)


def _started(repositories: Sequence[Path], rig: Path, scratch: Path, options: Sequence[str]) -> Server:
    environment = model_environment(scratch / "environment", rig)
    ports = _free_ports(3)
    command = [
        str(rig / SERVER / "bin" / "tritonserver"),
        *(f"--model-repository={repository}" for repository in repositories),
        f"--backend-directory={rig / SERVER / 'backends'}",
        f"--cache-directory={rig / SERVER / 'caches'}",
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        *(f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=4",
        *options,
    ]
    paths = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(python_libraries())}
    log = scratch / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | paths,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (one call of the C library; there is no option for it)
        )
    return Server(process=process, log=log, http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_until(ready: Callable[[], bool], server: Server) -> None:
    """Return when ``ready()``, which may raise ``OSError`` before the server listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"tritonserver ended with {server.process.returncode}:\n{server.log_text[-6000:]}")
        if (found := FATAL.search(server.log_text)) is not None:
            raise ServerError(f"{found[0]}:\n{server.log_text[-6000:]}")
        try:
            if ready():
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    raise ServerError(f"tritonserver was not ready after {START_S:.0f} s:\n{server.log_text[-6000:]}")


def _stop(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)
    try:
        server.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
