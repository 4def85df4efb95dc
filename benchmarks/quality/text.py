"""The report as Markdown, made from the results alone."""

from collections.abc import Iterable

from benchmarks.quality import tables
from benchmarks.quality.cell import Cell
from benchmarks.quality.comparisons import against_the_best, by_answers, describe, percent
from benchmarks.quality.recall import text as recall_text
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import PolicyFacts, Results
from benchmarks.quality.sentences import asking_cells, findings, main_cells


def report_markdown(results: Results, recall: RecallResults) -> str:
    """The whole report but what ``recall.text`` says."""
    budget = summary_budget(results)
    parts = [
        "# Quality against kept share",
        _setting(results),
        "## Which policy when",
        summary_markdown(results, recall),
        "## What it shows",
        "\n".join(f"* {sentence}" for sentence in findings(results)),
        "## What the model can do",
        (
            f"Exact answers of the full cache in %, perplexity of plain text. In italics: under"
            f" {percent(results.settings.capable_from)} %, and so left out of every comparison below."
        ),
        _picture("capability.png", "Exact answers of the full cache per task and context"),
        tables.capability_table(results),
        "## Quality against the kept share",
        _picture("accuracy.png", "Exact answers against the kept share, a panel per task"),
        _picture("perplexity.png", "Perplexity of the right answer against the kept share, a panel per task"),
        _picture("agreement.png", "Greedy tokens as with the full cache against the kept share, a panel per task"),
        *[part for cell in results.compared() for part in _task_section(results, cell)],
        "## The whole cache on the host",
        recall_text.recall_section(recall),
        "## Shorter and longer contexts",
        _picture("contexts.png", "Exact answers against the context, a panel per task"),
        f"Late questions (of the tasks that the model can do there) at {percent(budget)} % kept, exact answers in %:",
        tables.context_table(results, budget),
        "## Budgets found from the input",
        _picture("budgets.png", "Budget of each document, per task and context"),
        *[
            part
            for policy in results.in_groups("published", "ours")
            if policy.adaptive
            for part in _own_budget(results, policy)
        ],
        "## ReFreeKV's threshold",
        _picture("thresholds.png", "Kept share and exact answers against the threshold"),
        tables.threshold_table(results),
        "## ReFreeKV's parts",
        _picture("ablations.png", "Exact answers and kept share of ReFreeKV with one part replaced"),
        "Quality, and the share that is kept:",
        tables.ablation_table(results),
        (
            "Attention of the last prompt query on the first 4 tokens, %, mean over heads and documents: where there is hardly"
            " any, it makes no difference whether the norm takes the sinks in."
        ),
        tables.sink_table(results),
        "## Each choice alone",
        _choices(results),
        tables.choice_table(results),
        "## What the layers keep",
        _picture("layers.png", "Kept share of each layer"),
        "Largest over smallest kept share of a layer, in each recipe:",
        tables.recipe_table(results),
        "## Which tokens are kept",
        _picture("kept.png", "Mean place of kept tokens, share of the fact and of the question that is kept"),
        "## Memory after the prompt",
        (
            f"KiB held by one sequence after a prompt of {results.settings.main_context} tokens. Memory is counted in pages"
            f" of {results.page_size} tokens of one layer ({results.page_bytes} bytes each: keys, values, positions, scores),"
            " of which the last one in each layer is only partly used."
        ),
        tables.memory_table(results),
        "## Seeds",
        f"Late questions at {percent(budget)} % kept, exact answers in %, the documents of each seed by themselves:",
        tables.seed_table(results, budget),
        "## How it was measured",
        _method(results),
        "## Policies",
        tables.policy_table(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_budget(results: Results) -> float:
    """The kept share that stands for all where there is no room for all."""
    return min(results.settings.budgets, key=lambda budget: abs(budget - 0.2))


def summary_markdown(results: Results, recall: RecallResults) -> str:
    """The table for the README: every policy on every kind of task at one kept share, or at its own budget."""
    budget = summary_budget(results)
    cells = main_cells(results)
    rows = [["`full`", *[tables.quality(results, cell, cell.full) for _, cell in cells]]]
    for policy in results.in_groups("ours", "published"):
        told = []
        for _, cell in cells:
            row = cell.row(policy.name, budget)
            told.append(tables.quality(results, cell, row) + (f" at {percent(row.mean_kept)} %" if policy.adaptive else ""))
        name = f"`{policy.name}`" + (" (ours)" if policy.group == "ours" else "")
        rows.append([f"{name}, own budget" if policy.adaptive else name, *told])
    rows += recall_text.summary_rows(recall, results, budget, [name for name, _ in cells])
    counts = ", ".join(f"{len(cell.documents)} {name}" for name, cell in cells)
    notes = [
        (
            f"Bundled model, {results.settings.main_context} tokens, {percent(budget)} % of the cache kept or what the policy"
            f" finds; exact answers in % with 95 % intervals, perplexity for plain text. Documents: {counts}."
        ),
        recall_text.summary_note(recall),
    ]
    for policy in results.in_groups("ours"):
        if not policy.adaptive:
            told_ours = [
                f"{name} {describe(against_the_best(results, cell, policy.name, by_answers))}"
                for name, cell in asking_cells(results)
            ]
            notes.append(f"`{policy.name}` against whichever published policy is best at a kept share: {'; '.join(told_ours)}.")
    header = ["policy", *[name for name, _ in cells]]
    return f"{tables.table(header, rows)}\n\n{' '.join(notes)}"


def _picture(name: str, text: str) -> str:
    return f"![{text}]({name})"


def _setting(results: Results) -> str:
    settings, model = results.settings, results.model
    contexts = ", ".join(str(plan.context_length) for plan in settings.contexts)
    measured = (
        f"{model.name}: {model.n_parameters / 1e6:.1f} M parameters, {model.n_layers} layers. {len(results.tasks)} tasks at"
        f" {contexts} tokens; {settings.main_context} where nothing else is said. No document has been seen by the calibration."
        " Every policy evicts as its engine does, after the prompt and while decoding, on the runtime that engines run on."
        " Intervals are 95 %."
    )
    made = (
        f"Made by `{results.command}` from [results.json](results.json); no number here was typed. It is one small model of a"
        " synthetic English: expect the order of the policies to change with the model and the text, and measure yours."
    )
    return f"{measured}\n\n{made}"


def _task_section(results: Results, cell: Cell) -> Iterable[str]:
    task = results.task(cell.task)
    policies = results.in_groups("published", "ours")
    yield f"### {task.title}"
    yield f"{len(cell.documents)} documents: {task.description}."
    if task.asks:
        yield "Exact answers, %:"
        yield tables.budget_table(results, cell, policies, lambda row: tables.share(row.accuracy))
    yield "<details><summary>Perplexity, and agreement with the full cache</summary>"
    yield "Perplexity of the right answer:" if task.asks else "Perplexity:"
    yield tables.budget_table(results, cell, policies, lambda row: tables.ratio(cell.perplexity(row)))
    yield "Greedy tokens as with the full cache, %:"
    yield tables.budget_table(results, cell, policies, lambda row: tables.share(cell.agreement(row)))
    yield "</details>"


def _own_budget(results: Results, policy: PolicyFacts) -> Iterable[str]:
    yield f"### {policy.label}"
    yield (
        "Kept share, mean over documents and its range; quality beside the full cache's; and policies with a kept share at the"
        " largest measured one that is not above this mean (exact answers in %, perplexity for plain text):"
    )
    yield tables.own_budget_table(results, policy)


def _choices(results: Results) -> str:
    return (
        f"One sign per kept share, {', '.join(map(percent, results.settings.budgets))} %: `+` the first named is better, `-` it"
        " is worse, `.` no clear difference, on the same documents. Exact answers by McNemar's test, perplexity by the mean"
        " difference of the loss; 5 % level, each kept share by itself, no correction for their number."
    )


def _method(results: Results) -> str:
    settings, versions, machine = results.settings, results.versions, results.machine
    minutes = sum(cell.elapsed_s for cell in results.cells) / 60
    documents = "; ".join(
        f"{plan.context_length} tokens: {len(settings.seeds) * plan.documents_per_seed} per task, kept shares"
        f" {', '.join(map(percent, plan.budgets))} %"
        for plan in settings.contexts
    )
    lines = (
        f"Documents, drawn with the seeds {', '.join(map(str, settings.seeds))}: {documents}.",
        *[f"{task.title}: {task.description}." for task in results.tasks],
        f"Many facts and distractors: {settings.most_facts}, or one per 32 tokens where that is less.",
        (
            f"Recipes: {settings.calibration_samples} prompts of {settings.calibration_context} tokens of the calibration"
            f" split, each ending in a question, seed {settings.calibration_seed}; the same recipes at every context."
        ),
        (
            "An answer is exact if greedy decoding gives it word for word. Perplexity and agreement count the answer's tokens"
            " that were predicted after eviction (in a late question not the first, which the prefill predicts)."
        ),
        (
            "Intervals: Wilson's for exact answers; for the others the normal approximation over documents. Documents of all"
            " seeds count alike; random policies draw other lots for each document."
        ),
        (
            "A kept share is of the prompt's tokens in all layers and KV heads. Policies of one kept share hold the same number"
            " of tokens, but for rounding and protected tokens; where these are more, what is kept stands beside the result."
        ),
        (
            f"{versions.executor}, trt-kv {versions.trt_kv}, torch {versions.torch}, numpy {versions.numpy}, Python"
            f" {versions.python}; {machine.cpu}, {machine.n_cores} cores, {machine.system}; {minutes:.0f} minutes."
        ),
        f"Model {results.model.digest}.",
    )
    return "\n".join(f"* {line}" for line in lines)
