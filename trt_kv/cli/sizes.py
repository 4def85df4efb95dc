"""Sizes on the command line: 32k tokens, 16GiB of memory."""

import re

import click

_TOKENS = {"": 1, "k": 2**10, "m": 2**20}
_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1)}
_BYTES |= {f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)}


class _Size(click.ParamType[int]):
    """A number with one of ``units``, by name in lower case."""

    def __init__(self, name: str, units: dict[str, int], example: str) -> None:
        self.name = name
        self._units = units
        self._example = example

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", value.strip().lower())
        if found is None or found[2] not in self._units:
            known = ", ".join(filter(None, self._units))
            self.fail(f"{value!r} is not a size; write it like {self._example} (units: {known})", param, ctx)
        size = int(float(found[1]) * self._units[found[2]])
        if size < 1:
            self.fail(f"{value!r} is below 1", param, ctx)
        return size


token_count = _Size("tokens", _TOKENS, "4096 or 32k, where k is 1024")
byte_count = _Size("bytes", _BYTES, "16GiB or 500MB")


def bytes_as_text(n_bytes: float) -> str:
    """E.g. ``1.5 GiB``, ``112.0 MiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 2**power:
            return f"{n_bytes / 2**power:.1f} {unit}"
    return f"{n_bytes:.0f} B"
