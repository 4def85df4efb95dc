"""The environment that chat templates run in: jinja2's immutable sandbox as transformers sets it up, with bounds.

Templates come with checkpoints and engines, which may be from anybody. They read plain data only (no objects with methods that
do anything), and are stopped after ``MAX_STEPS`` iterations and calls of macros, after ``MAX_SECONDS``, and before a value has
more than ``MAX_LENGTH`` items. Not bounded: the time of one filter, method or comparison of values of that size, and how many
such values are kept at once.
"""

import datetime as dt
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.visitor import NodeTransformer

MAX_LENGTH = 2**24
"""Characters of the rendered text and of any text on the way, items of a list."""
MAX_STEPS = 300_000
"""Iterations of loops and calls of macros in one rendering: a second or two."""
MAX_SECONDS = 10.0
"""Of one rendering."""
_MOST_INDENT = 32
_MOST_BITS = 2**14

_used = threading.local()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant said, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *others = args
        attributes = dict(*others, **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class _Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; loops and macros count steps, and no value grows beyond ``MAX_LENGTH``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(right, int) and isinstance(left, int) and left.bit_length() * right > _MOST_BITS:
            raise TemplateRuntimeError(f"{left!r:.20} ** {right!r:.20} is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **keywords: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            _check_method(owner, method.__name__, [*args, *keywords.values()])
        return bounded(super().call(context, function, *args, **keywords))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    @staticmethod
    def step() -> None:
        """Counts a step of the rendering; an error if it was one too many."""
        _used.steps += 1
        if _used.steps > MAX_STEPS or (_used.steps % 64 == 0 and time.monotonic() > _used.deadline):
            raise TemplateRuntimeError(f"the template takes too long: stopped after {_used.steps} steps")

    @staticmethod
    def concatenation(*parts: Any) -> str:
        """``a ~ b``."""
        for part in parts:
            _check_whole_size(part)
        return str(bounded("".join(map(str, parts))))


class _Counting(NodeTransformer):
    """Puts a step into every body that can run more than once, and bounds ``a ~ b``, which is no operator to the sandbox."""

    def generic_visit(self, node: jinja2.nodes.Node, *args: Any, **keywords: Any) -> jinja2.nodes.Node:
        node = super().generic_visit(node, *args, **keywords)
        if isinstance(node, jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock):
            node.body.insert(0, jinja2.nodes.ExprStmt(_call("step", []), lineno=node.lineno))
        return _call("concatenation", node.nodes) if isinstance(node, jinja2.nodes.Concat) else node


def _call(method: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(method), arguments, [], None, None)


def bounded(value: Any) -> Any:
    """``value``, or an error if it is too large."""
    if isinstance(value, _SIZED) and len(value) > MAX_LENGTH:
        raise TemplateRuntimeError(f"a {type(value).__name__} is too large: {len(value)} of at most {MAX_LENGTH}")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise TemplateRuntimeError(f"an integer is too large: {value.bit_length()} bits of at most {_MOST_BITS}")
    return value


def _finalised(value: Any) -> Any:
    """A value that is about to become text."""
    _check_whole_size(value)
    return bounded(value)


def _check_whole_size(value: Any) -> None:
    """Refuse containers that have many items inside: one that holds the same one twice, and so on, is small in memory only."""
    if not isinstance(value, list | tuple | dict):
        return
    waiting, size = [value], 0
    while waiting:
        item = waiting.pop()
        size += len(item) if isinstance(item, str) else 1
        if size > MAX_LENGTH // 4:
            raise TemplateRuntimeError("a value is too large to become text")
        waiting += [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list | tuple) else []


def _check_product(left: Any, right: Any) -> None:
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int) and len(items) * times > MAX_LENGTH:
            raise TemplateRuntimeError(f"a {type(items).__name__} of {len(items)} items times {times!r:.20} is too large")


def _check_format(text: str, *values: Any) -> None:
    """Refuse format strings with large widths, such as %999999999d, and what is large to format."""
    for value in values:
        _check_whole_size(value)
    if re.search(r"\d{6}|[%:][^ ]*[*{]", text):
        raise TemplateRuntimeError("a format string has a width that is too large, or is itself formatted")


def _check_method(owner: str, name: str, args: Sequence[Any]) -> None:
    """Refuse methods of texts whose result would be too large."""
    size = 0
    if name in {"center", "ljust", "rjust", "zfill"}:
        size = max((arg for arg in args if isinstance(arg, int)), default=0)
    elif name == "expandtabs":
        size = owner.count("\t") * max((arg for arg in args if isinstance(arg, int)), default=8)
    elif name in {"format", "format_map"}:
        _check_format(owner, *args)
    elif name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        size = owner.count(args[0]) * len(args[1])
    elif name == "join" and args and isinstance(args[0], list | tuple | str):
        size = len(owner) * len(args[0])
    if size > MAX_LENGTH:
        raise TemplateRuntimeError(f"the result of {name} is too large")


_SIZED = (str, list, tuple, dict)
_MOVES = {"attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"}
_MOVES |= {"max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"}
"""Filters that make no text of the items that they are given."""


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with arguments and results that are not too large."""

    @functools.wraps(function)  # with the marks by which jinja2 knows what else the filter is given
    def checked(*args: Any, **keywords: Any) -> Any:
        given = [*args, *keywords.values()]
        for value in () if name in _MOVES else given:
            _check_whole_size(value)
        texts, numbers = [v for v in given if isinstance(v, str)], [v for v in given if isinstance(v, int)]
        if texts and name in {"center", "replace"}:
            _check_method(texts[0], name, [*numbers, *texts[1:]])
        elif texts and name == "indent":
            _check_product("x" * (texts[0].count("\n") + 1), max([*numbers, *map(len, texts[1:])], default=4))
        elif texts and name == "format":
            _check_format(texts[0])
        elif name == "tojson" and any(number > _MOST_INDENT for number in numbers if number is not given[0]):
            raise TemplateRuntimeError("the indent of tojson is too large")
        return bounded(function(*args, **keywords))

    return checked


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models were trained on it: jinja2's own filter escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    _check_format(form)
    return dt.datetime.now().astimezone().strftime(form)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


@functools.cache
def _environment() -> _Bounded:
    environment = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_finalised
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _bounded_filter(name, function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _now, "dict": _dict, "namespace": _Namespace}
    return environment


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template; raises jinja2's ``TemplateError``, and ``RecursionError`` for one that is nested too deeply."""
    return _environment().from_string(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """The text of a template. Raises what jinja2 and Python's own operations raise, ``TemplateRuntimeError`` beyond a bound."""
    template = compiled(source)
    _used.steps, _used.deadline = 0, time.monotonic() + MAX_SECONDS
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_LENGTH:
            raise TemplateRuntimeError(f"the rendered text is longer than {MAX_LENGTH} characters")
    return "".join(pieces)
