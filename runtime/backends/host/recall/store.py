"""The host tier of the KV cache: all of its pages, in memory or in a file that may be larger than memory.

Pages are [2, K, P, W] on the host and on the device, of rows of the same type (``plugins/kv_rows.py``). A page-head, which is
the keys and values of one KV head in one page, is two contiguous runs of P rows in both tiers and is copied without conversion.
"""

import errno
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trt_kv.errors import CapacityError, UsageError, load_option
from trt_kv.plugins.kv_rows import KvDtype
from trt_kv.plugins.paging import Ints, Rows
from trt_kv.runtime.backends.host.recall.file_kernels import read_heads
from trt_kv.runtime.cache.page_pool import PagePool


class HostTier(PagePool):
    """Pages of keys and values, stored as ``dtype``. Any thread may read and write, concurrently for different page-heads.

    Failures raise ``OSError``, which becomes a ``RecallError`` if the copy is joined.
    """

    name = "the host tier"
    how_to_enlarge = f"raise {load_option('host_tokens')}, or send shorter or fewer prompts at once"
    description = ""

    def __init__(self, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int, dtype: str = "float32") -> None:
        super().__init__(n_pages=n_pages, page_size=page_size)
        self.dtype = KvDtype(dtype)
        self.page_shape = (2, n_kv_heads, page_size, self.dtype.row_length(head_size))

    @property
    def page_bytes(self) -> int:
        return self.dtype.stored_as.itemsize * int(np.prod(self.page_shape))

    def write(self, page: int, kv_2KPW: Rows) -> None:
        """Store a page; ``kv_2KPW`` is contiguous."""
        raise NotImplementedError

    def read_head(self, page: int, head: int, into_2PW: Rows) -> None:
        """Copy a page-head to ``into_2PW``, whose halves are contiguous."""
        raise NotImplementedError

    def read_heads(self, pages_M: Ints, heads_M: Ints, into: Rows, into_pages_M: Ints) -> None:
        """Copy M page-heads: that of page ``pages_M[m]`` to page ``into_pages_M[m]`` of ``into`` [.., 2, K, P, W]."""
        for page, head, to in zip(pages_M.tolist(), heads_M.tolist(), into_pages_M.tolist(), strict=True):
            self.read_head(page, head, into[to, :, head])

    def read_pages(self, pages: Sequence[int]) -> Rows:
        """Copies of whole pages: [len(pages), 2, K, P, W]."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the storage."""


class RamTier(HostTier):
    """Pages in ordinary memory, reserved when created and committed as they are written."""

    description = "ram"

    def __init__(self, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int, dtype: str = "float32") -> None:
        super().__init__(n_pages=n_pages, page_size=page_size, n_kv_heads=n_kv_heads, head_size=head_size, dtype=dtype)
        self._kv = np.empty((n_pages, *self.page_shape), self.dtype.stored_as)

    def write(self, page: int, kv_2KPW: Rows) -> None:
        self._kv[page] = kv_2KPW

    def read_head(self, page: int, head: int, into_2PW: Rows) -> None:
        into_2PW[...] = self._kv[page, :, head]

    def read_pages(self, pages: Sequence[int]) -> Rows:
        return self._kv[np.asarray(pages, np.int64)]


