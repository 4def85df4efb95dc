"""Measures everything that the report of a real model needs, a document at a time, so that it can be interrupted."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.quality.harness import Plan
from benchmarks.quality.real.answering import Answered, Answerer, Question
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.clock import Clock
from benchmarks.quality.real.contenders import Contender, Entry, entries_of
from benchmarks.quality.real.families import Family
from benchmarks.quality.real.items import Item
from benchmarks.quality.real.known import Known, part_name
from benchmarks.quality.real.marking import mark
from benchmarks.quality.real.results import MarkCell, MarkRow, is_able, joined
from benchmarks.quality.real.settings import LengthPlan, RealSettings
from benchmarks.quality.recipes import Recipes
from benchmarks.quality.store import Store
from trt_kv.digests import document_digest

T = TypeVar("T")
FOR_CELLS, FOR_TEXTS = 0.6, 0.7
"""Shares of the time by the end of which cells, and then texts, are given up; of what the cells have, each length but the last
leaves a third to those after it."""
TEXTS, TALKS = "texts", "talks"
N_TRIED = 3
"""Documents of a family that the full cache answers before policies are compared on it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cell of the report."""

    family: Family
    mode: str
    n_tokens: int

    def part(self, document: str) -> str:
        """What a document of the cell is stored as."""
        return part_name(self.family.name, self.mode, self.n_tokens, document)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Cells: the full cache alone, on the first documents, and every policy, where the full cache can do the family."""

    tried: tuple[MarkCell, ...]
    compared: tuple[MarkCell, ...]


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """What cells are measured with. ``out_of_time``: whether to stop before the next document. ``earlier``: what need not be
    measured again. ``only``: the parts of the report, by ``parts_of``, that are measured, if not all are; of the others there
    is what is stored.
    """

    answerer: Answerer
    asker: Asker
    settings: RealSettings
    known: Sequence[Contender]
    recipes: Recipes
    store: Store
    clock: Clock
    out_of_time: Callable[[], bool]
    tell: Callable[[str], None]
    earlier: Known = field(default_factory=Known.nothing)
    only: frozenset[str] = frozenset()

    def within(self, share: float, part: str) -> "Measurer":
        """The same, which stops when this share of the time is over; of chosen parts the last may take all. Of a part that is
        not measured, it stops at once.
        """
        if self.only:
            share = (1.0 if part == self._last else share) if part in self.only else 0.0
        return dataclasses.replace(self, out_of_time=self.clock.until(share))

    @property
    def _last(self) -> str:
        return [part for part in parts_of(self.settings) if part in self.only][-1]

    def cells(self, families: Sequence[Family]) -> Measured:
        """As many documents of every cell as there is time for.

        Length after length: first what the full cache can do, then a document of every such cell, then the next of each.
        """
        tried: list[MarkCell] = []
        compared: list[MarkCell] = []
        share = 0.0
        for plan in self.settings.lengths:
            share += (FOR_CELLS - share) * (1.0 if plan is self.settings.lengths[-1] else 2 / 3)
            of_length = self.within(share, str(plan.n_tokens))._cells_of(families, plan)
            tried += of_length.tried
            compared += of_length.compared
        return Measured(tried=tuple(tried), compared=tuple(compared))

    def _cells_of(self, families: Sequence[Family], plan: LengthPlan) -> Measured:
        tried = {family.name: self._tried(family, plan) for family in families}
        able = [family for family in families if tried[family.name] and is_able(tried[family.name], self.settings)]
        places = [Place(family=of, mode=mode, n_tokens=plan.n_tokens) for of in able for mode in of.facts.modes]
        found: dict[str, list[MarkCell]] = {place.part(""): [] for place in places}
        for document in range(plan.n_documents):
            for place in (place for place in places if document % place.family.every == 0):
                found[place.part("")] += self._compared(place, plan, document)
        return Measured(
            tried=tuple(joined(cells) for cells in tried.values() if cells),
            compared=tuple(joined(cells) for cells in found.values() if cells),
        )

    def _tried(self, family: Family, plan: LengthPlan) -> list[MarkCell]:
        """The full cache alone on the first documents, for which it makes no difference when the question is read."""
        entry = entries_of(self.known[:1], plan.budgets, ())[0]
        place = Place(family=family, mode="agnostic", n_tokens=plan.n_tokens)
        found = []
        for document in range(min(N_TRIED, plan.n_documents)):
            found += self._part(
                place, place.part(f"full-{document}"), document, [entry], lambda asked, _: [self.answerer.full(asked)]
            )
        return found

    def _compared(self, place: Place, plan: LengthPlan, document: int) -> list[MarkCell]:
        entries = entries_of(self.known, plan.budgets, self.settings.recall_budgets)
        return self._part(place, place.part(f"{document}"), document, entries, self.answerer.answers)

    def rows(
        self,
        name: str,
        row_of: type[T],
        entries: Sequence[Entry],
        plans: Sequence[Plan],
        measure: Callable[[Sequence[int]], Sequence[T]],
        n_prompt: Sequence[int] | None = None,
        **conditions: object,
    ) -> list[T] | None:
        """The row of each entry in the part ``name``: read back, or measured and stored, which ``measure`` does for the entries
        of these numbers. None if there is no time left for what is missing. ``n_prompt``: tokens of each question, if any.
        """
        keys = [_stored_as(entry, plan) for entry, plan in zip(entries, plans, strict=True)]
        rows = self.store.rows(name, row_of, **conditions)
        earlier = self.earlier.rows(name, n_prompt)
        rows |= {key: earlier[of.key] for key, of in zip(keys, entries, strict=True) if of.key in earlier and key not in rows}
        missing = [i for i, key in enumerate(keys) if key not in rows]
        if missing:
            if self.out_of_time():
                return None
            start = time.perf_counter()
            rows |= {keys[i]: row for i, row in zip(missing, measure(missing), strict=True)}
            self.store.put_rows(name, rows, **conditions)
            self.tell(f"{name}: {len(missing)} rows, {time.perf_counter() - start:.0f} s")
        return [rows[key] for key in keys]

    def _part(
        self,
        place: Place,
        name: str,
        document: int,
        entries: Sequence[Entry],
        answers: Callable[[Question, Sequence[Plan]], list[Answered]],
    ) -> list[MarkCell]:
        """A document of a cell: read back, and what is missing measured; nothing if there is no time left for that."""
        items = place.family.items(self.asker.encode, place.n_tokens, document)
        plans = [entry.contender.plan(self.recipes, entry.budget, lots=document) for entry in entries]
        asked = [self.asker.question(item, place.mode) for item in items]

        def measured(missing: Sequence[int]) -> list[MarkRow]:
            found = [answers(question, [plans[i] for i in missing]) for question in asked]
            return [_row(entries[i], items, [of[at] for of in found], self.asker) for at, i in enumerate(missing)]

        n_prompt = tuple(len(question.prompt) for question in asked)
        rows = self.rows(name, MarkRow, entries, plans, measured, n_prompt, items=[repr(item) for item in items])
        if rows is None:
            return []
        cell = MarkCell(
            family=place.family.name,
            mode=place.mode,
            n_tokens=place.n_tokens,
            documents=(document,) * len(items),
            n_prompt=n_prompt,
            rows=tuple(rows),
        )
        return [cell]


