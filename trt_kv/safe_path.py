"""Files of a folder that somebody else may have made: none outside it is opened, and nothing but regular files."""

import stat
from pathlib import Path

from trt_kv.errors import TrtKvError

ErrorType = type[TrtKvError]


def safe_join(folder: Path, name: str, *, error: ErrorType) -> Path:
    """The path of the regular file ``name`` in ``folder``; ``name`` is relative, with "/" between its parts.

    Raises ``error`` for a name that is absolute, has parts such as ``..`` or characters that cannot be printed; for a file that
    is missing or that a link puts outside of ``folder``; and for pipes, devices and folders, which are not opened.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise error(
            f"{folder} refers to a file by a name that is not allowed",
            got=repr(name),
            expected="a relative path inside the folder, such as graphs/weights.data",
            fix="build the engine again; if somebody gave it to you, do not trust it",
        )
    path = folder.joinpath(*parts)
    try:
        status = path.stat()
    except FileNotFoundError as cause:
        raise error(f"{path} is missing", got="no such file", fix="build the engine again") from cause
    except OSError as cause:
        raise error(f"cannot read {path}", got=cause.strerror, fix="build the engine again") from cause
    if not path.resolve().is_relative_to(folder.resolve()):
        raise error(
            f"{path} is a link out of its folder",
            got=str(path.resolve()),
            expected="a file in the folder",
            fix=f"copy the folder with the files that its links lead to: cp -rL {folder} COPY",
        )
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is not a regular file", got=stat.filemode(status.st_mode), fix="build the engine again")
    return path


def check_size(path: Path, max_bytes: int, *, error: ErrorType) -> None:
    """Raise ``error`` if the file is larger than ``max_bytes``, or cannot be read."""
    try:
        n_bytes = path.stat().st_size
    except OSError as cause:
        raise error(f"cannot read {path}", got=cause.strerror) from cause
    if n_bytes > max_bytes:
        raise error(f"{path} is too large", got=f"{n_bytes} bytes", expected=f"at most {max_bytes} bytes")
