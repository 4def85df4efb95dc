"""What happens around every request: an id, the key, errors as OpenAI's objects, one line in the log."""

import hmac
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trt_kv.serving.http.refusals import RefusedError
from trt_kv.serving.logs import log_event

REQUEST_ID = "x-request-id"
_GUARDED = "/v1/"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Surroundings:
    """ASGI middleware. ``api_key``: what requests below /v1 must send as a bearer token; None: nothing.

    A client may choose the id of its request (X-Request-Id); the answer has it in any case.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begin, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            if self._key is not None and scope["path"].startswith(_GUARDED):
                self._check_key(headers.get(b"authorization", b""))
            await self._app(scope, receive, send_with_id)
        except RefusedError as refusal:
            await refusal.response(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001  (a bug of ours: told to the log, and to the client without details)
            log_event("internal error", level=logging.ERROR, bug=error, request_id=request_id)
            if not status:
                text = f"internal error; the server's log has it under the request id {request_id}"
                await RefusedError(500, text, code="internal_error").response(scope, receive, send_with_id)
        finally:
            seconds = round(time.monotonic() - begin, 4)
            log_event(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                seconds=seconds,
            )

    def _check_key(self, given: bytes) -> None:
        assert self._key is not None
        if not hmac.compare_digest(given, self._key):
            raise RefusedError(
                401,
                "wrong or missing API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
