"""What an HTTP server listens on, admits and tells."""

from dataclasses import dataclass

from trt_kv.errors import UsageError

MAX_NEW_TOKENS = 1024
"""Of answers in a chat that give no limit; they end by themselves."""
MAX_COMPLETION_TOKENS = 16
"""Of completions that give no limit, as OpenAI has it."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """``api_key``: what clients send as a bearer token; None: anybody may ask. ``max_queue``: requests that may wait to be
    started. ``max_body_bytes`` of a request, ``max_prompt_tokens`` of each prompt (None: what the engine serves).
    ``max_new_tokens``: the limit of answers that give none. ``drain_seconds``: how long requests may go on after the server was
    told to stop. ``log_prompts``: the log shows prompts and answers too.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 256
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    drain_seconds: int = 30
    log_prompts: bool = False

    @property
    def is_open(self) -> bool:
        """Whether other machines can use the model without a key."""
        return self.api_key is None and self.host not in ("127.0.0.1", "::1", "localhost")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UsageError("bad port", got=self.port, expected="0 (any that is free) .. 65535", parameter="port")
        for name, least in (("max_queue", 1), ("max_body_bytes", 1), ("max_new_tokens", 1), ("drain_seconds", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"bad {name}", got=getattr(self, name), expected=f"an integer >= {least}", parameter=name)
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise UsageError("bad api_key", got="no visible ASCII character", expected="a key", parameter="api_key")
        if not self.model_name.strip():
            raise UsageError("the model has no name", expected="a name for clients", parameter="model_name")
