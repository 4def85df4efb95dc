"""The report on host-resident policies as Markdown, made from the results alone."""

from collections.abc import Iterable

from benchmarks.quality.comparisons import percent
from benchmarks.quality.recall import tables
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.recall.sentences import findings, swept_budget
from benchmarks.quality.results import Results
from benchmarks.quality.tables import policy_rows, quality

IN_SUMMARY = ("freekv", "quest", "arkvale")
ADAPTIVE = "freekv-unimetric"


def recall_markdown(recall: RecallResults, results: Results) -> str:
    """The whole report."""
    cells = tables.measured_cells(recall, results)
    main, budget = recall.main, swept_budget(recall)
    swept = [cell for cell in cells if cell.host.has(recall.in_groups("tau")[0].name, budget)]
    parts = [
        "# Quality with the whole cache on the host",
        _setting(recall, results),
        "## What it shows",
        "\n".join(f"* {sentence}" for sentence in findings(recall, results, cells)),
        "## Quality against what a step attends to",
        _picture("recall_accuracy.png", "Quality against the share of tokens, a panel per task"),
        (
            "Host-resident policies first: all tokens are kept, and a step attends to the share. Then those that drop tokens,"
            " at the same share kept (from [report.md](report.md), on the same documents)."
        ),
        *[part for cell in cells for part in _quality(recall, results, cell)],
        "## The threshold of correction",
        _picture("recall_tau.png", "Quality, corrections and traffic against tau"),
        (
            "From tau -1.01 (never corrected: pages are always one query late) to 1.01 (no speculation: every step chooses by"
            " its own query and waits). KiB are of a whole step, all layers."
        ),
        *[part for cell in swept for share in main.sweep_budgets for part in _tau(recall, cell, share)],
        "## Which heads are corrected",
        _picture("recall_corrected.png", "Steps in which each KV head of each layer is corrected, per tau"),
        (
            "Cosine of a step's query with the one before (mean over steps and a group's query heads), and share of steps in"
            f" which a KV head is corrected, %, at {percent(budget)} % attended, {swept[0].name}:"
        ),
        tables.heads_table(recall, swept[0], budget),
        "## What moves",
        (
            "KiB per decode step over all layers, recalled ahead + waited for, of what the step attends to. Only pages move"
            " that the KV head did not choose in the step before; ahead are those chosen for the query before, waited for those"
            " of corrected KV heads. Filling the working set after the prompt is not counted. The runtime has a quarter more"
            " slots, in which pages may stay for longer, and moves no more than this."
        ),
        *[part for cell in cells for part in _traffic(recall, cell)],
        "## Each choice alone",
        (
            "One sign per share: `+` the first named is better, `-` it is worse, `.` no clear difference, on the same documents"
            " (McNemar's test, mean difference of the loss; 5 % level, no correction for their number)."
        ),
        tables.choice_table(cells, main.budgets),
        "## Page size",
        (
            f"At {percent(budget)} % asked for, {main.context_length} tokens. With large pages sinks and window alone take more"
            " than a small share, and what is left is few pages."
        ),
        tables.page_table(recall, results, budget),
        "## Longer contexts",
        f"Late questions at {percent(budget)} %, exact answers in %:",
        tables.context_table(recall, results, budget),
        "## How it was measured",
        _method(recall, results),
        "## Policies",
        policy_rows(recall.policies),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def recall_section(recall: RecallResults) -> str:
    """What the main report says of it."""
    return (
        f"FreeKV, Quest and ArkVale drop nothing: the cache stays on the host, and a step attends to pages of it. On the same"
        f" documents, attending to as many tokens as others keep, {len(recall.policies)} variants are compared in"
        " [recall.md](recall.md), with what they move and how often they correct.\n\n"
        + _picture("recall_accuracy.png", "Quality against the share of tokens, a panel per task")
    )


def summary_rows(recall: RecallResults, results: Results, budget: float, names: Iterable[str]) -> list[list[str]]:
    """Rows of the summary table: some policies on the tasks called ``names``, empty where they were not measured."""
    cells = {cell.name: cell for cell in tables.measured_cells(recall, results)}
    rows = []
    for name in (*IN_SUMMARY, ADAPTIVE):
        told = []
        for task in names:
            cell = cells.get(task)
            if cell is None or not cell.all.has(name, budget):
                told.append("")
                continue
            row = cell.all.row(name, budget)
            own = f" at {percent(row.mean_kept)} %" if name == ADAPTIVE else ""
            told.append(quality(results, cell.all, row) + own)
        label = "`freekv` with `budget=unimetric`, own budget" if name == ADAPTIVE else f"`{name}`"
        rows.append([f"{label} (all on the host)", *told])
    return rows


def summary_note(recall: RecallResults) -> str:
    """What the summary says about these rows."""
    main = recall.main
    return (
        f"Rows marked so keep every token on the host, and the share is what a step attends to, in pages of {main.page_size}"
        f" tokens, with {recall.sinks} sinks and the last {recall.recent} tokens always among them."
    )


def _picture(name: str, text: str) -> str:
    return f"![{text}]({name})"


def _setting(recall: RecallResults, results: Results) -> str:
    main = recall.main
    return (
        f"{results.model.name} at {main.context_length} tokens in pages of {main.page_size}, where nothing else is said. Every"
        f" policy here keeps all tokens and attends, in a decode step, to {recall.sinks} sinks, the last {recall.recent} tokens"
        " (both in whole pages) and recalled pages, together the share of the prompt's tokens that is named; no layer is exempt"
        " where it is not said. Prompts are read with full attention. What is attended to does not depend on how pages are"
        " moved; so it was measured with all pages in place, and what would have moved was counted. Intervals are 95 %.\n\n"
        f"Made by `{recall.command}` from [recall.json](recall.json) and [results.json](results.json); no number here was"
        " typed. Published systems use pages of 32 tokens, 128 to 512 sinks and as large a window, on models with more heads"
        " and larger ones: expect other numbers there, and measure yours."
    )


def _quality(recall: RecallResults, results: Results, cell: tables.Measured) -> Iterable[str]:
    yield f"### {cell.name.capitalize()}"
    yield f"{len(cell.all.documents)} documents. {'Exact answers, %' if cell.asks else 'Perplexity'}:"
    yield tables.quality_table(recall, results, cell)
    if cell.asks:
        yield "<details><summary>Perplexity of the right answer</summary>"
        yield tables.loss_table(recall, results, cell)
        yield "</details>"


def _tau(recall: RecallResults, cell: tables.Measured, budget: float) -> Iterable[str]:
    yield f"### {cell.name.capitalize()}, {percent(budget)} % attended"
    yield tables.tau_table(recall, cell, budget)


def _traffic(recall: RecallResults, cell: tables.Measured) -> Iterable[str]:
    yield f"### {cell.name.capitalize()}: traffic"
    yield tables.traffic_table(recall, cell, recall.main.budgets)


def _method(recall: RecallResults, results: Results) -> str:
    minutes = sum(cell.elapsed_s for cell in recall.cells) / 60
    versions, machine = recall.versions, recall.machine
    places = dict.fromkeys(
        f"{cell.task} at {cell.context_length}, pages of {cell.page_size}: {len(cell.documents)}" for cell in recall.cells
    )
    lines = (
        "Documents are those of the main report, and the full cache gives the same answers to them in both.",
        f"Documents per task: {'; '.join(places)}.",
        (
            "The right answer is decoded token by token; it comes out of greedy decoding exactly if each of its tokens is"
            " ranked first after those before. So the queries of neighbouring steps are those of real decoding."
        ),
        (
            "Which pages a step chooses is worked out with the functions that the kernel chooses with; that both correct the"
            " same KV heads is checked in every step."
        ),
        "Traffic ahead is per step from the second on; so is all traffic of policies that recall nothing ahead.",
        (
            "FreeKV with ArkVale's ranking, and that with pooledwindow's recipe, were put together after the other policies had"
            " been seen on these very documents: their lead is to be confirmed on others."
        ),
        (
            f"{versions.executor}, trt-kv {versions.trt_kv}, torch {versions.torch}, numpy {versions.numpy}, Python"
            f" {versions.python}; {machine.cpu}, {machine.n_cores} cores, {machine.system}; {minutes:.0f} minutes."
        ),
        f"Model {recall.model_digest}." + (" Not the main report's." if recall.model_digest != results.model.digest else ""),
    )
    return "\n".join(f"* {line}" for line in lines)