class FileTier(HostTier):
    """Pages in a file that is unlinked as soon as it is open, so that any end of the process frees the disk space.

    The file is read and written by explicit calls, not through a mapping: with a mapping, a full disk or a truncated file kills
    the process (docs/decisions/0017-files-without-mappings.md). Recently used pages stay in the operating system's page cache
    either way.
    """

    def __init__(
        self, path: Path, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int, dtype: str = "float32"
    ) -> None:
        """``path``: a file that does not exist yet, or a folder. ``UsageError`` if no file can be created there,
        ``CapacityError`` if it cannot have the size of the tier.
        """
        super().__init__(n_pages=n_pages, page_size=page_size, n_kv_heads=n_kv_heads, head_size=head_size, dtype=dtype)
        self.description = f"file:{path}"
        self.file_descriptor = _nameless_file(path)
        self._n_secured = 0
        """Pages from the first on whose disk space has been obtained."""
        self._size = threading.Lock()
        self._finalizer = weakref.finalize(self, os.close, self.file_descriptor)
        try:
            os.ftruncate(self.file_descriptor, n_pages * self.page_bytes)
        except OSError as error:
            self.close()
            raise CapacityError(
                f"{path} cannot hold the host tier",
                got=f"{error.strerror} for {n_pages * self.page_bytes} bytes",
                fix=f"choose another place with {load_option('host_tier')}, or lower {load_option('host_tokens')}",
            ) from error

    def secure(self, n_pages: int) -> None:
        """Obtain the disk space of the first ``n_pages``: others may fill the disk before they are written."""
        if n_pages <= self._n_secured or not hasattr(os, "posix_fallocate"):
            return
        first, end = self._n_secured * self.page_bytes, n_pages * self.page_bytes
        try:
            os.posix_fallocate(self.file_descriptor, first, end - first)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                # The file system cannot promise space: a page that cannot be written loses its own request. Never ask again, as
                # giving space back would then cut off pages that are in use.
                self._n_secured = self.n_pages
                return
            with self._size:  # give back what has been obtained of it
                os.ftruncate(self.file_descriptor, first)
                os.ftruncate(self.file_descriptor, self.n_pages * self.page_bytes)
            raise CapacityError(
                "the disk of the host tier is full",
                got=f"{error.strerror} for {end - first} more bytes in {self.description}",
                fix=f"free space on that disk, choose another with {load_option('host_tier')}, or send less at once",
            ) from error
        self._n_secured = n_pages

    def write(self, page: int, kv_2KPW: Rows) -> None:
        self._check_whole()
        self._transfer(os.pwritev, kv_2KPW, page * self.page_bytes)

    def read_head(self, page: int, head: int, into_2PW: Rows) -> None:
        half_bytes = self.page_bytes // 2
        head_bytes = half_bytes // self.page_shape[1]
        for half in range(2):
            self._transfer(os.preadv, into_2PW[half], page * self.page_bytes + half * half_bytes + head * head_bytes)

    def read_heads(self, pages_M: Ints, heads_M: Ints, into: Rows, into_pages_M: Ints) -> None:
        """See ``HostTier.read_heads``. One call without the GIL; what it cannot read, ``read_head`` reads, or says why not."""
        done = 0
        while True:
            done += read_heads(self.file_descriptor, pages_M[done:], heads_M[done:], into, into_pages_M[done:])
            if done == len(pages_M):
                return
            head = int(heads_M[done])
            self.read_head(int(pages_M[done]), head, into[into_pages_M[done], :, head])
            done += 1

    def read_pages(self, pages: Sequence[int]) -> Rows:
        out = np.empty((len(pages), *self.page_shape), self.dtype.stored_as)
        for at, page in enumerate(pages):
            self._transfer(os.preadv, out[at], int(page) * self.page_bytes)
        return out

    def close(self) -> None:
        self._finalizer()

    def _check_whole(self) -> None:
        """``OSError`` if the file was truncated: a page written beyond its end would leave a hole that reads as zeros."""
        with self._size:
            n_bytes = os.fstat(self.file_descriptor).st_size
        if n_bytes < self.n_pages * self.page_bytes:
            raise OSError(f"the host tier's file was truncated to {n_bytes} bytes")

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], array: Rows, offset: int) -> None:
        """Read or write all of a contiguous ``array``; ``OSError`` if the file ends before it does."""
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            n_bytes = call(self.file_descriptor, [rest], offset)
            if n_bytes == 0:
                raise OSError(f"the host tier's file ends at byte {offset}, {len(rest)} bytes early")
            rest, offset = rest[n_bytes:], offset + n_bytes


def host_tier_at(
    where: str, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int, dtype: str = "float32"
) -> HostTier:
    """The tier named ``ram`` or ``file:PATH``, of rows of ``dtype`` (``KvDtype``). ``UsageError`` for any other name, or if no
    file can be created.
    """
    path = _path_of(where)
    if path is None:
        return RamTier(n_pages=n_pages, page_size=page_size, n_kv_heads=n_kv_heads, head_size=head_size, dtype=dtype)
    return FileTier(path, n_pages=n_pages, page_size=page_size, n_kv_heads=n_kv_heads, head_size=head_size, dtype=dtype)


def free_on_disk(where: str) -> int | None:
    """Free disk bytes for the file of a tier named ``where``; None for a tier in memory. Errors as for ``host_tier_at``."""
    path = _path_of(where)
    if path is None:
        return None
    try:
        return shutil.disk_usage(path if path.is_dir() else path.parent).free
    except OSError as error:
        raise _no_file(path, error) from error


def _path_of(where: str) -> Path | None:
    """The path in ``file:PATH``, or in its former name ``mmap:PATH``; None for ``ram``."""
    kind, _, path = where.partition(":")
    if where != "ram" and (kind not in ("file", "mmap") or not path):
        raise UsageError("unknown host tier", got=repr(where), expected="ram, or file:/path/of/a/new/file")
    return Path(path) if path else None


def _nameless_file(path: Path) -> int:
    """Descriptor of a new file, created at ``path``, or in it if it is a folder, and unlinked immediately."""
    try:
        if path.is_dir():
            descriptor, name = tempfile.mkstemp(dir=path, prefix=".trt-kv-")
        else:
            descriptor, name = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), os.fspath(path)
        Path(name).unlink()
    except OSError as error:
        raise _no_file(path, error) from error
    return descriptor


def _no_file(path: Path, error: OSError) -> UsageError:
    return UsageError(
        "the file of the host tier cannot be created",
        got=f"{path}: {error.strerror}",
        expected="a folder, or the path of a file that does not exist yet",
        fix="nothing was overwritten; choose another path",
    )
