"""Typed reads from one JSON object of a checkpoint; every error names the field and its file."""

from collections.abc import Mapping
from typing import Any

from trt_kv.errors import CheckpointError

_LARGEST_NUMBER = 2**53


class Fields:
    """The fields of ``data``, an object in the file ``source``. A field that is null counts as missing."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
            raise self.mistyped(name, "a number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if not value > 0.0:
            raise self.mistyped(name, "a number > 0")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not value.is_integer():
            raise self.mistyped(name, "an integer")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.mistyped(name, "true or false")
        return value

    def names(self, name: str) -> list[str]:
        value = self.data.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.mistyped(name, "a list of names")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.data.get(name) or []
        if not isinstance(value, list) or not all(_is_number(item) for item in value):
            raise self.mistyped(name, "a list of numbers")
        return tuple(float(item) for item in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.data.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int | float) or token % 1 != 0 for token in ids):
            raise self.mistyped(name, "a token id or a list of token ids")
        return tuple(dict.fromkeys(int(token) for token in ids))

    def mistyped(self, name: str, expected: str) -> CheckpointError:
        """The error for a field whose value is not what is ``expected``."""
        return CheckpointError(
            f"field {name!r} in {self.source} has a bad value", got=repr(self.data.get(name)), expected=expected
        )

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source} has no field {name!r}",
            got="fields " + ", ".join(sorted(self.data)),
            expected=f"a value for {name!r}",
            fix="take config.json from the same place as the weights",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER
