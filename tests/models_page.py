"""docs/models.md from the table of families and models_page.md: ``python -m tests.models_page > docs/models.md``."""

import importlib
import sys
from pathlib import Path

from trt_kv.families import family_from_name, family_names
from trt_kv.unsupported_models import REFUSALS


def models_markdown() -> str:
    """The page as Markdown."""
    families = []
    for name in family_names():
        family = family_from_name(name)
        what = (importlib.import_module(f"trt_kv.families.{name}").__doc__ or "").strip().splitlines()[0].rstrip(".")
        families.append(f"| `{name}` | `{family.class_name}` | {what} | {family.models} |")
    refused = [f"| {refusal.why} | {', '.join(sorted(refusal.model_types))} | {refusal.fix} |" for refusal in REFUSALS]
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return template.format(families="\n".join(families), refused="\n".join(refused))


if __name__ == "__main__":
    sys.stdout.write(models_markdown())
