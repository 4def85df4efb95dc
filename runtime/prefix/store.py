"""Files of prefix blocks, which outlive the engine: one per block, named by its key (block_file.py has the format).

A file is written beside its place and renamed, so it is whole or not there, even if the process is killed; after a power
failure its digest tells that it is not whole, so nobody waits for the disk. A file that cannot be read, or is not what was
written under its key by the same user, is a block that is not there: others may be able to put files into the folder, and what
is in them would decide answers.
"""

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trt_kv.errors import UsageError, load_option
from trt_kv.json_file import PART, write_atomically
from trt_kv.runtime.cache.blocks import Block
from trt_kv.runtime.prefix.block_file import SUFFIX, About, decoded, encoded, file_name

_ABANDONED_S = 3600.0
"""Age in seconds of a file that is not complete, by which its process must have been killed."""

_RELISTED_SHARE = 16
"""The folder is listed again when one of so many parts of the room that was found has been used: others write there too."""
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags for opening a file without waiting for who writes to it, if it is a pipe."""

_log = logging.getLogger(__name__)


class PrefixStore:
    """Blocks in the folder ``path``, which several engines and processes may share: keys tell their blocks apart."""

    def __init__(self, path: Path, *, capacity_bytes: int | None = None) -> None:
        """``capacity_bytes``: least recently used files are deleted beyond it; None: no limit but the disk. ``UsageError`` if
        no file can be written. Nobody but the user can read a folder that this creates, or its files.
        """
        self.capacity_bytes = capacity_bytes
        self._path = path
        self._room = 0
        """Bytes that may be written before the folder is listed again."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path, suffix=PART):
                pass
        except OSError as error:
            raise UsageError(
                "the prefix store cannot be written",
                got=f"{path}: {error.strerror}",
                expected="a folder, or the path of a new one",
                fix=f"choose another with {load_option('prefix_store')}",
            ) from error
        for left in path.glob(f"*{PART}"):
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - _ABANDONED_S:
                    left.unlink()

    def get(self, key: bytes, accepts: Callable[[Block], bool] = lambda _: True) -> Block | None:
        """The block of a key; None if there is none, or, with a warning, if its file is damaged, is another user's, or holds
        what ``accepts`` refuses. Such a file is deleted.
        """
        file = self._file(key)
        try:
            data, is_own = _read(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("prefix store: %s cannot be read, so its tokens are read again: %s", file, error.strerror)
            return None
        block = decoded(key, data) if is_own else None
        if block is None or not accepts(block):
            _log.warning(
                "prefix store: %s is %s, so its tokens are read again",
                file,
                "damaged" if is_own else "another user's, or no file",
            )
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        return block

    def put(self, key: bytes, block: Block, about: About) -> None:
        """Write a block, unless it is there. What cannot be written is left out, with a warning."""
        if key in self:
            return
        file = self._file(key)
        try:
            content = encoded(key, block, about)
            if self._make_room(sum(map(len, content))):
                write_atomically(file, *content, kind="prefix", error=UsageError, mode=0o600, is_durable=False)
        except (OSError, UsageError, MemoryError) as error:
            _log.warning("prefix store: %s cannot be written, so its tokens will be read again: %s", file, error)

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a file for a key, whatever is in it."""
        return self._file(key).exists()

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make the files of a prefix the last to be deleted, its first block last of all."""
        now = time.time_ns()
        for at, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self._file(key), ns=(now - at, now - at))

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks, of whatever engine."""
        return sum(size for _, size, _ in block_files(self._path))

    def _make_room(self, n_bytes: int) -> bool:
        """Delete the least recently used files until ``n_bytes`` more fit; False if they never do."""
        if self.capacity_bytes is None:
            return True
        if n_bytes > self.capacity_bytes:
            return False
        if n_bytes <= self._room:
            self._room -= n_bytes
            return True
        files = sorted(block_files(self._path))
        over = sum(size for _, size, _ in files) + n_bytes - self.capacity_bytes
        for _, size, file in files:
            if over <= 0:
                break
            file.unlink(missing_ok=True)
            over -= size
        self._room = -over // _RELISTED_SHARE
        return True

    def _file(self, key: bytes) -> Path:
        return self._path / file_name(key)


def is_own_file(status: os.stat_result) -> bool:
    """Whether it is a regular file, of this user."""
    is_own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return is_own and stat.S_ISREG(status.st_mode)


def _read(file: Path) -> tuple[bytes, bool]:
    """What a file holds, and whether it is a regular one and belongs to the user of this process, where the system tells."""
    descriptor = os.open(file, os.O_RDONLY | _AT_ONCE)
    try:
        status = os.fstat(descriptor)
        if not is_own_file(status):
            return b"", False
        with os.fdopen(descriptor, "rb", closefd=False) as opened:
            return opened.read(), True
    finally:
        os.close(descriptor)


def block_files(folder: Path) -> list[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of the file of every block in a folder."""
    found = []
    for file in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            status = file.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, status.st_size, file))
    return found
