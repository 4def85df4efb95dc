"""The environment that chat templates run in: jinja2's immutable sandbox as transformers sets it up, with bounds.

Templates come with checkpoints and engines, which may be from anybody. They read plain data only (no objects with methods that
do anything), and are stopped beyond the bounds of ``bounds.py``: steps, seconds, and the size of values. Not bounded: the time
of one filter, method or comparison of values of that size.
"""

import datetime as dt
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.visitor import NodeTransformer

from trt_kv.chat import bounds

_REFUSED_METHODS = frozenset({"encode", "from_bytes", "maketrans", "to_bytes", "translate"})
"""Methods of texts and numbers that make bytes, or texts of any length."""


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
    """The sandbox, with ``bounds`` on what a template uses."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    step = staticmethod(bounds.step)
    checked_result = staticmethod(bounds.checked_result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            bounds.check_product(left, right)
        elif operator == "**":
            bounds.check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            bounds.check_format(left, right)
        return bounds.checked_result(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **keywords: Any) -> Any:
        given = [*args, *keywords.values()]
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            bounds.check_method(owner, method.__name__, given)
        bounds.check_arguments(given)
        return bounds.checked_result(super().call(context, function, *args, **keywords))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a block or macro."""
        texts = list(parts)
        if sum(map(len, texts)) > bounds.MAX_LENGTH:
            raise TemplateRuntimeError("the text of a block is too large")
        return str(bounds.checked_result("".join(texts)))

    @staticmethod
    def concatenation(*parts: Any) -> str:
        """``a ~ b``."""
        bounds.check_whole_size(parts)
        return str(bounds.checked_result("".join(map(str, parts))))


class _Counting(NodeTransformer):
    """Puts a step into every body that can run more than once, and bounds what is no operator to the sandbox: ``a ~ b``,
    slices, and lists, tuples and dictionaries.
    """

    def generic_visit(self, node: jinja2.nodes.Node, *args: Any, **keywords: Any) -> jinja2.nodes.Node:
        node = super().generic_visit(node, *args, **keywords)
        match node:
            case jinja2.nodes.For() | jinja2.nodes.Macro() | jinja2.nodes.CallBlock():
                n_texts = jinja2.nodes.Const(sum(1 for _ in node.find_all(jinja2.nodes.TemplateData)))
                node.body.insert(0, jinja2.nodes.ExprStmt(_call("step", [n_texts]), lineno=node.lineno))
            case jinja2.nodes.Concat():
                return _call("concatenation", node.nodes)
            case jinja2.nodes.Getitem(arg=jinja2.nodes.Slice(), ctx="load"):
                return _call("checked_result", [node])
            case jinja2.nodes.List() | jinja2.nodes.Dict() | jinja2.nodes.Tuple(ctx="load") if _is_made_of_values(node):
                return _call("checked_result", [node])
        return node


def _is_made_of_values(node: jinja2.nodes.List | jinja2.nodes.Dict | jinja2.nodes.Tuple) -> bool:
    """Whether it holds more than constants."""
    children = [
        child for item in node.items for child in (item.iter_child_nodes() if isinstance(node, jinja2.nodes.Dict) else [item])
    ]
    return not all(isinstance(child, jinja2.nodes.Const) for child in children)


def _call(method: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(method), arguments, [], None, None)


_MOVES = {"attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"}
_MOVES |= {"max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"}
"""Filters that make no text of the items that they are given."""


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with arguments and results that are not too large."""

    @functools.wraps(function)  # with the marks by which jinja2 knows what else the filter is given
    def checked(*args: Any, **keywords: Any) -> Any:
        given = [*args, *keywords.values()]
        bounds.check_time()
        for value in () if name in _MOVES else given:
            bounds.check_whole_size(value)
        bounds.check_filter(name, given)
        return bounds.checked_result(function(*args, **keywords))

    return checked


def _timed(test: Any) -> Any:
    """A test, such as ``x in y``, that is not run when time is up: filters may call it for each of many items."""

    @functools.wraps(test)
    def checked(*args: Any, **keywords: Any) -> Any:
        bounds.check_time()
        return test(*args, **keywords)

    return checked


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models were trained on it: jinja2's own filter escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    bounds.check_format(form)
    return dt.datetime.now().astimezone().strftime(form)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


@functools.cache
def _environment() -> _Bounded:
    environment = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=bounds.checked_result
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _bounded_filter(name, function) for name, function in environment.filters.items()}
    environment.tests = {name: _timed(test) for name, test in environment.tests.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _now, "dict": _dict, "namespace": _Namespace}
    return environment


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template; raises jinja2's ``TemplateError``, and ``RecursionError`` for one that is nested too deeply."""
    return _environment().from_string(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """The text of a template. Raises what jinja2 and Python's own operations raise, ``TemplateRuntimeError`` beyond a bound."""
    bounds.begin()
    template = compiled(source)
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > bounds.MAX_LENGTH:
            raise TemplateRuntimeError(f"the rendered text is longer than {bounds.MAX_LENGTH} characters")
    return "".join(pieces)
