"""Files of conversations: tokens and messages, and in mode "compressed" what was kept.

A file is ``_MAGIC``, the SHA-256 digest of the rest, the length of a JSON document in 8 bytes, the document, and the arrays of
the state in the format of numpy (npz). It is written beside its place and renamed.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.chat.messages import Message
from trt_kv.errors import UsageError
from trt_kv.json_file import write_atomically
from trt_kv.runtime.arguments import is_integer
from trt_kv.runtime.cache.states import SequenceState

_MAGIC = b"trt-kv session 1\n"
_LENGTH_BYTES = 8
MODES = ("exact", "compressed")


@dataclass(frozen=True, kw_only=True)
class SavedSession:
    """What a conversation consists of, and a file holds; fields as in ``Session``. ``state``: what was kept, if anything."""

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
    content = (_MAGIC, hashlib.sha256(body).digest(), body)
    write_atomically(path, *content, kind="session", error=UsageError, mode=0o600)


def read_session(path: Path, fingerprint: Mapping[str, Any], *, vocab_size: int) -> SavedSession:
    """What ``write_session`` wrote; ``UsageError`` for a file that is none, is damaged, or is of another engine, whose tokens
    are below ``vocab_size``. Whether the state fits the engine's cache is for ``SequenceStates.check``.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise UsageError("cannot read the session", got=f"{path}: {cause.strerror or cause}") from cause
    if not data.startswith(_MAGIC):
        raise UsageError("this is no session of this version", got=str(path), expected="a file that a session was saved to")
    body = data[len(_MAGIC) + hashlib.sha256().digest_size :]
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : len(data) - len(body)]:
        raise UsageError("the session is damaged", got=f"{path}: its digest is another", fix="use a copy of it")
    try:  # a right digest does not tell who wrote it
        return _parsed(body, fingerprint, vocab_size)
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile) as cause:
        raise UsageError(
            "the session is damaged", got=f"{path}: {type(cause).__name__}: {cause}", expected="what a session wrote"
        ) from cause


def _parsed(body: bytes, fingerprint: Mapping[str, Any], vocab_size: int) -> SavedSession:
    """The conversation in a file behind its digest. ``UsageError`` if it is of another engine; other errors if it is none."""
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
    mode, messages, token_ids, kept = (document[name] for name in ("mode", "messages", "token_ids", "state"))
    _check(mode in MODES, f"mode {mode!r}")
    _check(isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages), "messages")
    _check(isinstance(token_ids, list) and all(is_integer(token, 0) and token < vocab_size for token in token_ids), "tokens")
    _check(kept is None or mode == "compressed", "a state of mode exact")
    state = None if kept is None else _state(kept, body[end:], n_tokens=len(token_ids))
    return SavedSession(mode=mode, messages=messages, token_ids=token_ids, state=state)


def _state(kept: Mapping[str, Any], arrays: bytes, *, n_tokens: int) -> SequenceState:
    n_computed, n_prompt, kv_len = kept["num_computed_tokens"], kept["n_prompt"], tuple(kept["kv_len"])
    _check(all(is_integer(number, 0) for number in (n_computed, n_prompt, *kv_len)), "lengths")
    _check(0 < n_computed <= n_tokens, f"state of {n_computed} of {n_tokens} tokens")
    with np.load(io.BytesIO(arrays), allow_pickle=False) as stored:
        return SequenceState(
            num_computed_tokens=n_computed,
            n_prompt=n_prompt,
            kv_len=kv_len,
            arrays={name: stored[name] for name in stored.files},
        )


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise ValueError(f"bad {what}")
