"""Digests of files and documents, "sha256:<hex>"."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trt_kv.errors import TrtKvError


def check_digest(digest: str, *, error: type[TrtKvError]) -> None:
    """Raise ``error`` unless ``digest`` has the form of a digest."""
    if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise error("this is not a digest", got=repr(digest), expected="sha256: and 64 hexadecimal digits, as inspect shows it")


def digest_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 of a file as "sha256:<hex>"; ``on_bytes`` is called with the size of each block read."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return f"sha256:{sha.hexdigest()}"


def document_digest(document: Mapping[str, Any]) -> str:
    """Digest of a JSON document, independent of white space and key order."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
