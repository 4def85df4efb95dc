"""What an HTTP server listens on, admits and tells."""

import re
from dataclasses import dataclass

from trt_kv.errors import UsageError

MAX_NEW_TOKENS = 1024
"""Of answers in a chat that give no limit; they end by themselves."""
MAX_COMPLETION_TOKENS = 16
"""Of completions that give no limit, as OpenAI has it."""

_SESSIONS = (("max_sessions", 1), ("session_bytes", 0), ("session_seconds", 1))


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """``api_keys``: clients send one of them as a bearer token; none: anybody may ask. ``max_queue``: requests that may wait to
    be started. ``max_body_bytes`` of a request, ``max_prompt_tokens`` of each prompt (None: what the engine serves).
    ``max_new_tokens``: the limit of answers that give none. ``drain_seconds``: how long requests may go on after the server was
    told to stop. ``max_sessions``, ``session_bytes``: conversations that are remembered, and their memory; ``session_seconds``:
    for how long after their last turn. ``log_prompts``: the log shows prompts and answers too.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    drain_seconds: int = 30
    max_sessions: int = 256
    session_bytes: int = 2**30
    session_seconds: int = 3600
    log_prompts: bool = False

    @property
    def is_open(self) -> bool:
        """Whether other machines can use the model without a key."""
        return not self.api_keys and self.host not in ("127.0.0.1", "::1", "localhost")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UsageError("bad port", got=self.port, expected="0 (any that is free) .. 65535", parameter="port")
        for name, least in (("max_queue", 1), ("max_body_bytes", 1), ("max_new_tokens", 1), ("drain_seconds", 0), *_SESSIONS):
            if getattr(self, name) < least:
                raise UsageError(f"bad {name}", got=getattr(self, name), expected=f"an integer >= {least}", parameter=name)
        if any(not re.fullmatch(r"[!-~]+", key) for key in self.api_keys):
            raise UsageError(
                "bad api_key", got="spaces, or other characters", expected="visible ASCII characters only", parameter="api_key"
            )
        if not self.model_name.strip():
            raise UsageError("the model has no name", expected="a name for clients", parameter="model_name")
