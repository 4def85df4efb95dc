"""docs/api.md from the docstrings and signatures of the public names: ``python -m tests.api_docs > docs/api.md``."""

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator

import trt_kv
from trt_kv import errors, pipeline
from trt_kv.runtime import async_session, async_stream, chat, generation, session, stream
from trt_kv.runtime.prefix import pins

WIDTH = 100
QUOTE = "'"
HEAD = """# The Python API

Made from the docstrings by `python -m tests.api_docs`. How requests run together: [python.md](python.md).
"""
SECTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "Generating text": (
        "`from trt_kv import Engine, AsyncEngine, SamplingParams, Generation`",
        {
            **{name: getattr(trt_kv, name) for name in ("Engine", "AsyncEngine", "SamplingParams", "Generation")},
            "EngineChat": chat.EngineChat,
            "EnginePins": pins.EnginePins,
            "TemplateOptions": chat.TemplateOptions,
            "RequestTimes": generation.RequestTimes,
            "Stream": stream.Stream,
            "AsyncStream": async_stream.AsyncStream,
            "EngineSessions": session.EngineSessions,
            "Session": session.Session,
            "AsyncSession": async_session.AsyncSession,
            "AsyncAnswer": async_session.AsyncAnswer,
        },
    ),
    "From a checkpoint to an evaluated engine": (
        "`from trt_kv.pipeline import ...`",
        {name: getattr(pipeline, name) for name in sorted(pipeline.__all__, key=lambda name: (name[0].isupper(), name))},
    ),
    "Errors": (
        "`from trt_kv.errors import ...`",
        {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.TrtKvError)},
    ),
}


def api_markdown() -> str:
    """The reference of the public names as Markdown."""
    return "\n".join([HEAD, *(line for title in SECTIONS for line in _section(title))])


def _section(title: str) -> Iterator[str]:
    source, names = SECTIONS[title]
    yield from (f"## {title}", "", source, "")
    for name, found in names.items():
        yield from (f"### {name}", "")
        if inspect.isclass(found) or inspect.isfunction(found):
            yield from _definition(ast.parse(textwrap.dedent(inspect.getsource(found))).body[0])
        else:
            yield from _alias(name)


def _alias(name: str) -> Iterator[str]:
    """A callback's type: its definition, and the text below it."""
    body = ast.parse(inspect.getsource(pipeline.callbacks)).body
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            yield from (_code(ast.unparse(node)), str(below.value.value), "")


def _definition(node: ast.stmt, owner: str = "") -> Iterator[str]:
    """A function, or a class with its fields and public methods, as written in the source."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    is_property = any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
    if owner:
        yield from (f"#### {owner}.{node.name}" + (" (property)" if is_property else ""), "")
    if isinstance(node, ast.ClassDef):
        yield _code(_double_quoted(_class_head(node)))
    elif not is_property:
        yield _code(_double_quoted(_function_head(node)))
    yield from (_text(node), "")
    for method in node.body if isinstance(node, ast.ClassDef) and not owner else []:
        match method:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_"):
                if ast.get_docstring(method):
                    yield from _definition(method, node.name)


def _class_head(node: ast.ClassDef) -> str:
    fields = [f"    {ast.unparse(field)}\n" for field in node.body if isinstance(field, ast.AnnAssign | ast.Assign)]
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return f"class {node.name}{bases}" + (":\n" + "".join(fields).rstrip() if fields else "")


def _function_head(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The signature without ``self``, a line per parameter if there are many."""
    arguments = node.args
    arguments.args = [argument for argument in arguments.args if argument.arg not in ("self", "cls")]
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    inside = re.sub(r"(\w+: [^=,]+)=", r"\1 = ", ast.unparse(arguments))
    returned = f" -> {ast.unparse(node.returns).strip(QUOTE)}" if node.returns else ""
    head = f"{kind} {node.name}({inside}){returned}"
    if len(head) <= WIDTH:
        return head
    parameters = re.split(r", (?=\*|\w+[:=])", inside)
    return head.replace(inside, "\n" + "".join(f"    {parameter},\n" for parameter in parameters))


def _double_quoted(code: str) -> str:
    """As the formatter writes strings, unlike ``ast.unparse``."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', code)


def _text(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The docstring, its examples as code."""
    text, _, example = (ast.get_docstring(node) or "").partition("Example::\n\n")
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"(^(?:>>>|\.\.\.) .*(?:\n(?:>>>|\.\.\.|  ).*)*)", lambda found: _code(found[1]), text, flags=re.MULTILINE)
    return text.strip() + (f"\n\n{_code(inspect.cleandoc(example))}".rstrip() if example else "")


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(api_markdown())
