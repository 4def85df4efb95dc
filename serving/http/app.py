"""The application: which function answers which path."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.serving.admission import Admission
from trt_kv.serving.http import endpoints, generating
from trt_kv.serving.http.context import Context
from trt_kv.serving.http.middleware import Surroundings
from trt_kv.serving.http.refusals import RefusedError
from trt_kv.serving.http.sessions import Sessions
from trt_kv.serving.http.settings import ServerSettings

Endpoint = Callable[[Context, Request], Awaitable[Response]]
_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/chat/completions", generating.chat),
    ("POST", "/v1/completions", generating.complete),
    ("GET", "/v1/models", endpoints.models),
    ("GET", "/v1/models/{name:path}", endpoints.model),
    ("POST", "/v1/tokenize", endpoints.tokenize),
    ("POST", "/v1/detokenize", endpoints.detokenize),
    ("GET", "/health", endpoints.health),
    ("GET", "/ready", endpoints.ready),
    ("GET", "/metrics", endpoints.metrics),
    ("GET", "/", endpoints.page),
)


def make_app(engine: AsyncEngine, settings: ServerSettings) -> Starlette:
    """The ASGI application of an engine, which it closes at the end of its life span."""
    admission = Admission(engine.engine.core.statistics, max_queue=settings.max_queue)
    sessions = Sessions(engine, settings)
    context = Context(engine=engine, settings=settings, admission=admission, sessions=sessions)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.close()

    app = Starlette(
        routes=[Route(path, _bound(context, endpoint), methods=[method]) for method, path, endpoint in _ROUTES],
        exception_handlers={RefusedError: _refuse, HTTPException: _refuse_path, ClientDisconnect: _ignore},
        middleware=[Middleware(Surroundings, api_keys=settings.api_keys)],
        lifespan=life,
    )
    app.state.context = context
    return app


def _bound(context: Context, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await endpoint(context, request)

    return answer


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error.response


async def _refuse_path(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return RefusedError(error.status_code, text, code="not_found", headers=error.headers).response


async def _ignore(request: Request, error: Exception) -> Response:
    return generating.GONE
