"""The quality report's cells: tasks cut where they should be, rows that fit their documents, nothing measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.cases import Encode, case_from_task
from benchmarks.quality.cell import Cell, Document, Row, pooled
from benchmarks.quality.comparisons import by_answers, lossless_share, signs, verdicts
from benchmarks.quality.settings import ContextPlan
from benchmarks.quality.store import Store
from trt_kv.calibration.statistics import Verdict
from trt_kv.calibration.synthetic_english import VOCABULARY
from trt_kv.calibration.tasks import REGIONS, copy_tasks, evaluation_tasks, plain_text_tasks
from trt_kv.errors import ReportError, UsageError

WORD_IDS = {word: index for index, word in enumerate(VOCABULARY)}


def _encode(text: str) -> list[int]:
    return [WORD_IDS["<bos>"], *(WORD_IDS[word] for word in text.split())]


def _row(policy: str, budget: float | None, right: str, **fields: Any) -> Row:
    n = len(right)
    made: dict[str, Any] = {
        "losses": tuple(0.5 * i for i in range(n)),
        "agreed": (3,) * n,
        "kept": (0.5,) * n,
        "kept_by_layer": (1.0, 0.4, 0.3, 0.3),
        "kv_bytes": 1000.0,
        "kept_place": 0.5,
        "fact_kept": 0.25,
        "question_kept": None,
    }
    return Row(policy=policy, budget=budget, right=right, **(made | fields))


def _cell(task: str, rows: list[Row], *, seed: int = 0, n_counted: int = 4) -> Cell:
    documents = [Document(seed=seed, n_prompt_tokens=100, n_counted_tokens=n_counted) for _ in rows[0].right]
    return Cell(
        task=task, context_length=128, documents=tuple(documents), sink_mass=(0.1, 0.2), rows=tuple(rows), elapsed_s=1.0
    )


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("question_known", [True, False])
def test_a_case_knows_where_the_asked_fact_and_the_question_stand(region: str, question_known: bool) -> None:
    for task in evaluation_tasks(5, context_length=300, n_facts=6, distance=region):  # type: ignore[arg-type]
        case = case_from_task(task, _encode, question_known=question_known)
        assert tuple(case.prompt[i] for i in case.fact) == case.answer
        assert list(case.prompt + case.fed) == _encode(f"{task.prompt} {task.answer}")
        asked = tuple(case.prompt[i] for i in case.question) + case.given
        assert asked[0] == WORD_IDS["question"]
        assert asked[-2:] == (WORD_IDS["answer"], WORD_IDS[":"])
        assert bool(case.given) != question_known
        assert case.first_counted == (1 if question_known else len(case.given))


@pytest.mark.parametrize("question_known", [True, False])
def test_a_copy_asks_with_its_cue(question_known: bool) -> None:
    (task,) = copy_tasks(1, context_length=300, cue_length=9, answer_length=20)
    case = case_from_task(task, _encode, question_known=question_known)
    assert tuple(case.prompt[i] for i in case.fact) == case.answer
    cue = tuple(case.prompt[i] for i in case.question) + case.given
    assert len(cue) == 9
    assert cue == tuple(case.prompt[case.fact.start - 9 : case.fact.start])


def test_plain_text_has_neither_fact_nor_question() -> None:
    (task,) = plain_text_tasks(1, context_length=200, answer_length=20)
    case = case_from_task(task, _encode)
    assert not case.fact
    assert not case.question
    assert not case.given
    assert len(case.answer) == 20


@pytest.mark.parametrize("broken", [lambda text: [*_encode(text), 5], lambda text: [1, *_encode(text)]])
def test_a_tokenizer_of_another_language_is_refused(broken: Encode) -> None:
    (task,) = evaluation_tasks(1, context_length=200, n_facts=2)
    with pytest.raises(UsageError, match="tokenizer"):
        case_from_task(task, broken)


def test_verdicts_have_one_sign_per_kept_share() -> None:
    found: list[Verdict] = ["better", "better", "no clear difference", "better", "worse"]
    assert signs(dict(zip([0.1, 0.2, 0.3, 0.4, 0.5], found, strict=True))) == "++.+-"


def test_a_policy_that_finds_its_own_budget_has_one_row_for_all() -> None:
    cell = _cell("copy", [_row("full", None, "11"), _row("snapkv", 0.2, "01"), _row("refreekv", None, "10")])
    assert cell.row("refreekv", 0.2) is cell.row("refreekv", 0.5) is cell.row("refreekv")
    assert cell.row("snapkv", 0.2).right == "01"
    assert not cell.has("snapkv", 0.5)
    with pytest.raises(ReportError, match="lack a row"):
        cell.row("snapkv", 0.5)


def test_exempt_layers_can_be_left_out_of_a_budget() -> None:
    row = _row("refreekv", None, "11", kept=(0.5, 0.75))
    assert row.kept_without((0,)) == pytest.approx((1 / 3, 2 / 3))
    assert row.kept_without(()) == (0.5, 0.75)


def test_a_cell_needs_the_full_cache_first_and_a_result_per_document() -> None:
    with pytest.raises(ReportError, match="full cache"):
        _cell("copy", [_row("snapkv", 0.2, "11")])
    with pytest.raises(ReportError, match="one result per document"):
        _cell("copy", [_row("full", None, "11"), _row("snapkv", 0.2, "1", kept=(0.5, 0.5))])


def test_pooled_cells_weigh_documents_alike_and_share_their_rows() -> None:
    first = _cell("a", [_row("full", None, "11"), _row("x", 0.2, "10"), _row("y", 0.2, "11")])
    other = _cell(
        "b", [_row("full", None, "1"), _row("x", 0.2, "0", kept=(0.2,), kept_place=0.2, question_kept=1.0)], n_counted=7
    )
    cell = pooled("both", [first, other])
    assert [row.policy for row in cell.rows] == ["full", "x"]
    row = cell.row("x", 0.2)
    assert row.right == "100"
    assert row.kept == (0.5, 0.5, 0.2)
    assert row.kept_place == pytest.approx((2 * 0.5 + 0.2) / 3)
    assert row.fact_kept == pytest.approx(0.25)
    assert row.question_kept is None
    assert cell.agreement(row).value == pytest.approx(9 / 15)
    assert cell.elapsed_s == 2.0


def test_lossless_means_from_there_on() -> None:
    """A share counts only if no larger one is clearly worse than the full cache."""
    right, wrong = "1" * 8, "0" * 8
    for (at_20, at_50), share in {
        (right, right): 0.2, (wrong, right): 0.5, (right, wrong): None, (wrong, wrong): None
    }.items():  # fmt: skip
        cell = _cell("a", [_row("full", None, right), _row("x", 0.2, at_20), _row("x", 0.5, at_50)])
        assert lossless_share(cell, "x", (0.2, 0.5), by_answers) == share
        assert set(verdicts(cell, "x", "full", (0.2, 0.5, 0.9), by_answers)) == {0.2, 0.5}


def test_a_part_is_measured_once_under_the_same_conditions(tmp_path: Path) -> None:
    plan = ContextPlan(context_length=512, documents_per_seed=3, budgets=(0.1, 0.5), groups=("ours",))
    measured = []

    def measure() -> ContextPlan:
        measured.append(plan)
        return plan

    store = Store(folder=tmp_path / "parts", conditions={"model": "sha256:0"})
    assert not store.has("one", seeds=[0])
    assert store.get_or_measure("one", ContextPlan, measure, seeds=[0]) == plan
    assert store.get_or_measure("one", ContextPlan, measure, seeds=[0]) == plan
    assert store.has("one", seeds=[0])
    assert len(measured) == 1
    store.get_or_measure("one", ContextPlan, measure, seeds=[0, 1])
    Store(folder=tmp_path / "parts", conditions={"model": "sha256:1"}).get_or_measure("one", ContextPlan, measure, seeds=[0, 1])
    assert len(measured) == 3
    assert not store.has("one", seeds=[0, 1])


def test_a_measurement_that_fails_leaves_no_part_and_a_broken_part_is_told(tmp_path: Path) -> None:
    store = Store(folder=tmp_path, conditions={})

    def fail() -> ContextPlan:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_measure("one", ContextPlan, fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "one.json").write_text(json.dumps({"format": "something else"}))
    assert not store.has("one")
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(ReportError, match="not JSON"):
        store.has("one")
