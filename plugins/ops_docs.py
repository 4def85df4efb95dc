"""docs/ops.md from the specs: ``python -m trt_kv.plugins.ops_docs > docs/ops.md``."""

import sys
from collections.abc import Iterable

from trt_kv.opspec import DOMAIN, OP_VERSION, OpSpec, TensorSpec
from trt_kv.plugins.registry import op_specs

LEGEND = (
    "N tokens of this step over all sequences, B sequences, H query heads, K KV heads, D head size, P page size, "
    "M pages in the pool, T pages a page table can name, L layers, U queries that the runtime stores."
)


def ops_markdown() -> str:
    """The reference of all ops as Markdown."""
    head = (
        f"# The ops of domain `{DOMAIN}`, version {OP_VERSION}\n\nMade from the specs by `python -m trt_kv.plugins.ops_docs`.\n"
    )
    return "\n".join([head, f"Axes: {LEGEND}", *(_op(spec) for spec in op_specs().values())])


def _op(spec: OpSpec) -> str:
    tensors = [_row(t, "state, in place" if t.state else "optional input" if t.optional else "input") for t in spec.inputs]
    tensors += [_row(t, "output") for t in spec.outputs]
    attributes = [
        f"| {a.name} | {a.type} | {'required' if a.default is None else a.default} | {a.doc} |" for a in spec.attributes
    ]
    tolerance = f"Tolerance: {spec.tolerance.atol:g} absolute, {spec.tolerance.rtol:g} relative ({spec.tolerance.reason})."
    return "\n".join(
        [
            f"\n## {spec.name}\n",
            f"{spec.summary}\n",
            f"Source: {spec.source}.\n",
            *_table(("tensor", "role", "shape", "type", "meaning"), tensors),
            "",
            *_table(("attribute", "type", "default", "meaning"), attributes),
            "",
            tolerance,
        ]
    )


def _row(tensor: TensorSpec, role: str) -> str:
    return f"| {tensor.name} | {role} | [{', '.join(tensor.axes)}] | {tensor.dtype} | {tensor.doc} |"


def _table(columns: tuple[str, ...], rows: Iterable[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows]


if __name__ == "__main__":
    sys.stdout.write(ops_markdown() + "\n")
