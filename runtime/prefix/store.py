"""Files of prefix blocks, which outlive the engine: one per block, named by its key.

A file is ``_MAGIC``, the SHA-256 digest of the rest, and the block in the format of safetensors. It is written beside its
place and renamed, so a file is whole or not there. A file that cannot be read, or is not what it was, is a block that is not
there.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from trt_kv.errors import UsageError, load_option
from trt_kv.runtime.cache.blocks import Block

_MAGIC = b"trt-kv prefix 1\n"
_SUFFIX = ".prefix"
_DIGEST_BYTES = hashlib.sha256().digest_size
_ABANDONED_S = 3600.0
"""Age in seconds of a file that is not complete, by which its process must have been killed."""

_log = logging.getLogger(__name__)


class PrefixStore:
    """Blocks in the folder ``path``, which several engines and processes may share: keys tell their blocks apart."""

    def __init__(self, path: Path, *, capacity_bytes: int | None = None) -> None:
        """``capacity_bytes``: least recently used files are deleted beyond it; None: no limit but the disk. ``UsageError`` if
        no file can be written.
        """
        self.capacity_bytes = capacity_bytes
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UsageError(
                "the prefix store cannot be written",
                got=f"{path}: {error.strerror}",
                expected="a folder, or the path of a new one",
                fix=f"choose another with {load_option('prefix_store')}",
            ) from error
        for left in path.glob("*.part"):
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - _ABANDONED_S:
                    left.unlink()

    def get(self, key: bytes) -> Block | None:
        """The block of a key; None, with a warning if its file is damaged, if there is none."""
        file = self._file(key)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("prefix store: %s cannot be read: %s", file, error.strerror)
            return None
        body = memoryview(data)[len(_MAGIC) + _DIGEST_BYTES :]
        if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]:
            _log.warning("prefix store: %s is damaged, so its tokens are read again", file)
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        block: dict[str, np.ndarray] = safetensors.numpy.load(bytes(body))
        return block

    def put(self, key: bytes, block: Block) -> None:
        """Write a block, unless it is there. What cannot be written is left out, with a warning."""
        file = self._file(key)
        if file.exists():
            return
        body = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in block.items()})
        part = ""
        try:
            self._make_room(len(body))
            descriptor, part = tempfile.mkstemp(dir=self._path, suffix=".part")
            with os.fdopen(descriptor, "wb") as out:
                out.write(_MAGIC + hashlib.sha256(body).digest())
                out.write(body)
            Path(part).replace(file)
        except OSError as error:
            _log.warning("prefix store: %s cannot be written: %s", file, error.strerror)
            with contextlib.suppress(OSError):
                Path(part).unlink(missing_ok=True)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks, of whatever engine."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of the file of every block."""
        found = []
        for file in self._path.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        return found

    def _make_room(self, n_bytes: int) -> None:
        """Delete the least recently used files until ``n_bytes`` more fit."""
        if self.capacity_bytes is None:
            return
        over = self.used_bytes + n_bytes - self.capacity_bytes
        for _, size, file in sorted(self._files()):
            if over <= 0:
                return
            file.unlink(missing_ok=True)
            over -= size

    def _file(self, key: bytes) -> Path:
        return self._path / f"{key.hex()}{_SUFFIX}"
