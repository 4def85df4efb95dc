"""What the endpoints of a server share, and how they read bodies."""

import time
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.serving.admission import Admission
from trt_kv.serving.http.bodies import Body
from trt_kv.serving.http.refusals import RefusedError, refusal_of_body
from trt_kv.serving.http.sessions import Sessions
from trt_kv.serving.http.settings import ServerSettings

AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One engine behind one server."""

    engine: AsyncEngine
    settings: ServerSettings
    admission: Admission
    sessions: Sessions
    created: int = field(default_factory=lambda: int(time.time()))

    async def body(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        """The body of a request, checked; ``RefusedError`` names the field that is wrong."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "the body is not JSON: send Content-Type: application/json", code="unsupported_media_type")
        try:
            return kind.model_validate_json(await self._bytes(request))
        except ValidationError as error:
            raise refusal_of_body(error) from error

    def check_model(self, name: str | None) -> None:
        """``RefusedError`` unless ``name`` is this engine's, or no name is given."""
        if name is not None and name != self.settings.model_name:
            text = f"the model {name[:200]!r} is not served here: expected {self.settings.model_name!r}"
            raise RefusedError(404, text, param="model", code="model_not_found")

    def check_prompt(self, n_tokens: int, *, param: str) -> None:
        """``RefusedError`` for a prompt that is longer than this server takes."""
        most = self.settings.max_prompt_tokens
        if most is not None and n_tokens > most:
            text = f"the prompt is too long: {n_tokens} tokens, expected at most {most}"
            raise RefusedError(400, text, param=param, code="context_length_exceeded")

    async def _bytes(self, request: Request) -> bytes:
        most = self.settings.max_body_bytes
        too_large = RefusedError(413, f"the body is too large: expected at most {most} bytes", code="request_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        parts, n_bytes = [], 0
        async for part in request.stream():
            parts.append(part)
            n_bytes += len(part)
            if n_bytes > most:
                raise too_large
        return b"".join(parts)
