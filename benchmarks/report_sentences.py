"""What the report's numbers say, in sentences that are made from them."""

from trt_kv.calibration.evaluation import FULL, VARIANTS
from trt_kv.calibration.evaluation_findings import COMPARISONS, Comparison, describe, lossless_share, percent, verdicts
from trt_kv.calibration.evaluation_results import Results, Row, TaskResults
from trt_kv.calibration.evaluation_statistics import Estimate


def findings(results: Results) -> list[str]:
    """What the numbers say, one sentence or two each; every comparison is a test on the same documents."""
    points = [_on_full(results), _on_lossless(results)]
    points += [_on_comparison(results, comparison) for comparison in COMPARISONS]
    points += [_on_question(results), _on_spread(results), _on_text(results)]
    return [point for point in points if point]


def _on_full(results: Results) -> str:
    parts = []
    for task in results.tasks:
        if task.asks:
            row = task.row(FULL.name, 1.0)
            parts.append(f"{row.right.count('1')} of {len(row.right)} ({task.title.lower()})")
    return f"**Full cache**, exact answers: {', '.join(parts)}."


def _on_lossless(results: Results) -> str:
    sentences = []
    for task in results.tasks:
        shares = [(variant.label, lossless_share(results, task, variant.name)) for variant in VARIANTS]
        reached = [f"{label}: {percent(share)} %" for label, share in shares if share is not None]
        sentences.append(f"{task.title}: " + ("; ".join(f"*{told}*" for told in reached) or "none"))
    told = "the kept share from which on a variant shows none"
    return f"**No clear loss against the full cache**: {told}. {'. '.join(sentences)}."


def _on_comparison(results: Results, comparison: Comparison) -> str:
    kind, _, rest = comparison.choice.partition(": ")
    by_task = []
    for task in results.tasks:
        told = describe(verdicts(results, task, comparison.variant, comparison.other))
        by_task.append(f"{task.title}: {told}{'' if task.asks else _size(results, task, comparison)}")
    return f"**{kind.capitalize()}**: {rest}. {'; '.join(by_task)}.{_example(results, comparison)}"


def _size(results: Results, task: TaskResults, comparison: Comparison) -> str:
    """How much two perplexities differ at most: what is clear need not be large."""
    pairs = [
        [task.perplexity(task.row(name, budget)).value for name in (comparison.variant, comparison.other)]
        for budget in results.settings.budgets
    ]
    return f" (perplexities differ by {max(abs(first - second) for first, second in pairs):.3f} at most)"


def _example(results: Results, comparison: Comparison) -> str:
    """The late-question accuracy of both variants where they are furthest apart, if the difference is clear there."""
    task = results.tasks[0]
    clear = [b for b, v in verdicts(results, task, comparison.variant, comparison.other).items() if v in ("better", "worse")]
    if not clear:
        return ""

    def gap(budget: float) -> float:
        rows = (task.row(name, budget) for name in (comparison.variant, comparison.other))
        first, second = (row.accuracy.value for row in rows)
        return abs(first - second)

    budget = max(clear, key=gap)
    values = [formatted_value(task, task.row(name, budget)) for name in (comparison.variant, comparison.other)]
    return f" Furthest apart on a {task.title.lower()} at {percent(budget)} % kept: {values[0]} % against {values[1]} % exact."


def _on_question(results: Results) -> str:
    """Why the mass score loses late questions, where the numbers bear it out."""
    task = results.tasks[0]
    budget = shown_budgets(results)[-1]
    mass, window = task.row("prefixkv", budget), task.row("window", budget)
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


def _on_spread(results: Results) -> str:
    parts = []
    for score in ("mass", "window"):
        spreads = [(recipe.budget, recipe.spread) for recipe in results.recipes if recipe.score == score]
        (low, at_low), (high, at_high) = min(spreads), max(spreads)
        parts.append(f"{score} score {at_low:.1f} at {percent(low)} % kept, {at_high:.1f} at {percent(high)} %")
    return f"**Spread over layers**, largest over smallest kept share of the recipe: {'; '.join(parts)}."


def _on_text(results: Results) -> str:
    """How little plain text tells about facts: the same variant on both."""
    asked, *_, text = results.tasks
    lowest = min(results.settings.budgets)
    values = {variant.label: text.perplexity(text.row(variant.name, lowest)).value for variant in VARIANTS}
    best, worst = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    full, recency = (text.perplexity(row).value for row in (text.row(FULL.name, 1.0), text.row("recency", lowest)))
    return (
        f"**{text.title}** has a perplexity of {full:.2f} with the full cache; at {percent(lowest)} % kept it is"
        f" {values[best]:.2f} ({best}) to {values[worst]:.2f} ({worst}). It is no measure of what can be looked up: recent"
        f" tokens alone give {recency:.2f} there, and {formatted_value(asked, asked.row('recency', lowest))} % exact"
        f" answers to a {asked.title.lower()}."
    )


def shown_budgets(results: Results) -> tuple[float, ...]:
    """The kept shares that stand for all where there is no room for all."""
    return tuple(budget for budget in (0.2, 0.5) if budget in results.settings.budgets)


def formatted_value(task: TaskResults, row: Row) -> str:
    """Exact answers in % where the task asks, else perplexity; with its interval."""
    return formatted_share(row.accuracy) if task.asks else formatted_ratio(task.perplexity(row))


def formatted_share(estimate: Estimate) -> str:
    """E.g. "75 (69–80)", in %."""
    return f"{percent(estimate.value)} ({percent(estimate.low)}–{percent(estimate.high)})"


def formatted_ratio(estimate: Estimate) -> str:
    """E.g. "1.48 (1.20–2.32)"."""
    return f"{estimate.value:.2f} ({estimate.low:.2f}–{estimate.high:.2f})"
