"""What the report's numbers say, in sentences that are made from them."""

import itertools
from collections.abc import Sequence

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.comparisons import (
    COMPARISONS,
    NO_DIFFERENCE,
    Comparison,
    against_the_best,
    best_of,
    best_rival,
    by_answers,
    by_loss,
    describe,
    lossless_share,
    percent,
    row_at_least,
    row_at_most,
    verdicts,
    worse_places,
)
from benchmarks.quality.plots.adaptive import REFREEKV, sweep
from benchmarks.quality.results import PolicyFacts, Results
from benchmarks.quality.tables import quality, share
from trt_kv.calibration.statistics import FEWEST_DOCUMENTS


def findings(results: Results) -> list[str]:
    """What the numbers say, one sentence or two each; every comparison is a test on the same documents."""
    points = [_on_full(results), *[_on_ours(results, policy) for policy in results.in_groups("ours")]]
    points += [
        _on_weak_places(results),
        _on_lossless(results),
        _on_budgets(results),
        _on_thresholds(results),
        _on_ablations(results),
    ]
    points += [_on_comparison(results, comparison) for comparison in COMPARISONS]
    points += [_on_question(results)]
    return [point for point in points if point]


def main_cells(results: Results) -> list[tuple[str, Cell]]:
    """Late questions together and every other task, at the main context, as far as the model can do them."""
    late = results.late()
    cells = [("late questions", late)] if late else []
    return cells + [
        (results.task(cell.task).title.lower(), cell) for cell in results.compared() if not results.task(cell.task).late
    ]


def asking_cells(results: Results) -> list[tuple[str, Cell]]:
    """Those of ``main_cells`` that have right answers."""
    return [(name, cell) for name, cell in main_cells(results) if cell.task == "late" or results.task(cell.task).asks]


def _on_full(results: Results) -> str:
    cannot = [cell for cell in results.cells if not results.can(cell)]
    told = ", ".join(f"{results.task(cell.task).title.lower()} at {cell.context_length}" for cell in cannot)
    measured = sum(results.task(cell.task).asks for cell in results.cells)
    left_out = f"Left out of every comparison: {told}." if cannot else "Nothing is left out."
    return (
        f"**What the model can do**: with its full cache it answers at least {percent(results.settings.capable_from)} % exactly"
        f" in {measured - len(cannot)} of {measured} cells (task and context). {left_out}"
    )


def _on_ours(results: Results, policy: PolicyFacts) -> str:
    if policy.adaptive:
        return _on_own_budget(results, policy)
    parts = [
        f"{name}: {describe(against_the_best(results, cell, policy.name, by_answers))}" for name, cell in asking_cells(results)
    ]
    return f"**{policy.label}** (ours) against the best published policy at each kept share, exact answers: {'; '.join(parts)}."


def _on_own_budget(results: Results, policy: PolicyFacts) -> str:
    """A policy of ours without a budget: against ReFreeKV, and against published policies that keep at least as much."""
    rivals = [other for other in results.in_groups("published") if not other.adaptive]
    parts = []
    for name, cell in asking_cells(results):
        row, refreekv = cell.row(policy.name), cell.row(REFREEKV)
        rows = [other for rival in rivals if (other := row_at_least(results, cell, rival.name, row.mean_kept)) is not None]
        found = [by_answers(row, other) for other in rows]
        parts.append(
            f"{name}: {share(row.accuracy)} % exact with {percent(row.mean_kept)} % kept, {by_answers(row, refreekv)} against"
            f" ReFreeKV's {share(refreekv.accuracy)} % with {percent(refreekv.mean_kept)} %; better than"
            f" {found.count('better')} and worse than {found.count('worse')} of {len(rows)} published policies that keep at"
            " least as much"
        )
    return f"**{policy.label}** (ours, no budget asked for). {'. '.join(map(_capitalised, parts))}."


def _on_weak_places(results: Results) -> str:
    """Where our own policies are clearly worse than the full cache, or than what is published."""
    rivals = [rival for rival in results.in_groups("published") if not rival.adaptive]

    def best_published(cell: Cell, row: Row) -> Row | None:
        """The best of those that keep no more, but for rounding; of policies with a kept share the one of the same share."""
        if row.budget is not None:
            return best_rival(cell, rivals, row.budget)
        rows = [row_at_most(results, cell, rival.name, row.mean_kept) for rival in rivals]
        return best_of([other for other in rows if other is not None])

    def told(places: Sequence[tuple[Cell, list[float]]]) -> str:
        by_task: dict[str, list[str]] = {}
        for cell, kept in places:
            shares = ", ".join(map(percent, kept))
            title = results.task(cell.task).title.lower()
            by_task.setdefault(title, []).append(f"{cell.context_length} tokens with {shares} % kept")
        return "; ".join(f"{title} of {', '.join(found)}" for title, found in by_task.items()) or "nowhere"

    parts = []
    for policy in results.in_groups("ours"):
        full = told(worse_places(results, policy.name, lambda cell, _: cell.full))
        published = told(worse_places(results, policy.name, best_published))
        parts.append(f"*{policy.label}*: worse than the full cache: {full}. Worse than the best published policy: {published}")
    return (
        f"**Where ours lose**, in any context, clearly, by exact answers (plain text: by loss). {'. '.join(parts)}."
        if parts
        else ""
    )


