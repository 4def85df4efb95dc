"""docs/ops.md is what the specs say."""

from pathlib import Path

from trt_kv.plugins.ops_docs import ops_markdown

DOCS = Path(__file__).parent.parent / "docs" / "ops.md"


def test_the_reference_is_current() -> None:
    assert DOCS.read_text() == ops_markdown() + "\n", "run: python -m trt_kv.plugins.ops_docs > docs/ops.md"
