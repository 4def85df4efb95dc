"""Rows of a results file, which need not be measured again: a report goes on from what is committed, or gets one more policy.

What was measured is known by the name of the part, policy and share. Whether a policy of that name still does the same is for
whoever gives the file to know; the model, versions and lengths of prompts are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.real.results import Loss, MarkCell, MarkRow, OneTalk, RealResults, of_document
from benchmarks.quality.real.settings import RealSettings
from benchmarks.quality.recipes import Recipes
from benchmarks.quality.results import Versions
from trt_kv.errors import ReportError

Key = tuple[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Known:
    """``parts``: the rows of each part by policy and share. ``n_prompt``: of a part's questions. ``recipes``: as calibrated."""

    parts: Mapping[str, Mapping[Key, Any]]
    n_prompt: Mapping[str, Sequence[int]]
    recipes: Recipes

    @classmethod
    def nothing(cls) -> "Known":
        return cls(parts={}, n_prompt={}, recipes=Recipes(facts=()))

    @classmethod
    def of(cls, results: RealResults, *, digest: str, versions: Versions, settings: RealSettings) -> "Known":
        """``ReportError`` for results of another model, other versions or other settings of texts and conversations."""
        for what, got, expected in (
            ("another model", results.model.digest, digest),
            ("other versions", results.versions, versions),
            ("other texts", (results.settings.text_tokens, results.settings.main), (settings.text_tokens, settings.main)),
            ("other conversations", results.settings.talk, settings.talk),
        ):
            if got != expected:
                raise ReportError(
                    f"the known results are of {what}", got=got, expected=expected, fix="leave --known out, and measure all"
                )
        parts: dict[str, dict[Key, Any]] = {}
        n_prompt: dict[str, Sequence[int]] = {}
        for cells, infix in ((results.tried, "full-"), (results.cells, "")):
            for cell in cells:
                for document in dict.fromkeys(cell.documents):
                    one = of_document(cell, document)
                    name = part_name(cell.family, cell.mode, cell.n_tokens, f"{infix}{document}")
                    parts[name], n_prompt[name] = _by_key(one), one.n_prompt
        for row in results.texts:
            for number, nats in enumerate(row.losses):
                parts.setdefault(text_name(number), {})[row.key] = Loss(nats=nats)
        for talk in results.talks:
            for document, (right, *held) in enumerate(zip(talk.right, talk.most_held, talk.held_at_end, strict=True)):
                parts.setdefault(talk_name(document, talk.mode), {})[talk.key] = OneTalk(right=right, held=tuple(held))
        return cls(parts=parts, n_prompt=n_prompt, recipes=Recipes(facts=results.recipes))

    def rows(self, name: str, n_prompt: Sequence[int] | None = None) -> Mapping[Key, Any]:
        """The rows of a part; none if its questions have not ``n_prompt`` tokens."""
        same = n_prompt is None or tuple(n_prompt) == tuple(self.n_prompt.get(name, ()))
        return self.parts.get(name, {}) if same else {}


def part_name(family: str, mode: str, n_tokens: int, document: str) -> str:
    """What a document of a cell is stored as."""
    return f"{family}-{mode}-{n_tokens}-{document}"


def text_name(number: int) -> str:
    """What a plain text is stored as."""
    return f"text-{number}"


def talk_name(document: int, mode: str) -> str:
    """What a conversation is stored as, of each policy."""
    return f"talk-{document}-{mode}"


def _by_key(cell: MarkCell) -> dict[Key, MarkRow]:
    return {row.key: row for row in cell.rows}
