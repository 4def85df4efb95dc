"""Storage of a report's partial measurements, so that an interrupted run can be resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trt_kv.errors import ReportError
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically

T = TypeVar("T")
FORMAT = "trt-kv-report-part"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Store:
    """Parts of a report, a JSON file each in ``folder``, measured under the same ``conditions``.

    ``conditions``: everything that determines the measurements (settings, seeds, versions, the model's digest), as JSON values.
    A part that was measured under other conditions is measured again.
    """

    folder: Path
    conditions: dict[str, Any]

    def get_or_measure(self, name: str, part_of: type[T], measure: Callable[[], T], **more_conditions: Any) -> T:
        """The part called ``name``, a dataclass of the type ``part_of``: read back, or measured and stored. Fields that have a
        default may be missing in a stored part.

        ``more_conditions`` are those of this part alone. ``ReportError`` if the folder cannot be written to.
        """
        found = self._read(name, {**self.conditions, **more_conditions})
        if found is not None:
            return dataclass_from_json(part_of, found, where=name, error=ReportError, with_defaults=True)
        part = measure()
        self._write(name, dataclasses.asdict(part), {**self.conditions, **more_conditions})  # type: ignore[call-overload]
        return part

    def rows(self, name: str, row_of: type[T], **more_conditions: Any) -> dict[str, T]:
        """What ``put_rows`` stored, by key; empty if there is nothing."""
        found = self._read(name, {**self.conditions, **more_conditions}) or {}
        return {key: dataclass_from_json(row_of, row, where=f"{name}: {key}", error=ReportError) for key, row in found.items()}

    def put_rows(self, name: str, rows: Mapping[str, T], **more_conditions: Any) -> None:
        """Store a part of several rows, dataclasses by key, so that one more need not be measured with the others again."""
        part = {key: dataclasses.asdict(row) for key, row in rows.items()}  # type: ignore[call-overload]
        self._write(name, part, {**self.conditions, **more_conditions})

    def has(self, name: str, **more_conditions: Any) -> bool:
        """Whether the part is stored and need not be measured."""
        return self._read(name, {**self.conditions, **more_conditions}) is not None

    def _read(self, name: str, conditions: dict[str, Any]) -> Any:
        """The stored part as JSON values; None if there is none that was measured under ``conditions``."""
        path = self._path(name)
        if not path.exists():
            return None
        document = read_json(path, kind="report's part", error=ReportError)
        expected = {"format": FORMAT, "version": VERSION, "conditions_digest": _digest(conditions)}
        if not isinstance(document, dict) or any(document.get(key) != value for key, value in expected.items()):
            return None
        return document.get("part")

    def _write(self, name: str, part: Any, conditions: dict[str, Any]) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "conditions_digest": _digest(conditions),
            "conditions": conditions,
            "part": part,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise ReportError("cannot store what was measured", got=f"{self.folder}: {cause.strerror or cause}") from cause
        write_atomically(self._path(name), (json.dumps(document) + "\n").encode(), kind="report's part", error=ReportError)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _digest(conditions: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
