"""The format of a prefix block in a file, named by its key.

A file is ``MAGIC``, the SHA-256 digest of the key and the rest, the length of a JSON document in 4 bytes, the document, which
tells what the block is of (``About``), and the block in the format of numpy (npz). The digest ties all of it to the key.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.json_file import dataclass_from_json
from trt_kv.runtime.cache.blocks import Block

SUFFIX = ".prefix"
MAGIC = b"trt-kv prefix 2\n"
HEAD_BYTES = len(MAGIC) + hashlib.sha256().digest_size
_LENGTH_BYTES = 4
_MOST_ABOUT_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class About:
    """What a block is of, for who looks into a folder. ``engine``: its digest; ``tokens``: of the prompt, up to the end of the
    block, of which the block has ``own_tokens``; ``after``: the key of the block before it, in hex; "" for the first one.
    """

    engine: str
    policy: str
    tokens: int
    own_tokens: int
    after: str = ""


def file_name(key: bytes) -> str:
    """The name of a block's file."""
    return f"{key.hex()}{SUFFIX}"


def encoded(key: bytes, block: Block, about: About) -> tuple[bytes, bytes]:
    """The content of a file: its head, and the rest."""
    text = json.dumps(dataclasses.asdict(about)).encode()
    written = io.BytesIO()
    written.write(len(text).to_bytes(_LENGTH_BYTES, "big") + text)
    arrays: dict[str, Any] = dict(block)
    np.savez(written, **arrays)
    body = written.getvalue()
    return MAGIC + digest(key, body), body


def decoded(key: bytes, data: bytes) -> Block | None:
    """The block that a file holds; None if it is not what was written under ``key``."""
    head, body = data[:HEAD_BYTES], data[HEAD_BYTES:]
    if head != MAGIC + digest(key, body):
        return None
    begin = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    try:
        with np.load(io.BytesIO(body[begin:]), allow_pickle=False) as stored:
            return dict(stored)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
        return None


def about_of(path: Path) -> About | None:
    """What a file says that it is of, without reading, or verifying, its block; None if it says nothing. ``OSError`` if it
    cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "big")
        text = file.read(length) if length <= _MOST_ABOUT_BYTES else b""
    if not head.startswith(MAGIC):
        return None
    try:
        return dataclass_from_json(About, json.loads(text), where="the block", error=UsageError)
    except (ValueError, RecursionError, UsageError):
        return None


def digest(key: bytes, body: bytes) -> bytes:
    """The digest in a file's head."""
    found = hashlib.sha256(key)
    found.update(body)
    return found.digest()
