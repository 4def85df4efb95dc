"""The start of every checkpoint's digest."""

import hashlib
import json
from typing import TYPE_CHECKING

from trt_kv.model_config import ModelConfig

if TYPE_CHECKING:
    from hashlib import _Hash

_NOT_ARITHMETIC = ("bos_token_id", "eos_token_ids", "max_positions")


def digest_of_arithmetic(config: ModelConfig) -> "_Hash":
    """A SHA-256 over what changes results, to be continued with the weights: not which tokens begin and end a text, and not how
    long a context may be.
    """
    fields = {key: value for key, value in config.to_json().items() if key not in _NOT_ARITHMETIC}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
