"""OpenAI's error objects, and which error of the engine becomes which of them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from trt_kv.errors import BusyError, CapacityError, EngineError, NoTokenLeftError, TrtKvError, UsageError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_NAMES = {"max_new_tokens": "max_tokens"}
"""Names of parameters in the API, by those of ``SamplingParams``, where they differ."""


class RefusedError(Exception):
    """A request that is answered with an error: its HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.to_json(), status_code=self.status, headers=self.headers)


def refusal_of(error: TrtKvError, names: Mapping[str, str] | None = None, *, default_param: str | None = None) -> RefusedError:
    """What a client is told about an error of the engine. ``names``: parameters of the API, by those of ``SamplingParams``;
    ``default_param``: the one that is meant if the error names none.
    """
    message = str(error)
    if isinstance(error, BusyError):
        return RefusedError(503, message, code="unavailable", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, UsageError):
        param = error.parameter or default_param
        return RefusedError(400, message, param={**_NAMES, **(names or {})}.get(param or "", param), code="invalid_value")
    if isinstance(error, CapacityError):
        return RefusedError(400, message, param=default_param, code="context_length_exceeded")
    if isinstance(error, NoTokenLeftError):
        return RefusedError(400, message, code="no_token_left")
    if isinstance(error, EngineError):  # the engine was closed while the request ran
        return RefusedError(503, message, code="shutting_down", headers={"Retry-After": "1"})
    return RefusedError(500, message, code="engine_error")


def refusal_of_body(error: ValidationError) -> RefusedError:
    """What is wrong with a request's body, and in which field."""
    first = min(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
    place = [part for part in first["loc"] if isinstance(part, int) or not _is_branch(part)]
    param = ".".join(map(str, place)) or None
    if first["type"] == "extra_forbidden":
        return RefusedError(400, f"unknown parameter {param}", param=param, code="unknown_parameter")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    where = f"{param}: " if param else ""
    return RefusedError(400, f"{where}{first['msg']}{more}", param=param, code="invalid_type" if param else "invalid_json")


def _is_branch(part: str) -> bool:
    """Whether it names an alternative of a union, such as ``list[str]``, not a field."""
    return not part.isidentifier() or part in ("str", "int", "float", "bool", "dict", "list")
