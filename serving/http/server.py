"""Running the application with uvicorn until it is told to stop, and then until its requests have ended."""

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

from trt_kv.errors import UsageError
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.serving.http.app import make_app
from trt_kv.serving.http.settings import ServerSettings
from trt_kv.serving.logs import log_event

KEEP_ALIVE_S = 75
ENDING_S = 10
"""How long requests that are ended may take to tell their clients; connections that are left then are closed."""


class HttpServer(uvicorn.Server):
    """A server on the socket that it has bound. ``run_until_stopped`` returns when it has been told to stop and has drained.

    SIGINT or SIGTERM: no new connection and no new request is taken; those that run may go on for ``drain_seconds`` and are
    ended then. A second SIGINT ends them at once.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.settings = settings
        self.socket = bound_socket(settings.host, settings.port)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.app = make_app(engine, settings)
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.drain_seconds + ENDING_S,
            lifespan="on",
            loop="asyncio",
            http="h11",
            ws="none",
        )
        super().__init__(config)

    def run_until_stopped(self) -> None:
        """Serve in this thread; in the main one signals stop it."""
        try:
            self.run(sockets=[self.socket])
        except (KeyboardInterrupt, SystemExit):
            if not self.should_exit:
                raise  # not the signal that it was stopped with, which uvicorn repeats at its end
        finally:
            self.socket.close()
        log_event("stopped")

    def stop(self) -> None:
        """Begin to drain, as a signal does. May be called from any thread."""
        self.app.state.context.admission.is_draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.app.state.context.admission.is_draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        admission, seconds = self.app.state.context.admission, self.settings.drain_seconds
        log_event("stopping", requests=admission.n_inside, drain_seconds=seconds)
        over = asyncio.get_running_loop().call_later(seconds, admission.end_all)
        await super().shutdown(sockets)
        over.cancel()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address; ``UsageError`` if that is impossible."""
    try:
        found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError("the server has no such address", got=host, expected="a host name or address") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # so that who reads the address, and connects before uvicorn accepts, waits and is not refused
    except OSError as error:
        bound.close()
        raise UsageError(
            "the server cannot listen there", got=f"{host}:{port}: {error.strerror}", fix="choose another --port, or --host"
        ) from error
    return bound
