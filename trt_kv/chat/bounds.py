"""What one rendering of a chat template may use: steps, seconds, the size of a value, and the bytes of all values together.

``checked_result`` is called with every value that a template makes; the other functions refuse operations before they make a
value that is too large.
"""

import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

MAX_LENGTH = 2**24
"""Characters of the rendered text and of any text on the way; a list or dictionary counts with all that is in it."""
MAX_BYTES = 2**30
"""Of all values made in one rendering, whether they are still in use or not."""
MAX_STEPS = 300_000
"""Iterations of loops and calls of macros in one rendering: a second or two."""
MAX_SECONDS = 10.0
"""Of one rendering."""
_ITEM = 16
"""Characters that an item counts as."""
_ITEM_BYTES = 64
_POINTER_BYTES = 8
_MOST_INDENT = 32
_MOST_BITS = 2**14
_MOST_DIGITS = 400
_SLOW_LENGTH = 2**18
"""Characters of a text for filters that take much longer than its length."""
_SLOW_FILTERS = ("pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr")
_SPLITTING = ("batch", "groupby", "list", "slice", "sort", "unique")
"""Filters that make a list of a text's characters."""


class _Used(threading.local):
    """What this thread's rendering has used so far."""

    steps = 0
    n_bytes = 0
    deadline = float("inf")


_used = _Used()


def begin() -> None:
    """Start to count for a rendering in this thread."""
    _used.steps, _used.n_bytes, _used.deadline = 0, 0, time.monotonic() + MAX_SECONDS


def step(n_texts: int) -> None:
    """Counts a step of the rendering, which may output ``n_texts`` texts of the template; an error if it was one too many."""
    _used.steps += 1
    _count_bytes(_POINTER_BYTES * n_texts)
    if _used.steps > MAX_STEPS or _used.steps % 64 == 0:
        check_time()


def check_time() -> None:
    """An error if the rendering takes too many steps or too long."""
    if _used.steps > MAX_STEPS or time.monotonic() > _used.deadline:
        raise TemplateRuntimeError(f"the template takes too long: stopped after {_used.steps} steps")


def checked_result(value: Any) -> Any:
    """``value``, which a template has just made; an error if it, or all of them together, is too large."""
    if isinstance(value, str):
        _check_size(len(value), "a text")
        _count_bytes(sys.getsizeof(value))
    elif isinstance(value, list | tuple | dict):
        check_whole_size(value)
        _count_bytes(_ITEM_BYTES * len(value))
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise TemplateRuntimeError(f"an integer is too large: {value.bit_length()} bits of at most {_MOST_BITS}")
    return value


def check_whole_size(value: Any) -> None:
    """Refuse what has too much inside: a list that holds the same one twice, and so on, is small in memory only."""
    _check_size(_whole_size(value), "a value")


def check_arguments(values: Sequence[Any]) -> None:
    """Refuse arguments of a macro that are too large together, as it sees them in a tuple, ``varargs``."""
    if sum(isinstance(value, list | tuple | dict) for value in values) > 1:
        check_whole_size(list(values))


def check_power(left: Any, right: Any) -> None:
    """Refuse integers of too many bits."""
    if isinstance(right, int) and isinstance(left, int) and left.bit_length() * right > _MOST_BITS:
        raise TemplateRuntimeError(f"{left!r:.20} ** {right!r:.20} is too large")


def check_product(left: Any, right: Any) -> None:
    """Refuse texts and lists that are repeated too often."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            _check_size(_whole_size(items) * times, f"a {type(items).__name__} times {times!r:.20}")


def check_format(text: str, *values: Any) -> None:
    """Refuse format strings with large widths, such as %999999999d, and what is large to format."""
    if re.search(r"\d{6}|[%:][^ ]*[*{]", text):
        raise TemplateRuntimeError("a format string has a width that is too large, or is itself formatted")
    widths = sum(int(number) for number in re.findall(r"\d+", text))
    _check_size(widths + max(1, text.count("{")) * _whole_size(values), "a formatted text")


def check_method(owner: str, name: str, args: Sequence[Any]) -> None:
    """Refuse methods of texts whose result would be too large."""
    size = 0
    if name in {"center", "ljust", "rjust", "zfill"}:
        size = max((arg for arg in args if isinstance(arg, int)), default=0)
    elif name == "expandtabs":
        size = owner.count("\t") * max((arg for arg in args if isinstance(arg, int)), default=8)
    elif name in {"format", "format_map"}:
        check_format(owner, *args)
    elif name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        size = owner.count(args[0]) * len(args[1])
    elif name == "join" and args and isinstance(args[0], list | tuple | str):
        size = len(owner) * len(args[0])
    _check_size(size, f"the result of {name}")


def check_filter(name: str, given: Sequence[Any]) -> None:
    """Refuse a filter, by name and with all that it is given, whose result would be too large or take too long."""
    texts, numbers = [v for v in given if isinstance(v, str)], [v for v in given[1:] if isinstance(v, int)]
    if texts and name in {"center", "replace"}:
        check_method(texts[0], name, [*numbers, *texts[1:]])
    elif texts and name == "indent":
        check_product("x" * (texts[0].count("\n") + 1), max([*numbers, *map(len, texts[1:])], default=4))
    elif texts and name == "format":
        check_format(texts[0], *given[1:])
    elif name == "tojson" and max(numbers, default=0) > _MOST_INDENT:
        raise TemplateRuntimeError("the indent of tojson is too large")
    elif name in _SPLITTING:
        _check_size(_ITEM * max([*numbers, *map(len, texts)], default=0), f"the result of {name}")
    elif name == "round" and max(map(abs, numbers), default=0) > _MOST_DIGITS:
        raise TemplateRuntimeError("the precision of round is too large")
    elif name == "sum" and any(isinstance(value, list | tuple) for value in given[2:]):
        raise TemplateRuntimeError("sum adds numbers only")
    elif name in _SLOW_FILTERS and any(len(text) > _SLOW_LENGTH for text in texts):
        raise TemplateRuntimeError(f"a text is too large for {name}: more than {_SLOW_LENGTH} characters")


def _whole_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    waiting, size = [value], 0
    while waiting and size <= MAX_LENGTH:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, list | tuple | dict):
            size += _ITEM * len(item)
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return size


def _check_size(size: int, what: str) -> None:
    if size > MAX_LENGTH:
        raise TemplateRuntimeError(f"{what} is too large")


def _count_bytes(n_bytes: int) -> None:
    _used.n_bytes += n_bytes
    if _used.n_bytes > MAX_BYTES:
        raise TemplateRuntimeError(f"the template's values are too large together: more than {MAX_BYTES} bytes")
