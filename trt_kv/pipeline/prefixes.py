"""What folders of prefixes hold (``prefix_store`` of ``Engine.load``), and its removal."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import UsageError

if TYPE_CHECKING:
    from trt_kv.runtime.prefix.kept import PrefixFolder


@dataclass(frozen=True, kw_only=True)
class PrefixRemoval:
    """What to remove from ``folder``: the prefixes whose keys begin with ``keys``, or all of an ``engine``, given by its digest
    or the beginning of it, or ``everything``.
    """

    folder: Path
    keys: tuple[str, ...] = ()
    everything: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        if bool(self.keys) == (self.everything or self.engine is not None):
            raise UsageError(
                "what to remove is not clear",
                got="keys, and all of an engine" if self.keys else "no key",
                expected="keys that trt-kv prefix list shows, or all prefixes, of one engine or of any",
                fix="name keys, or give --all or --engine",
            )


def list_prefixes(folder: Path, *, engine: str | None = None) -> "PrefixFolder":
    """What a folder of prefixes holds, of ``engine`` alone if its digest, or the beginning of it, is given. ``UsageError`` if
    there is no such folder.

    Example::

        from trt_kv.pipeline import list_prefixes

        for one in list_prefixes(Path("prefixes")).prefixes:
            print(one.key, one.tokens, one.policy)
    """
    import dataclasses

    from trt_kv.runtime.prefix.kept import prefix_folder

    found = prefix_folder(folder.expanduser())
    of_engine = tuple(one for one in found.prefixes if engine is None or one.engine.startswith(_digest(engine)))
    return dataclasses.replace(found, prefixes=of_engine)


def remove_prefixes(request: PrefixRemoval) -> tuple[int, int]:
    """Remove prefixes; returns how many, and the bytes that are free now. What other prefixes begin with stays. With everything
    of any engine, files that are no prefixes of this version go too. ``UsageError`` if a key names none, or several.

    Example::

        from trt_kv.pipeline import PrefixRemoval, remove_prefixes

        remove_prefixes(PrefixRemoval(folder=Path("prefixes"), everything=True))
    """
    from trt_kv.runtime.prefix.kept import chosen, remove

    folder = request.folder.expanduser()
    found = list_prefixes(folder, engine=request.engine).prefixes
    prefixes = chosen(found, request.keys) if request.keys else found
    is_all = request.everything and request.engine is None
    return len(prefixes), remove(folder, None if is_all else prefixes)


def _digest(engine: str) -> str:
    """A digest with the name of its algorithm in front."""
    return engine if engine.startswith("sha256:") else f"sha256:{engine}"