def _on_lossless(results: Results) -> str:
    budgets = results.settings.budgets
    sentences = []
    cells = [(name, cell) for name, cell in main_cells(results) if len(cell.documents) >= FEWEST_DOCUMENTS]
    for name, cell in cells:
        compare = by_answers if (name, cell) in asking_cells(results) else by_loss
        policies = [policy for policy in results.in_groups("ours", "published") if not policy.adaptive]
        shares = [(policy.label, lossless_share(cell, policy.name, budgets, compare)) for policy in policies]
        reached = [f"*{label}: {percent(found)} %*" for label, found in shares if found is not None]
        sentences.append(f"{_capitalised(name)}: {', '.join(reached) or 'none'}")
    told = "the kept share from which on a policy shows none"
    return f"**No clear loss against the full cache**: {told}. {'. '.join(sentences)}."


def _on_budgets(results: Results) -> str:
    """How ReFreeKV's budget varies between inputs."""
    policy = results.policy(REFREEKV)
    parts = []
    for cell in results.compared():
        row = cell.row(REFREEKV)
        least, most = percent(min(row.kept)), percent(max(row.kept))
        parts.append(f"{results.task(cell.task).title.lower()} {percent(row.mean_kept)} % ({least}–{most})")
    n_exempt, n_layers = len(policy.exempt_layers), results.model.n_layers
    return (
        f"**ReFreeKV's budget**, mean and range over documents: {', '.join(parts)}. {n_exempt} of {n_layers} layers are exempt"
        f" and count as 100 %: in so shallow a model that alone is {percent(n_exempt / n_layers)} % of the cache."
    )


def _on_thresholds(results: Results) -> str:
    swept = sweep(results)
    cells = results.compared()
    falls = all(
        all(a >= b for a, b in zip(cell.row(tighter.name).kept, cell.row(looser.name).kept, strict=True))
        for cell in cells
        for (_, tighter), (_, looser) in itertools.pairwise(swept)
    )
    monotone = "never rises with T, in any document" if falls else "does not always fall with T"
    (low_t, low), (high_t, high) = swept[0], swept[-1]
    parts = [
        f"{name} {quality(results, cell, cell.row(low.name))} against {quality(results, cell, cell.row(high.name))}"
        for name, cell in asking_cells(results)
    ]
    return (
        f"**ReFreeKV's threshold**: the budget {monotone}. Exact answers in % at T = {100 * low_t:g} % against"
        f" {100 * high_t:g} %: {'; '.join(parts)}."
    )


def _on_ablations(results: Results) -> str:
    cells = asking_cells(results)
    parts = []
    for policy in results.in_groups("ablation"):
        kept, answers, alike = [], [], []
        for name, cell in cells:
            row, published = cell.row(policy.name), cell.row(REFREEKV)
            kept.append(f"{percent(row.mean_kept)} instead of {percent(published.mean_kept)} % ({name})")
            values = f"{percent(row.accuracy.value)} % against {percent(published.accuracy.value)} %"
            if (verdict := by_answers(row, published)) == NO_DIFFERENCE:
                alike.append(name)
            else:
                answers.append(f"{verdict} in {name}, {values}")
        answers += [f"no clear difference in {', '.join(alike)}"] if alike else []
        parts.append(f"*{_capitalised(policy.label)}*: keeps {', '.join(kept)}; exact answers {'; '.join(answers)}")
    return f"**Parts of ReFreeKV**. {'. '.join(parts)}."


def _on_comparison(results: Results, comparison: Comparison) -> str:
    kind, _, rest = comparison.choice.partition(": ")
    told, alike = [], []
    for name, cell in main_cells(results):
        compare = by_answers if (name, cell) in asking_cells(results) else by_loss
        found = verdicts(cell, comparison.policy, comparison.other, results.settings.budgets, compare)
        if set(found.values()) <= {NO_DIFFERENCE}:
            alike.append(name)
        else:
            told.append(f"{name}: {describe(found)}")
    told += [f"no clear difference at any kept share: {', '.join(alike)}"] if alike else []
    return f"**{kind.capitalize()}**: {rest}. {_capitalised('; '.join(told))}.{_example(results, comparison)}"


def _example(results: Results, comparison: Comparison) -> str:
    """The accuracy of both policies on late questions where they are furthest apart, if the difference is clear there."""
    late = results.late()
    if late is None:
        return ""
    found = verdicts(late, comparison.policy, comparison.other, results.settings.budgets, by_answers)
    clear = [budget for budget, verdict in found.items() if verdict in ("better", "worse")]
    if not clear:
        return ""

    def values(budget: float) -> Sequence[float]:
        return [late.row(name, budget).accuracy.value for name in (comparison.policy, comparison.other)]

    budget = max(clear, key=lambda b: abs(values(b)[0] - values(b)[1]))
    first, second = (share(late.row(name, budget).accuracy) for name in (comparison.policy, comparison.other))
    return f" Furthest apart on late questions at {percent(budget)} % kept: {first} % against {second} % exact."


def _on_question(results: Results) -> str:
    """Why the mass score loses late questions, where the numbers bear it out."""
    late = results.late()
    budget = min(results.settings.budgets, key=lambda b: abs(b - 0.5))
    if late is None or not late.has("window", budget):
        return ""
    mass, window = late.row("prefixkv", budget), late.row("window", budget)
    if mass.question_kept is None or window.question_kept is None or mass.fact_kept is None or window.fact_kept is None:
        return ""
    told = (
        f"**What goes missing**: at {percent(budget)} % kept, the mass score with its recipe holds"
        f" {percent(mass.fact_kept)} % of the asked fact's tokens and {percent(mass.question_kept)} % of the question's"
        f" (window score: {percent(window.fact_kept)} % and {percent(window.question_kept)} %). Its kept tokens stand at"
        f" {percent(mass.kept_place)} % of the prompt on average (window score: {percent(window.kept_place)} %)."
    )
    if mass.question_kept < budget and mass.kept_place < 0.5:
        told += " A sum over all causal queries favours early tokens: few queries come after a question at the end."
    return told


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
