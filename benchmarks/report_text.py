"""The report as Markdown, made from the results file alone."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.report_sentences import findings, formatted_ratio, formatted_share, formatted_value, shown_budgets
from trt_kv.calibration.evaluation import FULL, VARIANTS
from trt_kv.calibration.evaluation_findings import (
    COMPARISONS,
    describe,
    exact_verdicts,
    loss_verdicts,
    lossless_share,
    percent,
    preferred_score,
    signs,
)
from trt_kv.calibration.evaluation_results import Results, Row, TaskResults
from trt_kv.calibration.evaluation_statistics import Verdict, wilson_interval

PICTURES = {"late_question": "late_question.png", "follow_up": "follow_up.png", "plain_text": "plain_text.png"}
LAYERS_PICTURE = "layers.png"
KEPT_PICTURE = "kept.png"
SHOWN = {variant.name: variant.label for variant in (FULL, *VARIANTS)}
SUMMARY_NAMES = {
    "late_question": "the question is at the end of the prompt",
    "follow_up": "questions come after the prompt has been evicted from",
    "plain_text": "text that goes on, nothing looked up",
}


def report_markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        "# Quality against kept share",
        _setting(results),
        "## What it shows",
        "\n".join(f"* {sentence}" for sentence in findings(results)),
        "## Which score when",
        summary_markdown(results),
        "## Each choice alone",
        _comparison_table(results),
        *[part for task in results.tasks for part in _task_section(results, task)],
        "## What the layers keep",
        f"![Kept share of each layer at every budget, and largest over smallest]({LAYERS_PICTURE})",
        _spread_table(results),
        "## Which tokens are kept",
        f"![Mean place of kept tokens, share of the fact and of the question that is kept]({KEPT_PICTURE})",
        "## Memory after the prompt",
        _memory_table(results),
        "## How it was measured",
        _method(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_markdown(results: Results) -> str:
    """The table for the README: which score to take for which use, with the numbers it follows from."""
    budgets = shown_budgets(results)
    header = ["when", "take", *[f"{score}, {percent(b)} % kept" for b in budgets for score in ("mass", "window")], "full cache"]
    rows = [
        [
            SUMMARY_NAMES[task.name],
            _recommendation(preferred_score(results, task)),
            *[formatted_value(task, task.row(name, budget)) for budget in budgets for name in ("prefixkv", "window")],
            formatted_value(task, task.row(FULL.name, 1.0)),
        ]
        for task in results.tasks
    ]
    asked = results.tasks[0]
    measured = (
        f"Bundled model, {results.settings.context_length} tokens; exact answers in % with 95 % intervals"
        f" ({len(asked.documents)} documents for the first row), perplexity for plain text; both scores with their own recipe."
    )
    notes = [measured]
    for name in ("mass", "window"):
        share = lossless_share(results, asked, "prefixkv" if name == "mass" else name)
        told = f"still loses clearly at {percent(max(results.settings.budgets))} % kept"
        if share is not None:
            told = f"shows no clear loss against the full cache from {percent(share)} % kept on"
        notes.append(f"On a {asked.title.lower()} the {name} score {told}.")
    for name, variant, uniform in (("mass", "prefixkv", "mass-uniform"), ("window", "window", "window-uniform")):
        told = describe(exact_verdicts(results, asked, variant, uniform))
        notes.append(f"The {name} score's calibrated layer shares against uniform ones there: {told}.")
    return f"{_table(header, rows)}\n\n{' '.join(notes)}"


def _setting(results: Results) -> str:
    settings, model = results.settings, results.model
    counts = ", ".join(f"{len(task.documents)} × {task.title.lower()}" for task in results.tasks)
    measured = (
        f"{model.name}: {model.n_parameters / 1e6:.1f} M parameters, {model.n_layers} layers. Documents of"
        f" {settings.context_length} tokens ({counts}), none of which the calibration has seen. Each variant evicts once after"
        f" the prompt and by slot reuse while decoding, on the runtime that engines run on. Intervals are 95 %."
    )
    made = (
        f"Made by `{results.command}` from [results.json](results.json); no number here was typed. It is one small model of a"
        " synthetic English: expect the order of the variants to change with the model and the text, and measure yours."
    )
    return f"{measured}\n\n{made}"


def _task_section(results: Results, task: TaskResults) -> Iterable[str]:
    yield f"## {task.title}"
    yield f"{len(task.documents)} documents: {task.description}."
    yield f"![{task.title}: quality against kept share]({PICTURES[task.name]})"
    if task.asks:
        yield "Exact answers, %:"
        yield _budget_table(results, lambda variant, budget: formatted_value(task, task.row(variant, budget)))
        yield "Perplexity of the right answer:"
    else:
        yield "Perplexity:"
    yield _budget_table(results, lambda variant, budget: formatted_ratio(task.perplexity(task.row(variant, budget))))
    if task.asks:
        yield _cell_table(results, task)


def _budget_table(results: Results, cell: Callable[[str, float], str]) -> str:
    budgets = results.settings.budgets
    rows = [[SHOWN[variant.name], *[cell(variant.name, budget) for budget in budgets]] for variant in VARIANTS]
    full = f"Full cache: {cell(FULL.name, 1.0)}."
    return f"{_table(['kept, %', *map(percent, budgets)], rows)}\n\n{full}"


def _cell_table(results: Results, task: TaskResults) -> str:
    """Exact answers by place of the fact and by number of facts, at one kept share."""
    budget = shown_budgets(results)[0]
    regions = sorted({d.region for d in task.documents if d.region}, key=["near", "middle", "far"].index)
    groups: list[tuple[str, list[bool]]] = [(region, [d.region == region for d in task.documents]) for region in regions]
    groups += [(f"{n} facts", [d.n_facts == n for d in task.documents]) for n in results.settings.fact_counts]

    def cell(row: Row, members: Sequence[bool]) -> str:
        answers = [right for right, member in zip(row.answers, members, strict=True) if member]
        return formatted_share(wilson_interval(sum(answers), len(answers)))

    rows = [
        [SHOWN[variant.name], *[cell(task.row(variant.name, budget), members) for _, members in groups]] for variant in VARIANTS
    ]
    told = f"Exact answers at {percent(budget)} % kept, by the third of the document that the fact stands in, and by facts, %:"
    return f"{told}\n\n{_table(['', *[name for name, _ in groups]], rows)}"


def _comparison_table(results: Results) -> str:
    measures: list[tuple[str, TaskResults, Callable[..., dict[float, Verdict]]]] = []
    for task in results.tasks:
        measures += [(f"{task.title}: exact", task, exact_verdicts)] if task.asks else []
        measures.append((f"{task.title}: perplexity", task, loss_verdicts))
    rows = [
        [c.choice, *[f"`{signs(verdicts_of(results, task, c.variant, c.other))}`" for _, task, verdicts_of in measures]]
        for c in COMPARISONS
    ]
    told = (
        f"One sign per kept share, {', '.join(map(percent, results.settings.budgets))} %: `+` the first named is better, `-` it"
        " is worse, `.` no clear difference, on the same documents. Exact answers by McNemar's test, perplexity by the mean"
        " difference of the loss; 5 % level, each kept share by itself, no correction for their number."
    )
    return f"{told}\n\n{_table(['choice', *[name for name, _, _ in measures]], rows)}"


def _spread_table(results: Results) -> str:
    rows = []
    for score in ("mass", "window"):
        recipes = sorted((recipe for recipe in results.recipes if recipe.score == score), key=lambda recipe: recipe.budget)
        rows.append([f"{score}: largest over smallest share", *[f"{recipe.spread:.2f}" for recipe in recipes]])
        rows.append([f"{score}: common mass, %", *[f"{100 * recipe.mass:.1f}" for recipe in recipes]])
    return _table(["kept, %", *map(percent, results.settings.budgets)], rows)


def _memory_table(results: Results) -> str:
    task = results.tasks[0]
    full = task.row(FULL.name, 1.0)
    rows = []
    for variant in (v for v in VARIANTS if v.name in ("prefixkv", "window", "mass-uniform")):
        for name, number in (("tokens", _tokens), ("KiB", _kib)):
            cells = [number(task.row(variant.name, budget)) for budget in results.settings.budgets]
            rows.append([f"{variant.label}: {name}", *cells, number(full)])
    told = (
        f"Held by one sequence after a late question of {results.settings.context_length} tokens, mean over documents. Memory"
        f" is counted in pages of {results.page_size} tokens of one layer ({results.page_bytes} bytes each: keys,"
        " values, positions, scores), of which the last one in each layer is only partly used."
    )
    return f"{told}\n\n{_table(['kept, %', *map(percent, results.settings.budgets), 'full'], rows)}"


def _method(results: Results) -> str:
    settings, versions, machine = results.settings, results.versions, results.machine
    recipes = (
        f"Recipes: {settings.calibration_samples} prompts of the calibration split, each ending in a question, seed"
        f" {settings.calibration_seed}; window score over the last {settings.window} queries."
    )
    documents = (
        f"Late questions: {settings.documents_per_cell} documents for each number of facts"
        f" ({', '.join(map(str, settings.fact_counts))}) and each third of the document for the asked fact; question after"
        f" eviction: {settings.follow_up_documents_per_cell} of each. Evaluation seed {settings.evaluation_seed}."
    )
    measures = (
        "An answer is exact if greedy decoding gives it word for word. Perplexity counts the answer tokens that were predicted"
        " after eviction (in a late question not the first, which the prefill predicts); plain text: the next"
        f" {settings.text_answer_length} tokens."
    )
    intervals = "Intervals: Wilson's for shares; for perplexity the normal approximation of the mean loss over documents."
    kept = (
        "All variants of a kept share hold the same number of tokens, but for rounding and protected tokens. Always kept: the"
        " first and the last token of the prompt, unless the variant says otherwise."
    )
    ran = (
        f"{versions.executor}, trt-kv {versions.trt_kv}, torch {versions.torch}, numpy {versions.numpy}, Python"
        f" {versions.python}; {machine.cpu}, {machine.n_cores} cores, {machine.system}."
    )
    model = f"Model {results.model.digest}."
    return "\n".join(f"* {line}" for line in (recipes, documents, measures, intervals, kept, ran, model))


def _recommendation(score: str) -> str:
    return {"window": "`SCORE=window`", "mass": "`SCORE=mass`"}.get(score, score)


def _tokens(row: Row) -> str:
    return f"{row.kept_tokens:.0f}"


def _kib(row: Row) -> str:
    return f"{row.kv_bytes / 1024:.0f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