def parts_of(settings: RealSettings) -> list[str]:
    """What a report has, in the order in which it is measured: its lengths, ``TEXTS``, ``TALKS``."""
    return [*(str(plan.n_tokens) for plan in settings.lengths), TEXTS, TALKS]


def _stored_as(entry: Entry, plan: Plan) -> str:
    """The key of a row in the store: the policy's name and what is not its default, so that an option that is added to policies
    leaves other rows as they are."""
    fields = dataclasses.fields(plan.policy)
    given = {field.name: value for field in fields if (value := getattr(plan.policy, field.name)) != field.default}
    key = f"{entry.contender.facts.name} {given!r} {plan.kept_shares!r}"
    if plan.predictors is None:
        return key
    return f"{key} {document_digest({'predictors': [dataclasses.asdict(one) for one in plan.predictors]})}"


def _row(entry: Entry, items: Sequence[Item], found: Sequence[Answered], asker: Asker) -> MarkRow:
    return MarkRow(
        policy=entry.contender.facts.name,
        budget=entry.budget,
        marks=tuple(round(mark(item, asker.text(item, of.tokens)), 4) for item, of in zip(items, found, strict=True)),
        kept=tuple(round(of.kept, 4) for of in found),
        kv_bytes=tuple(of.kv_bytes for of in found),
        moved_bytes=tuple(of.moved_bytes for of in found),
        n_generated=tuple(len(of.tokens) for of in found),
        fact_kept=tuple(None if of.fact_kept is None else round(of.fact_kept, 4) for of in found),
    )
