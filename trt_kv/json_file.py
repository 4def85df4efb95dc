"""JSON documents on disk: read strictly into frozen dataclasses, written whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from trt_kv.errors import TrtKvError
from trt_kv.text_file import shortened

T = TypeVar("T")
ErrorType = type[TrtKvError]

PART = ".part"
"""The end of the name of a file that is being written."""
_BINARY = getattr(os, "O_BINARY", 0)
MAX_DOCUMENT_BYTES = 16 * 2**20
"""Of each document that describes an engine. Parsed, it takes up to about twenty times as much memory."""


def read_json(path: Path, *, kind: str, error: ErrorType, max_bytes: int | None = None) -> Any:
    """The parsed document at ``path``; ``error`` when it is missing, unreadable, larger than ``max_bytes`` or not JSON.

    ``kind``: what it should be.
    """
    try:
        with path.open("rb") as file:
            content = file.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(content) > max_bytes:
            raise error(f"the {kind} {path} is too large", got=f"more than {max_bytes} bytes", expected="a smaller file")
        return json.loads(content.decode())
    except FileNotFoundError as cause:
        raise error(f"there is no {kind} at this path", got=str(path), expected=f"a {kind} file") from cause
    except OSError as cause:
        raise error(f"cannot read the {kind}", got=f"{path}: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            f"the {kind} {path} is not JSON", got=str(cause), expected="a JSON document in UTF-8", fix="make the file again"
        ) from cause


def write_atomically(
    path: Path, *content: bytes, kind: str, error: ErrorType, mode: int = 0o666, is_durable: bool = True
) -> None:
    """Write the parts of ``content`` to a temporary file beside ``path``, whose name ends with ``PART``, and rename it into
    place. ``mode``: of the file, without what the user's umask excludes. ``is_durable``: wait until the disk has it; without, a
    power failure may leave a file that is not whole.

    After any failure (full disk, Ctrl-C) ``path`` holds its old content or all of the new one, and no temporary file remains,
    unless the process was killed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode), "wb") as file:
            file.writelines(content)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise error(f"cannot write the {kind}", got=f"{path}: {reason}", fix="check the folder and its free space") from cause
    finally:
        with contextlib.suppress(OSError):  # there is none, or nothing can be done about it
            temporary.unlink()


def document_text(value: Any, indent: str = "") -> str:
    """JSON text in which only containers that hold containers are broken into several lines."""
    inner = indent + "  "
    if isinstance(value, dict) and (not indent or any(_is_nested(item) for item in value.values())):
        items = [f"{inner}{json.dumps(key)}: {document_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if _is_nested(value):
        items = [inner + document_text(item, inner) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value)


def dataclass_from_json(cls: type[T], data: object, *, where: str, error: ErrorType, with_defaults: bool = False) -> T:
    """An instance of the dataclass ``cls`` from a parsed JSON object that has exactly its fields, each of its type.

    Supports str, int, float, bool, ``X | None``, ``tuple[X, ...]``, ``Literal`` and nested dataclasses; numbers must be finite,
    and bool is not accepted as a number. ``with_defaults``: fields that have a default may be missing. ``where`` names the
    object in errors, e.g. ``recipe.calibration``. Ranges are not checked here.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} is not a JSON object", got=_shown(data), expected="an object in braces")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    optional = {field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.default is not dataclasses.MISSING}
    missing = sorted(set(hints) - set(data) - (optional if with_defaults else set()))
    if missing:
        raise error(f"{where} lacks fields", got=f"missing {missing}", expected=sorted(hints), fix="make the file again")
    if unknown:
        raise error(f"{where} has unknown fields", got=unknown, expected=sorted(hints), fix="update trt-kv")
    return cls(
        **{
            name: _value(hint, data[name], f"{where}.{name}", error, with_defaults)
            for name, hint in hints.items()
            if name in data
        }
    )


def _value(hint: Any, value: object, where: str, error: ErrorType, with_defaults: bool) -> Any:
    """``value`` as the annotated type ``hint``, or ``error``."""
    if isinstance(hint, types.UnionType):
        (inner,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
        return None if value is None else _value(inner, value, where, error, with_defaults)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise error(f"{where} is not a list", got=_shown(value), expected="a list in brackets")
        item_hint = typing.get_args(hint)[0]
        return tuple(_value(item_hint, item, f"{where}[{i}]", error, with_defaults) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type[Any], hint)
        return dataclass_from_json(cls, value, where=where, error=error, with_defaults=with_defaults)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise error(f"{where} is unknown", got=_shown(value), expected=f"one of {', '.join(typing.get_args(hint))}")
        return value
    if hint is float:
        return _number(value, where, error)
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise error(f"{where} has the wrong type", got=_shown(value), expected=hint.__name__)
    return value


def _number(value: object, where: str, error: ErrorType) -> float:
    """``value`` as a finite float."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise error(f"{where} is not a number", got=_shown(value), expected="a finite number")


def _shown(value: object) -> str:
    """A value for an error message, shortened if it is long."""
    return shortened(repr(value))
