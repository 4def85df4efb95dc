"""The tables of a real model's report, as Markdown, made from the results alone."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.quality.real.contenders import PolicyRow
from benchmarks.quality.real.results import RealResults, TalkRow, is_able
from benchmarks.quality.real.statistics import Key, Marks, mean_over
from benchmarks.quality.tables import table
from trt_kv.calibration.statistics import FEWEST_DOCUMENTS, Estimate

MIB = 1 << 20
NO_RIVALS = ("refreekv",)
"""Published policies that are no rivals at equal bytes, because they choose their bytes themselves."""


TOLD_APART = 0.03
"""What is held is told where it differs by more from the share of a row, as with a threshold."""


def percent(estimate: Estimate) -> str:
    """E.g. "75 (69–80)", in %."""
    return f"{100 * estimate.value:.0f} ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})"


def points(estimate: Estimate) -> str:
    """A difference in percent points, e.g. "−12 (−20 to −4)"; bold if its interval does not contain 0."""
    text = f"{_signed(estimate.value)} ({_signed(estimate.low)} to {_signed(estimate.high)})"
    return text if estimate.low <= 0 <= estimate.high else f"**{text}**"


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")


def marks_of(results: RealResults, mode: str, n_tokens: int, *, primed: bool = False) -> Marks | None:
    """All cells of a mode and a length in which policies are compared; ``primed``: of families that have that mode."""
    cells = [cell for cell in results.compared(mode, n_tokens) if not primed or "primed" in results.family(cell.family).modes]
    return Marks(tuple(cells)) if cells else None


def capability_table(results: RealResults) -> str:
    """The mean mark of the full cache per family and length, and the number of documents; "left out" below the limit."""
    lengths = [plan.n_tokens for plan in results.settings.lengths]

    def told(family: str, n_tokens: int) -> str:
        cells = [cell for cell in results.tried if (cell.family, cell.n_tokens) == (family, n_tokens)]
        if not cells:
            return "not measured"
        value = f"{100 * float(np.mean(cells[0].full.marks)):.0f} ({cells[0].n_documents})"
        return value if is_able(cells, results.settings) else f"*{value}, left out*"

    rows = [[family.title, family.description, *[told(family.name, n) for n in lengths]] for family in results.families]
    return table(["family", "what is asked", *[f"{n} tokens" for n in lengths]], rows)


def share_table(results: RealResults, marks: Marks, budgets: Sequence[float]) -> str:
    """The mean mark of every policy at every share."""
    rows = []
    for policy in results.policies:
        keys: list[Key] = (
            [(policy.name, None)] if policy.name == "full" or policy.adaptive else [(policy.name, b) for b in budgets]
        )
        shown = [_with_kept(marks, key, percent(marks.mean(key))) if key in marks.keys else "" for key in keys]
        own = [shown[0]] if keys[0][1] is None else []
        rows.append([label(policy), *([""] * len(budgets) if own else shown), *(own or [""])])
    return table(["kept", *[f"{100 * budget:g} %" for budget in budgets], "own budget"], rows)


def _with_kept(marks: Marks, key: Key, text: str) -> str:
    """``text``, with what is held unless that is about the share of the row."""
    kept = marks.mean_of(key, "kept")
    is_told = kept is None or (key[1] is not None and abs(kept - key[1]) <= TOLD_APART)
    return text if is_told else f"{text} at {100 * (kept or 0.0):.0f} %"


def label(policy: PolicyRow) -> str:
    """E.g. "`prefixkv` (ours)"."""
    note = {"ours": " (ours)", "host": " (all on the host)"}.get(policy.group, "")
    return f"`{policy.name}`{note}"


def rival_table(results: RealResults, marks: Marks, budget: float) -> str:
    """At one share: the mark, differences to the full cache and to the best published policy of no more bytes, bytes."""
    published = [policy.name for policy in results.policies if policy.group == "published" and policy.name not in NO_RIVALS]
    rows = []
    for policy in results.policies:
        key: Key = (policy.name, None if policy.adaptive or policy.name == "full" else budget)
        if key not in marks.keys:
            continue
        rival = marks.best_with_no_more_bytes(key, published) if policy.group in ("ours", "published") else None
        moved = marks.mean_of(key, "moved_bytes") or 0.0
        rows.append(
            [
                label(policy),
                percent(marks.mean(key)),
                "" if policy.name == "full" else points(marks.difference(key, ("full", None))),
                "" if rival is None else f"{points(marks.difference(key, rival))} `{rival[0]}` {100 * (rival[1] or 0):g} %",
                f"{(marks.mean_of(key, 'kv_bytes') or 0.0) / MIB:.1f}",
                f"{moved / MIB:.1f}" if moved else "",
                f"{marks.mean_of(key, 'n_generated') or 0.0:.1f}",
            ]
        )
    header = [
        "policy",
        "mark, %",
        "to full",
        "to the best published of no more bytes",
        "MiB held",
        "MiB moved",
        "tokens generated",
    ]
    return table(header, rows)


def compact_table(results: RealResults, budgets: Sequence[float]) -> str:
    """For docs/policies.md: both protocols at a few shares, conversations on compressed tokens, plain text."""
    n_tokens = results.settings.main.n_tokens
    found = {mode: marks_of(results, mode, n_tokens) for mode in ("aware", "agnostic")}
    known = {mode: marks for mode, marks in found.items() if marks is not None}
    names = {"aware": "question read before", "agnostic": "question asked after"}
    rows = []
    for policy in results.policies:
        shown = []
        for marks in known.values():
            own = policy.adaptive or policy.name == "full"
            for at, budget in enumerate(budgets):
                key: Key = (policy.name, None if own else budget)
                text = _with_kept(marks, key, percent(marks.mean(key))) if key in marks.keys else ""
                shown.append("" if own and at else text)
        rows.append([label(policy), *shown, _talked(results, policy)])
    header = [f"{names[mode]}, {100 * budget:g} % kept" for mode in known for budget in budgets]
    return table(["policy", *header, "20 questions in turn"], rows)


def _talked(results: RealResults, policy: PolicyRow) -> str:
    """Right answers of conversations on compressed tokens."""
    found = [row for row in results.talks if (row.policy, row.mode) == (policy.name, "compressed")]
    return percent(mean_over([_right(of) for of in found[0].right])) if found else ""


def family_table(results: RealResults, mode: str, n_tokens: int, budget: float) -> str:
    """The mean mark per family at one share."""
    cells = results.compared(mode, n_tokens)
    rows = []
    for policy in results.policies:
        key: Key = (policy.name, None if policy.adaptive or policy.name == "full" else budget)
        found = [cell.row(*key) for cell in cells]
        if any(row is not None for row in found):
            rows.append([label(policy), *["" if row is None else f"{100 * float(np.mean(row.marks)):.0f}" for row in found]])
    rows.append(["questions", *[str(len(cell.documents)) for cell in cells]])
    return table(["policy", *[results.family(cell.family).title for cell in cells]], rows)


def read_table(results: RealResults, n_tokens: int, budget: float) -> str:
    """The mean mark, and how much of the fact is held, by what had been read before tokens were evicted."""
    found = {mode: marks_of(results, mode, n_tokens, primed=True) for mode in ("agnostic", "aware", "primed")}
    known = {mode: marks for mode, marks in found.items() if marks is not None}
    rows = []
    for policy in results.policies:
        key: Key = (policy.name, None if policy.adaptive or policy.name == "full" else budget)
        if policy.group == "host" or not all(key in marks.keys for marks in known.values()):
            continue
        rows.append([label(policy), *[f"{percent(marks.mean(key))}, {_fact(marks, key)}" for marks in known.values()]])
    names = {"agnostic": "the context", "aware": "and the question", "primed": "and the answer's first words"}
    return table(["read before", *[names[mode] for mode in known]], rows)


def _fact(marks: Marks, key: Key) -> str:
    share = marks.mean_of(key, "fact_kept")
    return "" if share is None else f"holds {100 * share:.0f} %"


def length_table(results: RealResults, mode: str, budget: float) -> str:
    """The mean mark at one share, a column per length."""
    found = {plan.n_tokens: marks_of(results, mode, plan.n_tokens) for plan in results.settings.lengths}
    known = {n_tokens: marks for n_tokens, marks in found.items() if marks is not None}
    rows = []
    for policy in results.policies:
        key: Key = (policy.name, None if policy.adaptive or policy.name == "full" else budget)
        shown = [_with_kept(marks, key, percent(marks.mean(key))) if key in marks.keys else "" for marks in known.values()]
        if any(shown):
            rows.append([label(policy), *shown])
    rows.append(["documents", *[str(marks.n_documents) for marks in known.values()]])
    return table(["tokens", *map(str, known)], rows)


def text_table(results: RealResults) -> str:
    """Perplexity of the tokens after a prompt, divided by that of the full cache."""
    if not results.texts:
        return "Not measured yet."
    full = next(row for row in results.texts if row.policy == "full")
    n_tokens = results.settings.text_tokens - 1
    budgets = results.settings.main.budgets
    rows = []
    for policy in results.policies:
        of = {row.budget: row for row in results.texts if row.policy == policy.name}
        if not of:
            continue
        ratios = {
            budget: mean_over([(a - b) / n_tokens for a, b in zip(row.losses, full.losses, strict=True)])
            for budget, row in of.items()
        }
        shown = {budget: _ratio(estimate, len(full.losses)) for budget, estimate in ratios.items()}
        rows.append([label(policy), *[shown.get(budget, "") for budget in budgets], shown.get(None, "")])
    return table(["kept", *[f"{100 * budget:g} %" for budget in budgets], "own budget"], rows)


def _ratio(of_log: Estimate, n_texts: int) -> str:
    """A ratio from an estimate of its logarithm; without interval if there are too few texts for one."""
    if n_texts < FEWEST_DOCUMENTS:
        return f"{np.exp(of_log.value):.2f}"
    return f"{np.exp(of_log.value):.2f} ({np.exp(of_log.low):.2f}–{np.exp(of_log.high):.2f})"


def talk_table(results: RealResults) -> str:
    """Right answers over all turns, in the first and the last quarter of them, and the most that was held, per mode."""
    if not results.talks:
        return "Not measured yet."
    rows = []
    for row in results.talks:
        policy = results.policy(row.policy)
        share = "own" if row.budget is None else f"{100 * row.budget:g} %"
        rows.append(
            [
                label(policy),
                "" if row.policy == "full" else share,
                row.mode,
                percent(mean_over([_right(of) for of in row.right])),
                f"{100 * _over(row, lambda of: _right(of[: len(of) // 4 or 1])):.0f}",
                f"{100 * _over(row, lambda of: _right(of[-(len(of) // 4 or 1) :])):.0f}",
                f"{100 * max(row.most_held):.0f}",
                str(len(row.right)),
            ]
        )
    header = ["policy", "kept", "mode", "right, %", "first quarter", "last quarter", "most held, %", "documents"]
    return table(header, rows)


def _right(turns: str) -> float:
    return turns.count("1") / len(turns)


def _over(row: TalkRow, value: Callable[[str], float]) -> float:
    return float(np.mean([value(of) for of in row.right]))
