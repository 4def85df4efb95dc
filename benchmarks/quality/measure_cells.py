"""Measures the cells of a report: one task at one context, first the full cache alone, then every policy."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.cases import Case, Encode, case_from_task
from benchmarks.quality.cell import Cell, Document, Row
from benchmarks.quality.effort import Effort, seconds_of_comparison, seconds_of_full
from benchmarks.quality.harness import Harness, Outcome, Plan
from benchmarks.quality.policies import Contender
from benchmarks.quality.recipes import Recipes, recipe_kind
from benchmarks.quality.settings import Settings
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import ReportTask


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row to be measured: a contender at a mean kept share, None if its budget is adaptive."""

    contender: Contender
    budget: float | None

    def plan(self, recipes: Recipes, lots: int) -> Plan:
        """The policy as in an engine; ``lots`` is the seed of random scores."""
        policy = self.contender.policy
        if "seed" in policy.scoring.settings:
            policy = dataclasses.replace(policy, seed=lots)
        if self.budget is None:
            return Plan(policy=policy)
        policy = dataclasses.replace(policy, kept=self.budget)
        if not policy.needs_recipe or self.contender.searches:
            return Plan(policy=policy, searches=self.contender.searches)
        return Plan(policy=policy, kept_shares=recipes.kept(recipe_kind(self.contender.recipe_policy), self.budget))


@dataclass(frozen=True, kw_only=True)
class CellMeasurer:
    """Everything needed to measure cells; the first contender is the full cache."""

    harness: Harness
    encode: Encode
    settings: Settings
    contenders: Sequence[Contender]
    recipes: Recipes
    store: Store
    effort: Effort

    def entries(self, context_length: int) -> list[Entry]:
        """The rows of a context, the full cache first."""
        plan = self.settings.at(context_length)
        found = [Entry(contender=self.contenders[0], budget=None)]
        for contender in self.contenders:
            if contender.group in plan.groups:
                budgets: Sequence[float | None] = [None] if contender.adaptive else plan.budgets
                found += [Entry(contender=contender, budget=budget) for budget in budgets]
        return found

    def capability(self, task: ReportTask, context_length: int) -> Cell:
        """The row of the full cache alone."""
        return self.store.get_or_measure(
            self._capability_name(task, context_length),
            Cell,
            lambda: self._measured(
                task, context_length, self.entries(context_length)[:1], lambda case, _: ([self.harness.full(case)], ())
            ),
            **self._asked(task, context_length),
        )

    def comparison(self, task: ReportTask, context_length: int, capability: Cell) -> Cell:
        """Every row, of which the first must be that of ``capability``, whose time is added."""
        entries = self.entries(context_length)

        def run(case: Case, number: int) -> tuple[list[Outcome], tuple[float, ...]]:
            return self.harness.run(case, [entry.plan(self.recipes, lots=number) for entry in entries])

        cell = self.store.get_or_measure(
            _name(task, context_length),
            Cell,
            lambda: self._measured(task, context_length, entries, run),
            **self._compared(task, context_length),
        )
        assert cell.full.right == capability.full.right, "the full cache answers alike, alone or beside others"
        return dataclasses.replace(cell, elapsed_s=round(cell.elapsed_s + capability.elapsed_s, 1))

    def minutes_of(self, places: Sequence[tuple[ReportTask, int]]) -> float:
        """Estimated minutes for the cells at ``places`` (tasks and contexts) that are not stored yet; 0 for none.

        Adds them to the plan of ``effort``, and times one document.
        """
        for task, context_length in places:
            n_documents = len(self.settings.seeds) * self.settings.at(context_length).documents_per_seed
            is_known = self.store.has(self._capability_name(task, context_length), **self._asked(task, context_length))
            if not is_known:
                self.effort.plan(n_documents * self._seconds(task, context_length, 1))
            elif not self.settings.can(self.capability(task, context_length), asks=task.facts.asks):
                continue
            if not self.store.has(_name(task, context_length), **self._compared(task, context_length)):
                self.effort.plan(n_documents * self._seconds(task, context_length, len(self.entries(context_length))))
        if not self.effort.planned_s:
            return 0.0
        task, context_length = places[0][0], self.settings.main_context
        entries = self.entries(context_length)
        (case, *_) = cases_of(task, self.settings, context_length, self.encode)
        plans = [entry.plan(self.recipes, lots=0) for entry in entries]
        self.harness.run(case, plans)  # compiles everything that is compiled at its first call
        return self.effort.minutes_here(
            self._seconds(task, context_length, len(entries)), lambda: self.harness.run(case, plans)
        )

    def _measured(
        self,
        task: ReportTask,
        context_length: int,
        entries: Sequence[Entry],
        run: Callable[[Case, int], tuple[list[Outcome], tuple[float, ...]]],
    ) -> Cell:
        start = time.perf_counter()
        cases = cases_of(task, self.settings, context_length, self.encode)
        found = []
        for number, case in enumerate(cases):
            found.append(run(case, number))
            self.effort.finish(self._seconds(task, context_length, len(entries)))
        outcomes = [of_case for of_case, _ in found]
        return Cell(
            task=task.name,
            context_length=context_length,
            documents=documents_of(cases, self.settings, context_length),
            sink_mass=tuple(np.mean([mass for _, mass in found], axis=0).round(4).tolist()) if found[0][1] else (),
            rows=tuple(
                row_of(entry, cases, [of_case[i] for of_case in outcomes], [of_case[0] for of_case in outcomes])
                for i, entry in enumerate(entries)
            ),
            elapsed_s=round(time.perf_counter() - start, 1),
        )

    def _seconds(self, task: ReportTask, context_length: int, n_rows: int) -> float:
        n_fed = task.n_fed(self.settings)
        if n_rows == 1:
            return seconds_of_full(context_length, n_fed)
        return seconds_of_comparison(context_length, n_fed, n_rows)

    def _capability_name(self, task: ReportTask, context_length: int) -> str:
        return f"full-{_name(task, context_length)}"

    def _asked(self, task: ReportTask, context_length: int) -> dict[str, Any]:
        return what_is_asked(task, self.settings, context_length)

    def _compared(self, task: ReportTask, context_length: int) -> dict[str, Any]:
        """Everything that determines the rows of a context: every policy, in full."""
        plans = [(entry.contender.name, entry.plan(self.recipes, lots=0)) for entry in self.entries(context_length)]
        return {**self._asked(task, context_length), "policies": [[name, repr(plan)] for name, plan in plans]}


