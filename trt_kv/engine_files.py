"""The files of an engine folder, compared with the manifest. The folder may come from anybody.

Digests show that files are those that the manifest lists, not who made them.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from trt_kv.beside import beside
from trt_kv.digests import digest_of
from trt_kv.errors import EngineError
from trt_kv.manifest import FILE_NAME, GRAPHS, FileRecord, Manifest
from trt_kv.safe_path import safe_join

WEIGHTS_SUFFIX = ".data"
"""Ends the names of files that hold nothing but weights."""


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Records of every file under ``folder`` except the manifest, by path relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    return {
        path.relative_to(folder).as_posix(): FileRecord(digest=digest_of(path), n_bytes=path.stat().st_size) for path in paths
    }


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ``EngineError`` for a file that is missing, has another size than was built or is not a regular file of the folder,
    and for one beside the graphs that is not listed: graphs name files of weights that the manifest does not name.
    """
    for name, record in manifest.files.items():
        path = safe_join(folder, name, error=EngineError)
        if path.stat().st_size != record.n_bytes:
            raise EngineError(
                f"{path} is not the file that was built",
                got=f"{path.stat().st_size} bytes",
                expected=f"{record.n_bytes} bytes",
                fix="build the engine again",
            )
    for path in (folder / GRAPHS).rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and not any(listed.startswith(f"{name}/") for listed in manifest.files):
            raise EngineError(f"{path} is not a file that was built", got="no digest of it", fix="remove it, or build again")


def verify_files(folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] | None = None) -> None:
    """``check_files``, then compare the digest of every file."""
    check_files(folder, manifest)
    for name in manifest.files:
        _verify_file(folder, manifest, name, on_bytes)


@contextlib.contextmanager
def verified(folder: Path, manifest: Manifest, on_progress: Callable[[int, int], None]) -> Iterator[None]:
    """``verify_files`` around a block that loads the engine. Files that are parsed are verified before it; weights, which are
    only numbers, beside it, on another thread. At the end of the block all are.

    ``on_progress`` is called on this thread with bytes (verified, total). A wrong digest is the error even if the block fails.
    """
    check_files(folder, manifest)
    total, done = sum(record.n_bytes for record in manifest.files.values()), 0
    weights = [name for name in manifest.files if name.endswith(WEIGHTS_SUFFIX)]

    def on_bytes(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        on_progress(done, total)

    def verify_weights(report: Callable[..., None]) -> None:
        for name in weights:
            _verify_file(folder, manifest, name, report)

    for name in manifest.files:
        if name not in weights:
            _verify_file(folder, manifest, name, on_bytes)
    with beside(verify_weights, on_bytes) as check:
        try:
            yield
        except Exception:
            check.result()
            raise
        check.result()


def _verify_file(folder: Path, manifest: Manifest, name: str, on_bytes: Callable[[int], None] | None) -> None:
    path, expected = safe_join(folder, name, error=EngineError), manifest.files[name].digest
    if (found := digest_of(path, on_bytes)) != expected:
        raise EngineError(f"{path} is not the file that was built", got=found, expected=expected, fix="build the engine again")
