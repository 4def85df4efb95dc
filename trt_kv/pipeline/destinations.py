"""Checks that results can be written, made before the work that they are the result of."""

import os
from pathlib import Path

from trt_kv.errors import UsageError


def check_new_file(path: Path, option: str, *, in_place: bool = False) -> None:
    """Raise ``UsageError`` unless a file can be written at ``path``, which ``option`` gives.

    It will be renamed into place, after missing folders have been made; or, ``in_place``, opened in a folder that exists, and
    then may be a device or a pipe.
    """
    if path.is_dir():
        raise UsageError(f"{option} names a folder", got=path, expected="a file")
    exists = os.path.lexists(path)
    if exists and not (in_place or path.is_file()):
        raise UsageError(f"{option} names something that is not a file", got=path, expected="a file, which will be replaced")
    if in_place and exists:
        if not os.access(path, os.W_OK):
            raise UsageError(f"the file of {option} cannot be written", got=path, expected="a file that this user may write")
    elif in_place and not path.parent.is_dir():
        raise UsageError(f"the file of {option} cannot be written", got=path, expected="a file in a folder that exists")
    else:
        check_new_folder(path.parent, option)


def check_new_folder(path: Path, option: str) -> None:
    """Raise ``UsageError`` unless a folder can be made at ``path``, or files in it if it exists."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not place.is_dir():
        raise UsageError(f"{option} cannot be written", got=f"{place}, which is not a folder", expected="a path below a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{option} cannot be written", got=f"no permission in {place}", fix=f"choose another {option}")
