"""What happens around every request: an id, the key, errors as OpenAI's objects, one line in the log."""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trt_kv.serving.http.refusals import RefusedError
from trt_kv.serving.logs import log_event

REQUEST_ID = "x-request-id"
_GUARDED = "/v1/"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Surroundings:
    """ASGI middleware. ``api_keys``: requests below /v1 must send one of them as a bearer token; none: nothing.

    A client may choose the id of its request (X-Request-Id); the answer has it in any case. The state of a request has its
    ``request_id``, and ``key_digest``, which tells its key from others; "" without keys.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = {f"Bearer {key}".encode(): hashlib.sha256(f"trt-kv key {key}".encode()).hexdigest() for key in api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "key_digest": ""}
        begin, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            if self._digests and scope["path"].startswith(_GUARDED):
                state["key_digest"] = self._digest_of(headers.get(b"authorization", b""))
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

    def _digest_of(self, given: bytes) -> str:
        """The digest of the key that is given. All are compared, so that the time does not tell which one is close."""
        found = [digest for key, digest in self._digests.items() if hmac.compare_digest(given, key)]
        if not found:
            raise RefusedError(
                401,
                "wrong or missing API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]
