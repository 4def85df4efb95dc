"""The correction rates that ``freekv`` measures, and tables of its medians."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.freekv_model import Corrections
from benchmarks.harness import Row, Target

HEADS = 5 / 8
"""Share of corrected KV heads in a corrected layer-step. A third party measured, with FreeKV's code and R1-Llama-8B at tau
0.9, that 58.9 % of KV heads are corrected, in 90.1 % of layer-steps."""
CALM, OFTEN = Corrections(layer_steps=0.0, heads=HEADS), Corrections(layer_steps=0.9, heads=HEADS)
RATES = (
    CALM,
    OFTEN,
    *(Corrections(layer_steps=share, heads=HEADS) for share in (0.5, 0.1, 1.0)),
    Corrections(layer_steps=0.9, heads=1.0),
)
WORST_RATIO = 1.3


def overview(rows: Sequence[Row]) -> list[Row]:
    """One row per context, batch and side, one column per rate."""
    found: dict[tuple[Any, ...], Row] = {}
    columns = {f"{share:.0%} of layer-steps": Corrections(layer_steps=share, heads=HEADS) for share in (0, 0.1, 0.5, 0.9, 1)}
    columns["90%, all heads"] = Corrections(layer_steps=0.9, heads=1.0)
    for row in rows:
        key = row["tokens"], row["batch"], row["side"]
        names = dict(zip(("tokens", "batch", "side"), key, strict=True))
        line = found.setdefault(key, {**names, "any rate": None, **dict.fromkeys(columns), "90% / 0%": None})
        rate = None if row["rate"] is None else Corrections(layer_steps=row["rate"], heads=row["rate_of_heads"])
        line[next((name for name, value in columns.items() if value == rate), "any rate")] = row["median_ms"]
    for line in found.values():
        calm, often = line["0% of layer-steps"], line["90% of layer-steps"]
        line["90% / 0%"] = None if calm is None or often is None else round(often / calm, 3)
    return list(found.values())


def targets_of(rows: Sequence[Row], ours: str) -> list[Target]:
    """Targets of the side ``ours`` at each context and batch for which both rates were measured."""
    return [
        Target(
            what=f"{line['tokens']} tokens, batch {line['batch']}: ours where 90 % of layer-steps are corrected, over none",
            measured=line["90% / 0%"],
            limit=WORST_RATIO,
        )
        for line in overview(rows)
        if line["side"] == ours and line["90% / 0%"] is not None
    ]
