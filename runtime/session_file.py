"""Files of conversations: tokens and messages, and in mode "compressed" what was kept.

A file is ``_MAGIC``, the SHA-256 digest of the rest, the length of a JSON document in 8 bytes, the document, and the arrays of
the state in the format of numpy (npz). It is written beside its place and renamed.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.chat.messages import Message
from trt_kv.errors import UsageError
from trt_kv.json_file import write_atomically
from trt_kv.runtime.cache.states import SequenceState

_MAGIC = b"trt-kv session 1\n"
_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SavedSession:
    """What a file holds; fields as in ``Session``."""

    mode: str
    messages: Sequence[Message]
    token_ids: Sequence[int]
    state: SequenceState | None


def write_session(path: Path, saved: SavedSession, fingerprint: Mapping[str, Any]) -> None:
    """Write a conversation of the engine that ``fingerprint`` tells; ``UsageError`` if that fails."""
    state = saved.state
    document = {
        "mode": saved.mode,
        "messages": list(saved.messages),
        "token_ids": list(saved.token_ids),
        "of": dict(fingerprint),
        "state": None
        if state is None
        else {"num_computed_tokens": state.num_computed_tokens, "n_prompt": state.n_prompt, "kv_len": list(state.kv_len)},
    }
    text = json.dumps(document, ensure_ascii=False).encode()
    written = io.BytesIO()
    arrays: dict[str, Any] = {} if state is None else dict(state.arrays)
    np.savez(written, **arrays)
    body = b"".join((len(text).to_bytes(_LENGTH_BYTES, "big"), text, written.getvalue()))
    content = b"".join((_MAGIC, hashlib.sha256(body).digest(), body))
    write_atomically(path, content, kind="session", error=UsageError, mode=0o600)


def read_session(path: Path, fingerprint: Mapping[str, Any]) -> SavedSession:
    """What ``write_session`` wrote; ``UsageError`` for a file that is none, is damaged, or is of another engine."""
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise UsageError("cannot read the session", got=f"{path}: {cause.strerror or cause}") from cause
    if not data.startswith(_MAGIC):
        raise UsageError("this is no session of this version", got=str(path), expected="a file that a session was saved to")
    body = data[len(_MAGIC) + hashlib.sha256().digest_size :]
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : len(data) - len(body)]:
        raise UsageError("the session is damaged", got=f"{path}: its digest is another", fix="use a copy of it")
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    document = json.loads(body[_LENGTH_BYTES:end])
    for name, expected in fingerprint.items():
        if document["of"][name] != expected:
            raise UsageError(
                "the session is of another engine, or of a cache of another type",
                got=f"{name} {document['of'][name]}",
                expected=expected,
                fix="load the engine that it was saved with, with the same kv_dtype",
            )
    kept, state = document["state"], None
    if kept is not None:
        with np.load(io.BytesIO(body[end:]), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        state = SequenceState(
            num_computed_tokens=kept["num_computed_tokens"],
            n_prompt=kept["n_prompt"],
            kv_len=tuple(kept["kv_len"]),
            arrays=arrays,
        )
    return SavedSession(mode=document["mode"], messages=document["messages"], token_ids=document["token_ids"], state=state)