def what_is_asked(task: ReportTask, settings: Settings, context_length: int) -> dict[str, Any]:
    """Everything that determines the answers of the full cache: every document, and which part of it precedes eviction."""
    documents = repr((task.question_known, task.documents(settings, context_length)))
    return {"documents": hashlib.sha256(documents.encode()).hexdigest(), "seeds": list(settings.seeds)}


def cases_of(task: ReportTask, settings: Settings, context_length: int, encode: Encode) -> list[Case]:
    """A task's documents at a context as token ids."""
    tasks = task.documents(settings, context_length)
    return [case_from_task(one, encode, question_known=task.question_known) for one in tasks]


def documents_of(cases: Sequence[Case], settings: Settings, context_length: int) -> tuple[Document, ...]:
    """The entry in the results for each of ``cases_of``."""
    per_seed = settings.at(context_length).documents_per_seed
    return tuple(
        Document(
            seed=settings.seeds[number // per_seed],
            n_prompt_tokens=len(case.prompt),
            n_counted_tokens=len(case.fed) - case.first_counted,
        )
        for number, case in enumerate(cases)
    )


def _name(task: ReportTask, context_length: int) -> str:
    return f"{task.name}-{context_length}"


def row_of(entry: Entry, cases: Sequence[Case], outcomes: Sequence[Outcome], full: Sequence[Outcome]) -> Row:
    """One row from an outcome per case, with agreement counted against those of the full cache."""
    n_layers = len(outcomes[0].kept_by_layer)
    pairs = zip(cases, outcomes, full, strict=True)
    agreed = [
        sum(a == b for a, b in zip(mine.tokens[case.first_counted :], theirs.tokens[case.first_counted :], strict=True))
        for case, mine, theirs in pairs
    ]
    kept = [outcome.kept_tokens / (n_layers * len(case.prompt)) for case, outcome in zip(cases, outcomes, strict=True)]
    return Row(
        policy=entry.contender.name,
        budget=entry.budget,
        right="".join("1" if outcome.right else "0" for outcome in outcomes),
        losses=tuple(float(f"{outcome.loss:.4g}") for outcome in outcomes),
        agreed=tuple(agreed),
        kept=tuple(round(share, 4) for share in kept),
        kept_by_layer=tuple(np.mean([outcome.kept_by_layer for outcome in outcomes], axis=0).round(4).tolist()),
        kv_bytes=float(round(np.mean([outcome.kv_bytes for outcome in outcomes]))),
        kept_place=round(float(np.mean([outcome.kept_place for outcome in outcomes])), 4),
        fact_kept=_mean_known([outcome.fact_kept for outcome in outcomes]),
        question_kept=_mean_known([outcome.question_kept for outcome in outcomes]),
    )


def _mean_known(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(float(np.mean(known)), 4) if known else None
