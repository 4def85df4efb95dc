"""What is in a folder of prefixes, and its removal: without an engine, by what the files tell of themselves."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import UsageError
from trt_kv.runtime.prefix.block_file import About, about_of
from trt_kv.runtime.prefix.store import block_files, is_own_file

LEAST_KEY = 8
"""Digits by which a prefix can be named."""
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class KeptPrefix:
    """The longest that is kept of a prompt. ``key``: of its last block, 64 hexadecimal digits. ``engine``: the digest of the
    engine that it is of; ``policy``: its policy's name. ``tokens``: from the prompt's beginning. ``n_bytes``: of all its files,
    ``own_bytes`` of those that no other prefix begins with. ``used``: when an engine last read or wrote its end, in seconds
    since 1970. ``is_whole``: whether its beginning is there; if not, nothing finds it.
    """

    key: str
    engine: str
    policy: str
    tokens: int
    n_bytes: int
    own_bytes: int
    used: float
    is_whole: bool


@dataclass(frozen=True, kw_only=True)
class PrefixFolder:
    """``prefixes``: the last used one first; ``others``: files that are none of this version, or are damaged or another user's,
    with ``other_bytes``. ``n_bytes``: of all files.
    """

    prefixes: tuple[KeptPrefix, ...]
    others: tuple[Path, ...]
    other_bytes: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    n_bytes: int
    used: float
    about: About


def prefix_folder(folder: Path) -> PrefixFolder:
    """What is in a folder. Digests of files are not checked: an engine does that when it reads one. ``UsageError`` if there is
    no such folder, or it cannot be read.
    """
    files, others, other_bytes = _files(folder)
    ends = set(files) - {file.about.after for file in files.values()}
    chains = {key: _chain(files, key) for key in ends}
    n_users = Counter(itertools.chain.from_iterable(chains.values()))
    prefixes = []
    for key, chain in chains.items():
        last, first = files[key], files[chain[-1]]
        prefixes.append(
            KeptPrefix(
                key=key,
                engine=last.about.engine,
                policy=last.about.policy,
                tokens=last.about.tokens,
                n_bytes=sum(files[one].n_bytes for one in chain),
                own_bytes=sum(files[one].n_bytes for one in chain if n_users[one] == 1),
                used=last.used,
                is_whole=not first.about.after,
            )
        )
    return PrefixFolder(
        prefixes=tuple(sorted(prefixes, key=lambda one: (-one.used, one.key))),
        others=tuple(others),
        other_bytes=other_bytes,
        n_bytes=other_bytes + sum(file.n_bytes for file in files.values()),
    )


def chosen(found: Sequence[KeptPrefix], keys: Sequence[str]) -> list[KeptPrefix]:
    """The prefixes whose keys begin with ``keys``. ``UsageError`` if one names none, or several."""
    named = []
    for key in keys:
        if len(key) < LEAST_KEY:
            raise UsageError(
                "the key of a prefix is too short", got=repr(key), expected=f"its first {LEAST_KEY} digits or more"
            )
        fitting = [one for one in found if one.key.startswith(key.lower())]
        if len(fitting) != 1:
            raise UsageError(
                f"there is {'no' if not fitting else 'more than one'} prefix with this key",
                got=repr(key),
                expected="a key that trt-kv prefix list shows",
                fix="give more of its digits" if fitting else "look at the list again: somebody may have removed it",
            )
        named += fitting
    return list(dict.fromkeys(named))


def remove(folder: Path, prefixes: Sequence[KeptPrefix] | None) -> int:
    """Delete the files of prefixes, except those that other prefixes begin with; None: all files of blocks, whatever is in
    them. Returns their bytes. Engines that use the folder go on: they read again what is gone. ``UsageError`` if one cannot be
    deleted.
    """
    files, others, _ = _files(folder)
    doomed = set(files)
    if prefixes is not None:
        others, going = [], {one.key for one in prefixes}
        staying_ends = doomed - {file.about.after for file in files.values()} - going
        staying = {key for end in staying_ends for key in _chain(files, end)}
        doomed = {key for end in going for key in _chain(files, end)} - staying
    # Ends first, so that an interruption leaves nothing without its beginning.
    n_bytes = 0
    for path in [*(files[key].path for key in sorted(doomed, key=lambda key: -files[key].about.tokens)), *others]:
        try:
            size = path.lstat().st_size
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError("a file cannot be deleted", got=f"{path}: {error.strerror}", fix="check the folder") from error
        n_bytes += size
    return n_bytes


def _files(folder: Path) -> tuple[dict[str, _File], list[Path], int]:
    """The files of blocks by key; others, and their bytes."""
    if not folder.is_dir():
        raise UsageError("there is no folder of prefixes", got=str(folder), expected="what --prefix-store named")
    try:
        listed = block_files(folder)
    except OSError as error:
        raise UsageError("the folder of prefixes cannot be read", got=f"{folder}: {error.strerror}") from error
    files, others, other_bytes = {}, [], 0
    for used_ns, n_bytes, path in listed:
        about = _about(path) if _KEY.fullmatch(path.stem) else None
        if about is None:
            others.append(path)
            other_bytes += n_bytes
        else:
            files[path.stem] = _File(path=path, n_bytes=n_bytes, used=used_ns / 1e9, about=about)
    return files, others, other_bytes


def _about(path: Path) -> About | None:
    """What a file of this user tells of itself."""
    try:
        return about_of(path) if is_own_file(path.lstat()) else None
    except OSError:
        return None


def _chain(files: Mapping[str, _File], end: str) -> list[str]:
    """The keys of a prefix from its last block back to the first one that is there."""
    chain: dict[str, None] = {}
    key = end
    while key in files and key not in chain:  # what a file says is not known to be true
        chain[key] = None
        key = files[key].about.after
    return list(chain)
