"""What the numbers about host-resident policies say, in sentences that are made from them."""

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.comparisons import (
    Compare,
    best_rival,
    by_answers,
    by_loss,
    describe,
    percent,
    ranges_of,
    verdicts,
)
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.recall.tables import FREEKV, SYNCHRONOUS, UNCORRECTED, Measured, sweep
from benchmarks.quality.results import Results
from benchmarks.quality.tables import quality, share
from trt_kv.calibration.statistics import Verdict

PUBLISHED_TAUS = (0.8, 0.9)
"""For long inputs, and for long generation."""


def findings(recall: RecallResults, results: Results, cells: Sequence[Measured]) -> list[str]:
    """What the numbers say, a sentence or two each; every comparison is a test on the same documents."""
    budgets = recall.main.budgets
    return [
        _on_dropping(results, cells, budgets),
        _on_losses(recall, results, cells),
        _on_ours(results, cells, budgets),
        _on_parts(cells, budgets),
        _on_correction(recall, cells),
        _on_traffic(recall, cells),
        _on_budgets(results, cells, budgets),
    ]


def _against(cell: Measured, results: Results, policy: str, budgets: Sequence[float], compare: Compare) -> dict[float, Verdict]:
    """A host-resident policy against whichever published policy that drops tokens is best, at every share it has."""
    rivals = [rival for rival in results.in_groups("published") if not rival.adaptive]
    shared = [budget for budget in budgets if cell.all.has(policy, budget) and cell.all.has(rivals[0].name, budget)]
    return {budget: compare(cell.all.row(policy, budget), best_rival(cell.all, rivals, budget)) for budget in shared}


def _compare(cell: Measured) -> Compare:
    return by_answers if cell.asks else by_loss


def _on_dropping(results: Results, cells: Sequence[Measured], budgets: Sequence[float]) -> str:
    least = min(budgets)
    parts = []
    for cell in cells:
        row = cell.all.row(FREEKV, least)
        found = describe(_against(cell, results, FREEKV, budgets, _compare(cell)))
        rivals = [rival for rival in results.in_groups("published") if not rival.adaptive and cell.all.has(rival.name, least)]
        against = ""
        if rivals:
            best = best_rival(cell.all, rivals, least)
            against = f", at {percent(least)} % {quality(results, cell.all, row)} against {quality(results, cell.all, best)}"
            against += f" ({best.policy}; full cache {quality(results, cell.all, cell.all.full)})"
        parts.append(f"{cell.name}: {found}{against}")
    return (
        "**FreeKV against the best published policy that drops tokens**, attending to as many as those keep (exact answers in"
        f" %, plain text by its perplexity). {_capitalised('; '.join(parts))}."
    )


def _on_losses(recall: RecallResults, results: Results, cells: Sequence[Measured]) -> str:
    told = []
    for policy in recall.in_groups("host"):
        places = []
        for cell in cells:
            found = _against(cell, results, policy.name, recall.main.budgets, _compare(cell))
            worse = [budget for budget, verdict in found.items() if verdict == "worse"]
            loss = _against(cell, results, policy.name, recall.main.budgets, by_loss) if cell.asks else {}
            likelier = [budget for budget, verdict in loss.items() if verdict == "worse" and budget not in worse]
            if worse:
                places.append(f"{cell.name} at {ranges_of(worse, list(found))} %")
            if likelier:
                places.append(f"{cell.name} at {ranges_of(likelier, list(loss))} % by perplexity alone")
        told.append(f"*{policy.label}*: {', '.join(places) if places else 'nowhere'}")
    return (
        "**Where the whole cache on the host loses** clearly against the best published policy that drops tokens, at the main"
        f" context and the same share: {'; '.join(told)}."
    )


def _on_ours(results: Results, cells: Sequence[Measured], budgets: Sequence[float]) -> str:
    parts = []
    for policy in results.in_groups("ours"):
        if policy.adaptive:
            continue
        told = []
        for cell in cells:
            found = verdicts(cell.all, FREEKV, policy.name, budgets, _compare(cell))
            told.append(f"{cell.name} {describe(found)}")
        parts.append(f"*{policy.label}*: {'; '.join(told)}")
    return f"**FreeKV against our own policies that drop tokens**, at the same share. {'. '.join(parts)}."


