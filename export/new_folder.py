"""Folders that are created atomically."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trt_kv.errors import EngineError, TrtKvError, UsageError
from trt_kv.manifest import FILE_NAME

LONGEST_WAIT_S = 60.0


def check_destination(destination: Path, *, replace: bool = False) -> None:
    """Raise ``UsageError`` if something is at ``destination`` that may not be replaced."""
    if os.path.lexists(destination) and not (replace and (destination / FILE_NAME).is_file()):
        raise UsageError(
            f"{destination} exists already" + (" and is not an engine" if replace else ""),
            fix="choose another --out" if replace else "choose another --out, or --force (make: FORCE=1) to replace an engine",
        )


@contextlib.contextmanager
def new_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder that becomes ``destination`` when the block ends, and is removed if the block fails or is interrupted.

    With ``replace`` an older engine at ``destination`` is replaced at the end of the block. Raises ``UsageError`` if something
    else is there, ``EngineError`` if the disk is full or cannot be written. A killed process leaves its hidden folder behind;
    the next process with the same destination removes it. Of several at once with the same destination, the first to end has
    it, or with ``replace`` the last.
    """
    destination = destination.absolute()
    folder = destination.with_name(f"{_prefix(destination)}{secrets.token_hex(4)}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with _alone_in(destination.parent):  # else another process could take the folder for a leftover before it is locked
                check_destination(destination, replace=replace)  # which another process may be about to replace
                _remove_leftovers(destination)
                folder.mkdir()
                with contextlib.suppress(OSError):  # some file systems have no locks; then no folder counts as a leftover
                    held.enter_context(_locked(folder))
            yield folder
            with _alone_in(destination.parent):
                check_destination(destination, replace=replace)
                _move_into_place(folder, destination)
    except OSError as error:
        raise _disk_error(destination, folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.building-"


def _remove_leftovers(destination: Path) -> None:
    """Remove the folders of killed processes. Those of running processes are locked; one that was set aside may be the only
    copy.
    """
    for leftover in destination.parent.iterdir():
        if leftover.name.startswith(_prefix(destination)) and (leftover.suffix != ".old" or destination.exists()):
            with contextlib.suppress(OSError), _locked(leftover):
                shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; ``BlockingIOError`` if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for ``folder``, at most ``LONGEST_WAIT_S``: one may have been stopped in
    the middle. On file systems without locks, do not wait.
    """
    deadline = time.monotonic() + LONGEST_WAIT_S
    with contextlib.ExitStack() as held:
        while time.monotonic() < deadline:
            try:
                held.enter_context(_locked(folder))
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield


def _move_into_place(folder: Path, destination: Path) -> None:
    """Rename ``folder``; what is at ``destination`` is moved aside meanwhile, and moved back on failure."""
    old = folder.with_name(f"{folder.name}.old")
    try:
        if os.path.lexists(destination):
            destination.rename(old)
        folder.rename(destination)
    finally:
        if os.path.lexists(old) and not os.path.lexists(destination):
            old.rename(destination)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _disk_error(destination: Path, folder: Path, error: OSError) -> TrtKvError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_nearest_existing(destination)).free
        return EngineError(
            f"the disk is full; nothing was left at {destination}",
            got=f"{free / 2**20:.0f} MiB free",
            fix="free some space or choose --out on another disk",
        )
    file = destination if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
    if not (file.is_relative_to(folder) or destination.is_relative_to(file)):
        return EngineError(f"cannot make {destination}", got=str(error), fix="check the file that it names")
    return EngineError(f"cannot write {destination}", got=str(error), fix="check the folder, or choose another --out")


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
