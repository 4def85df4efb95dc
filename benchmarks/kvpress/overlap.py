"""Overlap between the tokens that kvpress's presses keep and those that our policies keep. See docs/kvpress.md."""

from pathlib import Path

import numpy as np
import transformers

from benchmarks.harness import Check, Report, Row, check_close
from benchmarks.kvpress.pairs import PAIRS, PYRAMID_PAIR, Pair
from benchmarks.kvpress.set_up import REQUIREMENTS
from benchmarks.kvpress.sides import CHUNK, FEW, FOLDER, ROUNDING, Overlap, Sides, documents, overlap
from benchmarks.models import exported_model
from trt_kv.export.checkpoints.opening import open_checkpoint

SHARES = (0.5, 0.25, 0.1)
ZERO = np.zeros(())
SETS_TABLE = "tokens kept"
PYRAMID_TABLE = "tokens per layer and KV head, PyramidKV"


def run(folder: Path, *, quick: bool) -> Report:
    """The bundled model on real documents, each press beside its policy at several kept shares."""
    model = exported_model(open_checkpoint(FOLDER), folder / "model")
    sides = Sides(model.executor(), model.config)
    prompts = [sides.encode(task) for task in documents()][: 1 if quick else None]
    checks: list[Check] = []
    rows: list[Row] = []
    for pair in PAIRS:
        for share in SHARES[: 1 if quick else None]:
            found = compared(sides, pair, share, prompts)
            rows.append(_row(pair, share, found, n_sets=len(prompts) * model.config.n_layers * model.config.n_kv_heads))
            if pair.same:
                checks += agreement(pair, share, found)
    return Report(
        title="kvpress beside our policies",
        settings={
            "kvpress": REQUIREMENTS.read_text().split("==")[-1].strip(),
            "transformers": transformers.__version__,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "chunk_tokens": CHUNK,
        },
        checks=checks,
        tables={SETS_TABLE: rows, PYRAMID_TABLE: pyramid_rows(sides, prompts[0])},
    )


def compared(sides: Sides, pair: Pair, share: float, prompts: list[list[int]]) -> Overlap:
    """The overlap of ``pair`` over all prompts."""
    total = Overlap(kvpress=0, ours=0, both=0, misplaced=0, worst_gap=0.0)
    for prompt in prompts:
        total += overlap(*sides.both(pair, share, prompt))
    return total


def agreement(pair: Pair, share: float, found: Overlap) -> list[Check]:
    """Check that few tokens are misplaced, and those only by rounding; ``BenchmarkError`` otherwise."""
    where = f"{pair.press} at {share:g}"
    return [
        check_close(f"{where}: share of tokens misplaced", np.array(found.misplaced / found.kvpress), ZERO, within=FEW),
        check_close(f"{where}: distance of their scores from the cut", np.array(found.worst_gap), ZERO, within=ROUNDING),
    ]


def pyramid_rows(sides: Sides, prompt: list[int]) -> list[Row]:
    """Tokens that each layer keeps of ``prompt`` on both sides, at each share."""
    counts: dict[str, list[int]] = {}
    for share in SHARES:
        run, ours = sides.both(PYRAMID_PAIR, share, prompt)
        counts[f"kvpress_at_{share:g}"] = list(run.n_kept)
        counts[f"ours_at_{share:g}"] = [kept_KS.shape[1] for kept_KS in ours]
    n_layers = len(next(iter(counts.values())))
    return [{"layer": layer, **{name: layers[layer] for name, layers in counts.items()}} for layer in range(n_layers)]


def _row(pair: Pair, share: float, found: Overlap, *, n_sets: int) -> Row:
    """Means over documents, layers and KV heads."""
    return {
        "press": pair.press,
        "policy": pair.named,
        "kept_share": share,
        "kvpress_tokens": round(found.kvpress / n_sets, 1),
        "our_tokens": round(found.ours / n_sets, 1),
        "also_kept_by_us_percent": round(100 * found.both / found.kvpress, 1),
        "misplaced": found.misplaced,
    }
