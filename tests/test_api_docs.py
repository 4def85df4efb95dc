"""docs/api.md is what the docstrings say, and every public name has one."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from tests.api_docs import SECTIONS, api_markdown
from trt_kv import errors, pipeline

DOCS = Path(__file__).parent.parent / "docs" / "api.md"


def test_the_page_is_current() -> None:
    assert DOCS.read_text() == api_markdown(), "run: python -m tests.api_docs > docs/api.md"


def test_every_public_name_has_a_docstring() -> None:
    undocumented = [
        name
        for _, names in SECTIONS.values()
        for name, found in names.items()
        if (inspect.isclass(found) or inspect.isfunction(found)) and not inspect.getdoc(found)
    ]
    assert undocumented == []


def test_code_of_the_page_parses_and_names_errors_that_exist() -> None:
    page = api_markdown()
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        if code.startswith(("def", "async def", "class")):
            ast.parse(code if code.rstrip().count("\n") and code.startswith("class") else f"{code.rstrip().rstrip(':')}: ...")
    named = set(re.findall(r"`(\w+Error)`", page))
    assert named - set(vars(errors)) - {"RuntimeError"} == set()


@pytest.mark.parametrize("name", pipeline.__all__)
def test_every_name_of_the_pipeline_is_on_the_page(name: str) -> None:
    assert f"### {name}\n" in api_markdown()