def _on_parts(cells: Sequence[Measured], budgets: Sequence[float]) -> str:
    parts = []
    for name, other in (("without correction", UNCORRECTED), ("without speculation", SYNCHRONOUS)):
        told = []
        for cell in cells:
            compare = _compare(cell)
            found = verdicts(cell.all, FREEKV, other, budgets, compare)
            by_perplexity = verdicts(cell.all, FREEKV, other, budgets, by_loss)
            extra = f" (perplexity: {describe(by_perplexity)})" if cell.asks else ""
            told.append(f"{cell.name} {describe(found)}{extra}")
        parts.append(f"against itself *{name}*: {'; '.join(told)}")
    return f"**Speculation and correction**. FreeKV {'. FreeKV '.join(parts)}."


def _on_correction(recall: RecallResults, cells: Sequence[Measured]) -> str:
    budget = swept_budget(recall)
    parts = []
    for tau, policy in sweep(recall):
        if tau not in PUBLISHED_TAUS:
            continue
        told = []
        for cell in _swept(cells, policy.name, budget):
            moved = cell.host.moved_by(policy.name, budget)
            heads, steps = moved.mean("corrected_heads"), moved.mean("corrected_layer_steps")
            told.append(f"{share(heads)} % of KV heads, {share(steps)} % of layer-steps ({cell.name})")
        parts.append(f"tau {tau:g}: {'; '.join(told)}")
    n_heads = len(cells[0].host.moved[0].corrected_LK[0])
    return (
        f"**How often FreeKV corrects**, at {percent(budget)} % attended: {'. '.join(_capitalised(part) for part in parts)}. A"
        f" layer-step waits if any of its {n_heads} KV heads is corrected, so that heads say too little of how much is hidden."
    )


def _on_traffic(recall: RecallResults, cells: Sequence[Measured]) -> str:
    budget = swept_budget(recall)
    parts = []
    for cell in cells:
        if not cell.host.has(FREEKV, budget):
            continue
        freekv, waiting = (cell.host.moved_by(name, budget) for name in (FREEKV, SYNCHRONOUS))
        late, every = cell.kib(float(np.mean(freekv.late))), cell.kib(freekv.moved)
        overlap = f", {percent(float(np.mean(freekv.overlap)))} % of pages stay" if freekv.overlap else ""
        parts.append(
            f"{cell.name}: {every:.1f} KiB per step of {cell.host.row(FREEKV, budget).kv_bytes / 1024:.0f} attended"
            f" to{overlap}; {late:.1f} KiB of it waited for, without speculation {cell.kib(float(np.mean(waiting.late))):.1f}"
        )
    return f"**What moves**, at {percent(budget)} % attended, all layers together. {_capitalised('. '.join(parts))}."


def _on_budgets(results: Results, cells: Sequence[Measured], budgets: Sequence[float]) -> str:
    parts = []
    for name, label in (
        ("freekv-recipe", "PrefixKV's recipe instead of equal layers"),
        ("freekv-windowrecipe", "pooledwindow's recipe instead of equal layers"),
        ("freekv-arkvale", "ArkVale's ranking of pages instead of its own"),
        ("freekv-arkvale-windowrecipe", "ArkVale's ranking and pooledwindow's recipe"),
    ):
        told = [f"{cell.name} {describe(verdicts(cell.all, name, FREEKV, budgets, _compare(cell)))}" for cell in cells]
        parts.append(f"*{label}*: {'; '.join(told)}")
    own = []
    for cell in cells:
        row = cell.all.row("freekv-unimetric")
        own.append(f"{quality(results, cell.all, row)} with {percent(row.mean_kept)} % ({cell.name})")
    parts.append(f"*The Uni-Metric's budget*, which nobody asks for: {'; '.join(own)}")
    return f"**FreeKV with the parts of others**, against itself. {'. '.join(parts)}."


def swept_budget(recall: RecallResults) -> float:
    """The share at which sweeps are told: of those measured, the largest."""
    return max(recall.main.sweep_budgets)


def _swept(cells: Sequence[Measured], policy: str, budget: float) -> list[Measured]:
    return [cell for cell in cells if cell.host.has(policy, budget)]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
