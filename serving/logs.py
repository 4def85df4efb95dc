"""Structured logs: one JSON object per line, with the id of the request and without its text."""

import json
import logging
from datetime import UTC, datetime
from typing import IO, Any

from trt_kv.runtime.request import Request

LOGGER = logging.getLogger("trt_kv.serving")


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, event, the fields given to ``log_event``, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_event(event: str, *, level: int = logging.INFO, bug: BaseException | None = None, **fields: Any) -> None:
    """Log an event. Fields that are None are left out; ``bug``: an error whose traceback is wanted."""
    given = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, event, extra={"fields": given}, exc_info=bug)


def log_generated(sample: Request, *, request_id: str | None, **texts: Any) -> None:
    """Log the end of a sample: its sizes and times. ``texts``: its texts, if a server was told to log them."""
    result = sample.result()
    first_s = result.times.to_first_token_s
    log_event(
        "generated",
        request_id=request_id,
        prompt_tokens=result.n_prompt_tokens,
        cached_tokens=result.n_cached_tokens,
        generated_tokens=len(result.token_ids),
        finish_reason=result.finish_reason if sample.is_finished else "cancelled",
        error=None if sample.error is None else type(sample.error).__name__,
        first_token_s=None if first_s is None else round(first_s, 4),
        **texts,
    )


def log_to(stream: IO[str]) -> None:
    """Write the logs of this package, and warnings of the HTTP library, to ``stream``. For programs, not for libraries."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in ((LOGGER.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
